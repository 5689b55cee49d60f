// Bounds of the products of every row of a float32 table [V, D] with some inputs [M, D], from an int8
// copy of the table: what the copy leaves out of a row has a known norm (Cauchy-Schwarz). It is a
// quarter of the bytes; with what the copy leaves out, in four bits, three eighths. Where bounds
// leave something undecided, float32 rows decide.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "logits.h"
#include "threads.h"
#include "vectors.h"

namespace grok1 {

constexpr int64_t kUnitRows = 256;  // table rows of a unit
constexpr int64_t kNearRows = 32;    // those that stay near while all inputs go by
constexpr int64_t kAhead = 8192;     // bytes fetched ahead of their use
constexpr int kInputs = 4;           // most inputs that table rows are multiplied by at a time

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// A row of a table of float32 or int8.
template <typename Value>
struct PlainRow {
  const Value* values;

  Floats vector_at(int64_t k) const { return load(values + k); }
  float at(int64_t k) const { return values[k]; }
  void fetch_after(int64_t k, int64_t count) const {
    // Beyond the row comes the next one; an address past the table is harmless.
    const char* from = reinterpret_cast<const char*>(values + k) + kAhead;
    for (int64_t line = 0; line < count * int64_t{sizeof(Value)}; line += kCacheLine) {
      __builtin_prefetch(from + line, 0, 2);
    }
  }
};

template <int kCount, typename Row>
void dot(const Row& row, const float* x, int64_t depth, float* products) {
  // Several sums, for the latency of an addition.
  constexpr int kSums = 8 / kCount;
  Floats sums[kCount][kSums] = {};
  int64_t k = 0;
  for (; k + kSums * kLanes <= depth; k += kSums * kLanes) {
    row.fetch_after(k, kSums * kLanes);
    for (int s = 0; s < kSums; ++s) {
      Floats weight = row.vector_at(k + s * kLanes);
      for (int m = 0; m < kCount; ++m) {
        sums[m][s] += weight * load(x + m * depth + k + s * kLanes);
      }
    }
  }
  for (int m = 0; m < kCount; ++m) {
    Floats sum = sums[m][0];
    for (int s = 1; s < kSums; ++s) sum += sums[m][s];
    products[m] = sum_of(sum);
    for (int64_t rest = k; rest < depth; ++rest) products[m] += row.at(rest) * x[m * depth + rest];
  }
}

// What the int8 copy of a row leaves out: four bits c a column, for (c - 7.5) / 15 of a step of the
// copy. A line of the copy has half a line of them, the low bits for the first half of its columns.
constexpr float kRemainderSteps = 15;
constexpr int64_t kHalfLine = kCacheLine / 2;
constexpr int kLineVectors = kCacheLine / kLanes;

// Sums of an input and a row, as many whatever is beside them: a product has the same bits then. For
// the latency of an addition there are `kSideFine` of inputs and rows side by side.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSumsFine = 4;
constexpr int kSideFine = 1;
#else
constexpr int kSumsFine = 2;
constexpr int kSideFine = 4;
#endif

inline int64_t remainders_size(int64_t depth) {
  return (depth + kCacheLine - 1) / kCacheLine * kHalfLine;
}

// parts[kRows, kCount, kSumsFine] += the products of a line's columns. All loops are of known length
// and unrolled, or the sums would not stay in registers.
template <int kRows, int kCount>
__attribute__((always_inline)) inline void multiply_line_fine(
    const int8_t* values, const uint8_t* remainders, const float* x, int64_t depth,
    Floats (&parts)[kRows][kCount][kSumsFine]) {
#pragma GCC unroll 16
  for (int v = 0; v < kLineVectors; ++v) {
    const int column = v * kLanes;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* codes = remainders + r * remainders_size(depth) + column % kHalfLine;
      const Floats weight = load(values + r * depth + column) * kRemainderSteps +
                            load_four_bits(codes, column < kHalfLine ? 0 : 4);
#pragma GCC unroll 4
      for (int m = 0; m < kCount; ++m) {
        Floats& part = parts[r][m][v % kSumsFine];
        part = multiply_add(weight, load(x + m * depth + column), part);
      }
    }
  }
}

// products[kRows, kCount] with rows of the copy and what that leaves out, without their scales;
// `sums` are those of the inputs' elements.
template <int kRows, int kCount>
void dot_fine(const int8_t* values, const uint8_t* remainders, const float* x, int64_t depth,
              const float* sums, float* products) {
  const int64_t stride = remainders_size(depth);
  Floats parts[kRows][kCount][kSumsFine] = {};
  int64_t k = 0;
  for (; k + kCacheLine <= depth; k += kCacheLine, remainders += kHalfLine) {
    // Beyond these rows come the next ones; an address past the table is harmless.
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(values + r * depth + k + kAhead, 0, 2);
      __builtin_prefetch(remainders + r * stride + kAhead / 2, 0, 2);
    }
    multiply_line_fine<kRows, kCount>(values + k, remainders, x + k, depth, parts);
  }
  for (int r = 0; r < kRows; ++r, values += depth, remainders += stride) {
    for (int m = 0; m < kCount; ++m) {
      Floats sum = parts[r][m][0];
      for (int s = 1; s < kSumsFine; ++s) sum += parts[r][m][s];
      float total = sum_of(sum);
      for (int64_t column = 0; k + column < depth; ++column) {
        const int shift = column < kHalfLine ? 0 : 4;
        const int code = remainders[column % kHalfLine] >> shift & 15;
        const float weight = values[k + column] * kRemainderSteps + code;
        total = multiply_add(weight, x[m * depth + k + column], total);
      }
      total = multiply_add(-kRemainderSteps / 2, sums[m], total);
      products[r * kCount + m] = total / kRemainderSteps;
    }
  }
}

struct ScreenedTable {
  const float* rows;         // [V, D]
  const int8_t* values;      // [V, D]
  const float* scales;       // [V]
  const float* uncertainty;  // [V], bounds |row . x - (product with its copy)| / |x|
  const bool* allowed;       // [V], or [M, V] with another row for each input
  int64_t allowed_stride;    // 0 or V
  int64_t num_rows, depth;
  const uint8_t* remainders = nullptr;  // [V, remainders_size(D)]; null if they are not read

  int64_t num_units() const { return (num_rows + kUnitRows - 1) / kUnitRows; }
  std::pair<int64_t, int64_t> unit(int64_t number) const {
    return {number * kUnitRows, std::min((number + 1) * kUnitRows, num_rows)};
  }

  // Of a float32 row: the same whatever else is asked for, and the same as that of `logits.h`.
  float product(int64_t row, const float* x) const {
    return table_product(x, rows + row * depth, depth);
  }
};

// An input as the screen multiplies it.
struct Input {
  const float* x;
  float norm, sum;
  float uncertainty = 0;  // how far from its products with a row of scale 1 the screen's are
#if defined(__AVX512VNNI__)
  // x is close to step * (128 * high + low): a row is then multiplied as integers, at the speed of
  // the memory bus.
  float step;
  int64_t sum_of_digits = 0;  // of 128 * high + low
#endif
};

// Inputs that table rows are multiplied by at a time.
struct InputBlock {
  std::vector<Input> inputs;
#if defined(__AVX512VNNI__)
  std::vector<int8_t> digits;  // [lines, inputs, high and low, kCacheLine], zero beyond the depth
#endif

  InputBlock(int64_t count, [[maybe_unused]] int64_t depth) : inputs(count) {
#if defined(__AVX512VNNI__)
    digits.resize((depth + kCacheLine - 1) / kCacheLine * count * 2 * kCacheLine);
#endif
  }

  void set(int64_t m, const float* x, int64_t depth) {
    Input& input = inputs[m];
    double sum = 0, squares = 0;
    for (int64_t k = 0; k < depth; ++k) {
      sum += x[k];
      squares += static_cast<double>(x[k]) * x[k];
    }
    input.x = x;
    input.norm = static_cast<float>(std::sqrt(squares) * (1 + 1e-6));
    input.sum = static_cast<float>(sum);
#if defined(__AVX512VNNI__)
    constexpr float kSteps = 127 * 128;
    float largest = 0;
    for (int64_t k = 0; k < depth; ++k) largest = std::max(largest, std::abs(x[k]));
    input.step = largest / kSteps;
    // Half a step in each place, times the largest weight.
    input.uncertainty = 1.001f * static_cast<float>(depth) * 0.5f * input.step * 127;
    for (int64_t k = 0; k < depth; ++k) {
      // What is no number becomes 0; by the norm no bound is one.
      float steps = input.step > 0 && x[k] == x[k] ? x[k] / input.step : 0;
      int32_t rounded = static_cast<int32_t>(std::lrint(std::clamp(steps, -kSteps, kSteps)));
      int32_t upper = (rounded + 64) >> 7;
      int64_t line = k / kCacheLine * static_cast<int64_t>(inputs.size()) + m;
      int8_t* high = digits.data() + 2 * line * kCacheLine + k % kCacheLine;
      high[0] = static_cast<int8_t>(upper);
      high[kCacheLine] = static_cast<int8_t>(rounded - 128 * upper);
      input.sum_of_digits += rounded;
    }
#endif
  }
};

#if defined(__AVX512VNNI__)
// Eight sums of two of 16 integers each, which do not overflow.
inline __m512i widened(__m512i integers) {
  return _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(integers)),
                          _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(integers, 1)));
}
#endif

// products[kRows, kCount] of rows of the int8 copy, without their scales.
template <int kRows, int kCount>
void screen(const int8_t* rows, const InputBlock& block, int64_t depth, float* products) {
#if defined(__AVX512VNNI__)
  __m512i high[kRows][kCount] = {}, low[kRows][kCount] = {};
  const __m512i offset = _mm512_set1_epi8(-128);
  const int8_t* digits = block.digits.data();
  auto multiply_line = [&](auto load_line) {
    __m512i weights[kRows];
    // Adds 128 to each: one factor has to be unsigned.
    for (int r = 0; r < kRows; ++r) weights[r] = _mm512_xor_si512(load_line(r), offset);
    for (int m = 0; m < kCount; ++m, digits += 2 * kCacheLine) {
      __m512i high_digits = _mm512_loadu_si512(digits);
      __m512i low_digits = _mm512_loadu_si512(digits + kCacheLine);
      for (int r = 0; r < kRows; ++r) {
        high[r][m] = _mm512_dpbusd_epi32(high[r][m], weights[r], high_digits);
        low[r][m] = _mm512_dpbusd_epi32(low[r][m], weights[r], low_digits);
      }
    }
  };
  int64_t k = 0;
  for (; k + kCacheLine <= depth; k += kCacheLine) {
    multiply_line([&](int r) {
      const int8_t* from = rows + r * depth + k;
      // Beyond these rows come the next ones; an address past the table is harmless.
      __builtin_prefetch(from + kRows * depth, 0, 2);
      return _mm512_loadu_si512(from);
    });
  }
  if (k < depth) {
    __mmask64 rest = (uint64_t{1} << (depth - k)) - 1;
    multiply_line([&](int r) { return _mm512_maskz_loadu_epi8(rest, rows + r * depth + k); });
  }
  for (int r = 0; r < kRows; ++r) {
    for (int m = 0; m < kCount; ++m) {
      const Input& input = block.inputs[m];
      __m512i sum_of_high = _mm512_slli_epi64(widened(high[r][m]), 7);
      __m512i sums = _mm512_add_epi64(sum_of_high, widened(low[r][m]));
      int64_t sum = _mm512_reduce_add_epi64(sums) - 128 * input.sum_of_digits;
      products[r * kCount + m] = input.step * static_cast<float>(sum);
    }
  }
#else
  for (int r = 0; r < kRows; ++r) {
    const PlainRow<int8_t> row{rows + r * depth};
    dot<kCount>(row, block.inputs[0].x, depth, products + r * kCount);
  }
#endif
}

// As `screen`, with the remainders.
template <int kRows, int kCount>
void screen_fine(const ScreenedTable& table, int64_t begin, const InputBlock& block,
                 float* products) {
  float sums[kCount];
  for (int m = 0; m < kCount; ++m) sums[m] = block.inputs[m].sum;
  constexpr int kSide = std::min(kRows, std::max(1, kSideFine / kCount));
  for (int64_t row = begin; row < begin + kRows; row += kSide, products += kSide * kCount) {
    dot_fine<kSide, kCount>(table.values + row * table.depth,
                            table.remainders + row * remainders_size(table.depth),
                            block.inputs[0].x, table.depth, sums, products);
  }
}

// upper[kCount, num_rows] and the largest lower bound of each input, for table rows `begin` to
// `end`; rows that are not allowed have neither, but with remainders an upper one. A lower bound of
// NaN is that of no number.
template <int kRows, int kCount>
void screen_unit(const ScreenedTable& table, const InputBlock& block, int64_t begin, int64_t end,
                 const bool* allowed_rows, float* best, float* upper) {
  auto screen_rows = [&](int64_t row, auto rows) {
    constexpr int kHere = decltype(rows)::value;
    float products[kHere * kCount];
    if (table.remainders) {
      screen_fine<kHere, kCount>(table, row, block, products);
    } else {
      screen<kHere, kCount>(table.values + row * table.depth, block, table.depth, products);
    }
    for (int r = 0; r < kHere; ++r, ++row) {
      for (int m = 0; m < kCount; ++m) {
        const Input& input = block.inputs[m];
        float value = products[r * kCount + m] * table.scales[row];
        float bound = input.norm * table.uncertainty[row] + input.uncertainty * table.scales[row];
        bool allowed = allowed_rows[m * table.allowed_stride + row];
        upper[m * table.num_rows + row] = allowed || table.remainders ? value + bound : kLowest;
        if (allowed && value - bound > best[m]) best[m] = value - bound;
        // Of a table row, allowed or not, or an input that is no number: it stays.
        if (std::isnan(bound)) best[m] = bound;
      }
    }
  };
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) screen_rows(row, std::integral_constant<int, kRows>{});
  for (; row < end; ++row) screen_rows(row, std::integral_constant<int, 1>{});
}

// Calls use(i) for every value that is at least `least`.
template <typename Use>
void for_each_from(const float* values, int64_t size, float least, Use use) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    if (!any(load(values + i) >= least)) continue;
    for (int64_t one = i; one < i + kLanes; ++one) {
      if (values[one] >= least) use(one);
    }
  }
  for (; i < size; ++i) {
    if (values[i] >= least) use(i);
  }
}

// What the screen found.
struct Screened {
  float* upper;  // [M, V], upper bounds; without remainders -infinity where a row is not allowed
  std::vector<float> lower;  // [M], the largest lower bound; NaN if an input, or any row, has one
  std::vector<Input> inputs;
};

// Screens all rows of a table for all inputs. What it returns is good until this thread's next call.
inline Screened screened(xla::ffi::ThreadPool& pool, const ScreenedTable& table, const float* x,
                         int64_t num_inputs) {
  const int64_t num_units = table.num_units();
  std::vector<InputBlock> blocks;
  std::vector<int64_t> starts;
  for (int64_t m = 0, count; m < num_inputs; m += count) {
    count = num_inputs - m >= kInputs ? kInputs : num_inputs - m >= 2 ? 2 : 1;
    blocks.emplace_back(count, table.depth);
    starts.push_back(m);
  }
  run_units(pool, blocks.size(), [&](int64_t number) {
    InputBlock& block = blocks[number];
    const float* first = x + starts[number] * table.depth;
    for (size_t m = 0; m < block.inputs.size(); ++m) {
      block.set(m, first + m * table.depth, table.depth);
      if (table.remainders) block.inputs[m].uncertainty = 0;  // multiplied as it is
    }
  });
  static thread_local Scratch scratch;
  float* highest = scratch.floats(num_inputs * (table.num_rows + num_units));
  float* best_of_unit = highest + num_inputs * table.num_rows;  // [units, M] of lower bounds
  run_units(pool, num_units, [&](int64_t unit) {
    std::fill_n(best_of_unit + unit * num_inputs, num_inputs, kLowest);
    auto [unit_begin, unit_end] = table.unit(unit);
    for (int64_t begin = unit_begin; begin < unit_end; begin += kNearRows) {
      int64_t end = std::min(begin + kNearRows, unit_end);
      float *best = best_of_unit + unit * num_inputs, *upper = highest;
      const bool* allowed = table.allowed;
      for (const InputBlock& block : blocks) {
        switch (block.inputs.size()) {
          case 1: screen_unit<4, 1>(table, block, begin, end, allowed, best, upper); break;
          case 2: screen_unit<4, 2>(table, block, begin, end, allowed, best, upper); break;
          default: screen_unit<2, kInputs>(table, block, begin, end, allowed, best, upper);
        }
        allowed += block.inputs.size() * table.allowed_stride;
        best += block.inputs.size();
        upper += block.inputs.size() * table.num_rows;
      }
    }
  }, {reinterpret_cast<const char*>(table.values), table.num_rows * table.depth});
  Screened found{highest, std::vector<float>(num_inputs, kLowest), {}};
  for (int64_t unit = 0; unit < num_units; ++unit) {
    for (int64_t m = 0; m < num_inputs; ++m) {
      float lower = best_of_unit[unit * num_inputs + m];
      if (lower > found.lower[m] || std::isnan(lower)) found.lower[m] = lower;
    }
  }
  for (const InputBlock& block : blocks) {
    found.inputs.insert(found.inputs.end(), block.inputs.begin(), block.inputs.end());
  }
  return found;
}

}  // namespace grok1
