// The kernels as XLA sees them. Everything is row-major, as XLA holds it; a stack of matrices is
// read in place, whichever of them is asked for.

#include <cstring>
#include <string>

#include "attention.h"
#include "draw.h"
#include "experts.h"
#include "log_probabilities.h"
#include "matmul.h"
#include "most_probable.h"
#include "sample.h"
#include "weights.h"
#include "xla/ffi/api/ffi.h"

namespace {

ffi::Error Attention(Pool pool, Floats query, Floats keys, Floats values, Integers layer,
                     Integers slots, Integers positions, float scale, float soft_cap,
                     FloatsOut out) {
  auto sizes = query.dimensions(), cache_sizes = keys.dimensions();
  int64_t number = layer.typed_data()[0];
  if (number < 0 || number >= cache_sizes[0]) return no_such_matrix(number, cache_sizes[0]);
  int64_t start = number * (keys.element_count() / cache_sizes[0]);
  grok1::attend(pool, {query.typed_data(), keys.typed_data() + start, values.typed_data() + start,
                       slots.typed_data(), positions.typed_data(), out->typed_data(),
                       cache_sizes[1], sizes[0], sizes[1], sizes[2], sizes[3], cache_sizes[3],
                       sizes[4], scale, soft_cap});
  return ffi::Error::Success();
}

grok1::ScreenedTable screened_table(Floats& rows, Values& values, Floats& scales,
                                    Floats& uncertainty, Flags& allowed) {
  int64_t num_rows = rows.dimensions()[0];
  return {rows.typed_data(),    values.typed_data(),
          scales.typed_data(),  uncertainty.typed_data(),
          allowed.typed_data(), allowed.dimensions().size() > 1 ? num_rows : 0,
          num_rows,             rows.dimensions()[1]};
}

ffi::Error MostProbable(Pool pool, Floats x, Floats rows, Values values, Floats scales,
                        Floats uncertainty, Flags allowed, IntegersOut index, FloatsOut product) {
  grok1::most_probable(pool, screened_table(rows, values, scales, uncertainty, allowed),
                       x.typed_data(), x.dimensions()[0], index->typed_data(),
                       product->typed_data());
  return ffi::Error::Success();
}

// How the rows of a batch draw, but for their logits.
grok1::Sampling sampling_of(Flags& allowed, Floats& temperature, Floats& top_p, Integers& top_k,
                            Floats& min_p, Words& keys, Integers& positions) {
  auto sizes = allowed.dimensions();
  int64_t vocab_size = sizes.back();
  return {nullptr,
          allowed.typed_data(),
          temperature.typed_data(),
          top_p.typed_data(),
          top_k.typed_data(),
          min_p.typed_data(),
          keys.typed_data(),
          positions.typed_data(),
          vocab_size,
          sizes.size() == 2 ? vocab_size : 0};
}

ffi::Error Sample(Pool pool, Floats logits, Flags allowed, Floats temperature, Floats top_p,
                  Integers top_k, Floats min_p, Words keys, Integers positions,
                  IntegersOut tokens) {
  auto sampling = sampling_of(allowed, temperature, top_p, top_k, min_p, keys, positions);
  sampling.logits = logits.typed_data();
  grok1::sample(pool, sampling, logits.dimensions()[0], tokens->typed_data());
  return ffi::Error::Success();
}

ffi::Error Draw(Pool pool, Floats x, Floats rows, Values values, Floats scales, Floats uncertainty,
                Flags allowed, Floats temperature, Floats top_p, Integers top_k, Floats min_p,
                Words keys, Integers positions, float factor, IntegersOut tokens) {
  grok1::draw(pool, screened_table(rows, values, scales, uncertainty, allowed), x.typed_data(),
              factor, sampling_of(allowed, temperature, top_p, top_k, min_p, keys, positions),
              x.dimensions()[0], tokens->typed_data());
  return ffi::Error::Success();
}

ffi::Error LogProbabilities(Pool pool, Floats logits, Integers tokens, FloatsOut chosen,
                            IntegersOut top_tokens, FloatsOut top) {
  int64_t num_rows = logits.dimensions()[0], vocab_size = logits.dimensions()[1];
  grok1::log_probabilities(pool,
                           {logits.typed_data(), tokens.typed_data(), chosen->typed_data(),
                            top_tokens->typed_data(), top->typed_data(), vocab_size,
                            top_tokens->dimensions()[1]},
                           num_rows);
  return ffi::Error::Success();
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void grok1_use_threads(int64_t number) {
  grok1::allowed_threads().store(number);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_quantized_matmul, QuantizedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Values>()
                                  .Arg<Scales>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_experts, Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Values>()
                                  .Arg<Scales>()
                                  .Arg<Values>()
                                  .Arg<Scales>()
                                  .Arg<Values>()
                                  .Arg<Scales>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_fetched_experts, FetchedExperts,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Handle>()
                                  .Arg<Scales>()
                                  .Arg<Scales>()
                                  .Arg<Scales>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_int4_matmul, Int4Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<Halves>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_int4_experts, Int4Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<Halves>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<Halves>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<Halves>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_int4_fetched_experts, Int4FetchedExperts,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Handle>()
                                  .Arg<Words>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_most_probable, MostProbable,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Values>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Flags>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_sample, Sample,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Flags>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Arg<Words>()
                                  .Arg<Integers>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_draw, Draw,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Values>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Flags>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Arg<Words>()
                                  .Arg<Integers>()
                                  .Attr<float>("factor")
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_log_probabilities, LogProbabilities,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
