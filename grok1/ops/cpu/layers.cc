// What layers consist of, as XLA sees it: products with quantised weights, one matrix of a stack,
// a layer's experts, and attention. Everything is row-major, as XLA holds it; a stack of matrices is
// read in place, whichever of them is asked for.

#include <algorithm>
#include <cstring>
#include <string>

#include "attention.h"
#include "buffers.h"
#include "experts.h"
#include "matmul.h"

namespace {

// The arrays of a quantised weight, as they come from XLA and as the kernels take them.
struct Int8 {
  using Matrix = grok1::Int8Matrix;

  Values values;
  Scales scales;

  Matrix operator[](int64_t number) {
    auto sizes = values.dimensions(), group_sizes = scales.dimensions();
    return grok1::matrix_of(values.typed_data(),
                            reinterpret_cast<const uint16_t*>(scales.typed_data()), number,
                            sizes[sizes.size() - 2], sizes.back(),
                            group_sizes[group_sizes.size() - 2]);
  }
};

struct Int4 {
  using Matrix = grok1::Int4Matrix;

  Bytes values, subscales;
  Halves scales;

  Matrix operator[](int64_t number) {
    auto sizes = values.dimensions(), block_sizes = scales.dimensions();
    return grok1::matrix_of(values.typed_data(), subscales.typed_data(),
                            reinterpret_cast<const uint16_t*>(scales.typed_data()), number,
                            2 * sizes[sizes.size() - 2], sizes.back(),
                            block_sizes[block_sizes.size() - 2]);
  }
};

template <typename Weight>
int64_t num_matrices(const Weight& weight) {
  auto sizes = weight.values.dimensions();
  int64_t number = 1;
  for (size_t axis = 0; axis + 2 < sizes.size(); ++axis) number *= sizes[axis];
  return number;
}

template <typename Weight>
ffi::Error multiply(Pool pool, Floats x, Weight weight, Integers index, Integers num_valid,
                    FloatsOut out) {
  int64_t number = index.typed_data()[0], count = num_matrices(weight);
  if (number < 0 || number >= count) return no_such_matrix(number, count);
  int64_t all_rows = x.dimensions()[0];
  int64_t num_rows = std::clamp<int64_t>(num_valid.typed_data()[0], 0, all_rows);
  auto matrix = weight[number];
  std::fill(out->typed_data() + num_rows * matrix.columns,
            out->typed_data() + all_rows * matrix.columns, 0.0f);
  grok1::matmul(pool, matrix, x.typed_data(), num_rows, out->typed_data());
  return ffi::Error::Success();
}

ffi::Error QuantizedMatmul(Pool pool, Floats x, Values values, Scales scales, Integers index,
                           Integers num_valid, FloatsOut out) {
  return multiply(pool, x, Int8{values, scales}, index, num_valid, out);
}

ffi::Error Int4Matmul(Pool pool, Floats x, Bytes values, Bytes subscales, Halves scales,
                      Integers index, Integers num_valid, FloatsOut out) {
  return multiply(pool, x, Int4{values, subscales, scales}, index, num_valid, out);
}

std::vector<std::vector<grok1::Dispatched>> rows_by_expert(Integers& expert_indices,
                                                           Floats& expert_weights,
                                                           int64_t num_experts) {
  int64_t num_tokens = expert_indices.dimensions()[0];
  int64_t num_selected = expert_indices.dimensions()[1];
  std::vector<std::vector<grok1::Dispatched>> rows(num_experts);
  for (int64_t place = 0; place < num_tokens * num_selected; ++place) {
    int64_t expert = expert_indices.typed_data()[place];
    // An expert beyond the last is padding's.
    if (expert < 0 || expert >= num_experts) continue;
    rows[expert].push_back({place / num_selected, expert_weights.typed_data()[place]});
  }
  return rows;
}

template <typename Weight>
ffi::Error run_experts(Pool pool, Floats x, Weight gate, Weight up, Weight down, Integers layer,
                       Integers expert_indices, Floats expert_weights, FloatsOut out) {
  auto sizes = gate.values.dimensions();
  int64_t num_experts = sizes[sizes.size() - 3];
  int64_t first = layer.typed_data()[0] * num_experts, count = num_matrices(gate);
  if (first < 0 || first + num_experts > count) return no_such_matrix(first, count);
  std::vector<grok1::Expert<typename Weight::Matrix>> experts(num_experts);
  for (int64_t e = 0; e < num_experts; ++e) {
    experts[e] = {gate[first + e], up[first + e], down[first + e]};
  }
  auto rows = rows_by_expert(expert_indices, expert_weights, num_experts);
  std::fill_n(out->typed_data(), out->element_count(), 0.0f);
  grok1::run_experts(pool, experts, rows, x.typed_data(), out->typed_data());
  return ffi::Error::Success();
}

ffi::Error Experts(Pool pool, Floats x, Values gate, Scales gate_scales, Values up,
                   Scales up_scales, Values down, Scales down_scales, Integers layer,
                   Integers expert_indices, Floats expert_weights, FloatsOut out) {
  return run_experts(pool, x, Int8{gate, gate_scales}, Int8{up, up_scales},
                     Int8{down, down_scales}, layer, expert_indices, expert_weights, out);
}

ffi::Error Int4Experts(Pool pool, Floats x, Bytes gate, Bytes gate_subscales, Halves gate_scales,
                       Bytes up, Bytes up_subscales, Halves up_scales, Bytes down,
                       Bytes down_subscales, Halves down_scales, Integers layer,
                       Integers expert_indices, Floats expert_weights, FloatsOut out) {
  return run_experts(pool, x, Int4{gate, gate_subscales, gate_scales},
                     Int4{up, up_subscales, up_scales}, Int4{down, down_subscales, down_scales},
                     layer, expert_indices, expert_weights, out);
}

// Writes where the host has what it fetches of gate, up and down of one of a layer's experts; they
// stay as they are until the next call. `next` is the expert that will be asked for then, -1 if
// there is none. Returns 0, or something else if the weights cannot be had.
using Fetch = int32_t (*)(int32_t layer, int32_t expert, int32_t next, const void** parts);

// As run_experts, with weights that the host is asked for, one by one, once it is known which.
// `expert_of` makes an expert, of its number and the addresses of `kParts` fetched parts.
template <int kParts, typename ExpertOf>
ffi::Error run_fetched(Pool pool, Floats x, Handle handle, int64_t num_experts, Integers layer,
                       Integers expert_indices, Floats expert_weights, FloatsOut out,
                       ExpertOf expert_of) {
  auto rows = rows_by_expert(expert_indices, expert_weights, num_experts);
  // In the order of run_experts, so that sums are the same to the last bit.
  std::vector<int64_t> order;
  for (bool few : {true, false}) {
    for (int64_t e = 0; e < num_experts; ++e) {
      if (!rows[e].empty() && (rows[e].size() <= grok1::kFewRows) == few) order.push_back(e);
    }
  }
  Fetch fetch;
  static_assert(sizeof(fetch) == 2 * sizeof(uint32_t));
  std::memcpy(&fetch, handle.typed_data(), sizeof(fetch));
  std::fill_n(out->typed_data(), out->element_count(), 0.0f);
  for (size_t place = 0; place < order.size(); ++place) {
    int64_t e = order[place];
    const void* parts[kParts];
    int64_t next = place + 1 < order.size() ? order[place + 1] : -1;
    if (fetch(layer.typed_data()[0], e, next, parts) != 0) {
      return ffi::Error::Internal("the experts' weights cannot be had");
    }
    std::vector experts = {expert_of(e, parts)};
    grok1::run_experts(pool, experts, {rows[e]}, x.typed_data(), out->typed_data());
  }
  return ffi::Error::Success();
}

ffi::Error FetchedExperts(Pool pool, Floats x, Handle handle, Scales gate_scales, Scales up_scales,
                          Scales down_scales, Integers layer, Integers expert_indices,
                          Floats expert_weights, FloatsOut out) {
  auto sizes = gate_scales.dimensions();
  int64_t num_experts = sizes[sizes.size() - 3], hidden_size = sizes.back();
  int64_t depth = down_scales.dimensions().back();
  int64_t first = layer.typed_data()[0] * num_experts;
  int64_t count = gate_scales.element_count() / (sizes[sizes.size() - 2] * hidden_size);
  if (first < 0 || first + num_experts > count) return no_such_matrix(first, count);
  auto expert_of = [&](int64_t e, const void** parts) {
    auto matrix = [&](int part, Scales& scales, int64_t rows, int64_t columns) {
      int64_t num_groups = scales.dimensions()[scales.dimensions().size() - 2];
      auto scale = reinterpret_cast<const uint16_t*>(scales.typed_data());
      scale += (first + e) * num_groups * columns;
      return grok1::matrix_of(static_cast<const int8_t*>(parts[part]), scale, 0, rows, columns,
                              num_groups);
    };
    return grok1::Expert<grok1::Int8Matrix>{matrix(0, gate_scales, depth, hidden_size),
                                            matrix(1, up_scales, depth, hidden_size),
                                            matrix(2, down_scales, hidden_size, depth)};
  };
  return run_fetched<3>(pool, x, handle, num_experts, layer, expert_indices, expert_weights, out,
                        expert_of);
}

// `sizes` are the number of experts, the hidden size, and the blocks of gate and up, and of down.
ffi::Error Int4FetchedExperts(Pool pool, Floats x, Handle handle, Words sizes, Integers layer,
                              Integers expert_indices, Floats expert_weights, FloatsOut out) {
  const uint32_t* size = sizes.typed_data();
  int64_t depth = x.dimensions()[1], hidden_size = size[1];
  auto expert_of = [&](int64_t, const void** parts) {
    auto matrix = [&](int part, int64_t rows, int64_t columns, int64_t num_blocks) {
      return grok1::matrix_of(static_cast<const uint8_t*>(parts[part]),
                              static_cast<const uint8_t*>(parts[part + 1]),
                              static_cast<const uint16_t*>(parts[part + 2]), 0, rows, columns,
                              num_blocks);
    };
    return grok1::Expert<grok1::Int4Matrix>{matrix(0, depth, hidden_size, size[2]),
                                            matrix(3, depth, hidden_size, size[2]),
                                            matrix(6, hidden_size, depth, size[3])};
  };
  return run_fetched<9>(pool, x, handle, size[0], layer, expert_indices, expert_weights, out,
                        expert_of);
}

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
