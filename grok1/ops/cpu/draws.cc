// What follows the layers, as XLA sees it: the most probable token, draws, and log-probabilities.

#include "buffers.h"
#include "draw.h"
#include "log_probabilities.h"
#include "most_probable.h"
#include "sample.h"

namespace {

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

ffi::Error DrawMeasured(Pool pool, Floats x, Floats rows, Values values, Floats scales,
                        Bytes remainders, Floats uncertainty, Flags allowed, Floats temperature,
                        Floats top_p, Integers top_k, Floats min_p, Words keys, Integers positions,
                        float factor, IntegersOut tokens, FloatsOut chosen, IntegersOut top_tokens,
                        FloatsOut top) {
  auto table = screened_table(rows, values, scales, uncertainty, allowed);
  table.remainders = remainders.typed_data();
  const grok1::LogProbabilities asked{nullptr,
                                      nullptr,
                                      chosen->typed_data(),
                                      top_tokens->typed_data(),
                                      top->typed_data(),
                                      table.num_rows,
                                      top->dimensions()[1]};
  grok1::draw(pool, table, x.typed_data(), factor,
              sampling_of(allowed, temperature, top_p, top_k, min_p, keys, positions),
              x.dimensions()[0], tokens->typed_data(), &asked);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_draw_measured, DrawMeasured,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Values>()
                                  .Arg<Floats>()
                                  .Arg<Bytes>()
                                  .Arg<Floats>()
                                  .Arg<Flags>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Arg<Words>()
                                  .Arg<Integers>()
                                  .Attr<float>("factor")
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_log_probabilities, LogProbabilities,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
