// The kernels as XLA sees them. Everything is row-major, as XLA holds it; a stack of matrices is
// read in place, whichever of them is asked for.

#include <string>

#include "attention.h"
#include "experts.h"
#include "matmul.h"
#include "most_probable.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using Pool = ffi::ThreadPool;
using Floats = ffi::Buffer<ffi::F32>;
using Values = ffi::Buffer<ffi::S8>;
using Scales = ffi::Buffer<ffi::BF16>;
using Integers = ffi::Buffer<ffi::S32>;
using Flags = ffi::Buffer<ffi::PRED>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;
using IntegersOut = ffi::ResultBuffer<ffi::S32>;

int64_t num_matrices(const Values& values) {
  auto sizes = values.dimensions();
  int64_t number = 1;
  for (size_t axis = 0; axis + 2 < sizes.size(); ++axis) number *= sizes[axis];
  return number;
}

grok1::Matrix matrix_of(Values& values, Scales& scales, int64_t number) {
  auto sizes = values.dimensions(), group_sizes = scales.dimensions();
  return grok1::matrix_of(values.typed_data(),
                          reinterpret_cast<const uint16_t*>(scales.typed_data()), number,
                          sizes[sizes.size() - 2], sizes.back(),
                          group_sizes[group_sizes.size() - 2]);
}

ffi::Error no_such_matrix(int64_t number, int64_t count) {
  return ffi::Error::InvalidArgument("matrix " + std::to_string(number) + " of a stack of " +
                                     std::to_string(count));
}

ffi::Error QuantizedMatmul(Pool pool, Floats x, Values values, Scales scales, Integers index,
                           Integers num_valid, FloatsOut out) {
  int64_t number = index.typed_data()[0], count = num_matrices(values);
  if (number < 0 || number >= count) return no_such_matrix(number, count);
  int64_t all_rows = x.dimensions()[0];
  int64_t num_rows = std::clamp<int64_t>(num_valid.typed_data()[0], 0, all_rows);
  grok1::Matrix matrix = matrix_of(values, scales, number);
  std::fill(out->typed_data() + num_rows * matrix.columns,
            out->typed_data() + all_rows * matrix.columns, 0.0f);
  grok1::matmul(pool, matrix, x.typed_data(), num_rows, out->typed_data());
  return ffi::Error::Success();
}

ffi::Error Experts(Pool pool, Floats x, Values gate, Scales gate_scales, Values up,
                   Scales up_scales, Values down, Scales down_scales, Integers layer,
                   Integers expert_indices, Floats expert_weights, FloatsOut out) {
  auto sizes = gate.dimensions();
  int64_t num_experts = sizes[sizes.size() - 3];
  int64_t first = layer.typed_data()[0] * num_experts, count = num_matrices(gate);
  if (first < 0 || first + num_experts > count) return no_such_matrix(first, count);
  std::vector<grok1::Expert> experts(num_experts);
  for (int64_t e = 0; e < num_experts; ++e) {
    experts[e] = {matrix_of(gate, gate_scales, first + e), matrix_of(up, up_scales, first + e),
                  matrix_of(down, down_scales, first + e)};
  }
  int64_t num_tokens = expert_indices.dimensions()[0];
  int64_t num_selected = expert_indices.dimensions()[1];
  std::vector<std::vector<grok1::Dispatched>> rows(num_experts);
  for (int64_t place = 0; place < num_tokens * num_selected; ++place) {
    int64_t expert = expert_indices.typed_data()[place];
    // An expert beyond the last is padding's.
    if (expert < 0 || expert >= num_experts) continue;
    rows[expert].push_back({place / num_selected, expert_weights.typed_data()[place]});
  }
  std::fill_n(out->typed_data(), out->element_count(), 0.0f);
  grok1::run_experts(pool, experts, rows, x.typed_data(), out->typed_data());
  return ffi::Error::Success();
}

ffi::Error Attention(Pool pool, Floats query, Floats keys, Floats values, Integers layer,
                     Integers positions, float scale, float soft_cap, FloatsOut out) {
  auto sizes = query.dimensions(), cache_sizes = keys.dimensions();
  int64_t number = layer.typed_data()[0];
  if (number < 0 || number >= cache_sizes[0]) return no_such_matrix(number, cache_sizes[0]);
  int64_t start = number * (keys.element_count() / cache_sizes[0]);
  grok1::attend(pool, {query.typed_data(), keys.typed_data() + start, values.typed_data() + start,
                       positions.typed_data(), out->typed_data(), sizes[0], sizes[1], sizes[2],
                       sizes[3], cache_sizes[3], sizes[4], scale, soft_cap});
  return ffi::Error::Success();
}

ffi::Error MostProbable(Pool pool, Floats x, Floats rows, Values values, Floats scales,
                        Floats uncertainty, Flags allowed, IntegersOut index, FloatsOut product) {
  grok1::ScreenedTable table = {rows.typed_data(),        values.typed_data(),
                                scales.typed_data(),      uncertainty.typed_data(),
                                allowed.typed_data(),     rows.dimensions()[0],
                                rows.dimensions()[1]};
  grok1::most_probable(pool, table, x.typed_data(), x.dimensions()[0], index->typed_data(),
                       product->typed_data());
  return ffi::Error::Success();
}

}  // namespace

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(grok1_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<Pool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
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
