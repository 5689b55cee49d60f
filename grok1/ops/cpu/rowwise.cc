// What is computed of each row by itself, as XLA sees it: norms, rotary phases, the choice of experts,
// logits, sums of exponentials. A row's results have the same bits whatever rows come with it.

#include <cmath>

#include "buffers.h"
#include "log_probabilities.h"
#include "logits.h"
#include "norm.h"
#include "rotate.h"
#include "router.h"

namespace {

ffi::Error add_norm(Pool pool, const float* x, Floats branch, Floats scales, Integers layer,
                    float epsilon, FloatsOut out) {
  const int64_t width = scales.dimensions()[1], count = scales.dimensions()[0];
  const int64_t number = layer.typed_data()[0], num_rows = branch.element_count() / width;
  if (number < 0 || number >= count) return no_such_matrix(number, count);
  grok1::add_norm(pool, x, branch.typed_data(), scales.typed_data() + number * width, num_rows,
                  width, epsilon, out->typed_data());
  return ffi::Error::Success();
}

ffi::Error Norm(Pool pool, Floats x, Floats scales, Integers layer, float epsilon,
                FloatsOut out) {
  return add_norm(pool, nullptr, x, scales, layer, epsilon, out);
}

ffi::Error AddNorm(Pool pool, Floats x, Floats branch, Floats scales, Integers layer,
                   float epsilon, FloatsOut out) {
  return add_norm(pool, x.typed_data(), branch, scales, layer, epsilon, out);
}

ffi::Error Rotate(Pool pool, Floats query, Floats key, Integers positions, Floats frequencies,
                  FloatsOut query_out, FloatsOut key_out) {
  auto heads_of = [](Floats& from, FloatsOut& to) {
    auto sizes = from.dimensions();
    return grok1::Rotated{from.typed_data(), to->typed_data(), sizes[sizes.size() - 2]};
  };
  grok1::rotate(pool, {heads_of(query, query_out), heads_of(key, key_out)}, positions.typed_data(),
                frequencies.typed_data(), positions.element_count(), frequencies.element_count());
  return ffi::Error::Success();
}

ffi::Error TableProducts(Pool pool, Floats x, Floats table, FloatsOut out) {
  auto sizes = table.dimensions();
  grok1::table_products(pool, x.typed_data(), table.typed_data(), x.dimensions()[0], sizes[0],
                        sizes[1], out->typed_data());
  return ffi::Error::Success();
}

ffi::Error ExponentialSums(Pool pool, Floats shifted, FloatsOut totals, FloatsOut weighted) {
  auto sizes = shifted.dimensions();
  grok1::exponential_sums(pool, shifted.typed_data(), sizes[0], sizes[1], totals->typed_data(),
                          weighted->typed_data());
  return ffi::Error::Success();
}

ffi::Error Log(Floats x, FloatsOut out) {
  const int64_t count = x.element_count();
  for (int64_t i = 0; i < count; ++i) {
    out->typed_data()[i] = static_cast<float>(std::log(double{x.typed_data()[i]}));
  }
  return ffi::Error::Success();
}

ffi::Error Route(Pool pool, Floats x, Floats routers, Integers layer, float softcap,
                 bool renormalize, FloatsOut logits, FloatsOut probs, IntegersOut expert_indices,
                 FloatsOut expert_weights) {
  auto sizes = routers.dimensions();
  const int64_t number = layer.typed_data()[0], depth = sizes[1], num_experts = sizes[2];
  if (number < 0 || number >= sizes[0]) return no_such_matrix(number, sizes[0]);
  const float* weights = routers.typed_data() + number * depth * num_experts;
  const int64_t num_selected = expert_indices->dimensions()[1];
  grok1::route(pool, {weights, depth, num_experts, num_selected, softcap, renormalize},
               x.typed_data(), x.dimensions()[0],
               {logits->typed_data(), probs->typed_data(), expert_indices->typed_data(),
                expert_weights->typed_data()});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_norm, Norm,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Attr<float>("epsilon")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_add_norm, AddNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Attr<float>("epsilon")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_rotate, Rotate,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_table_products, TableProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_route, Route,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Attr<float>("softcap")
                                  .Attr<bool>("renormalize")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_exponential_sums, ExponentialSums,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_log, Log,
                              ffi::Ffi::Bind().Arg<Floats>().Ret<ffi::Buffer<ffi::F32>>());
