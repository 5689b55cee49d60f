// The row of a float32 table [V, D] with the largest product, for each input row [M, D], without
// reading the whole table.
//
// An int8 copy of the table gives every product to within a bound that holds for each row: what the
// copy leaves out of the row has a known norm (Cauchy-Schwarz). Only rows whose upper bound reaches
// the best lower bound can be the largest; their float32 products decide. The answer is that of
// the float32 table, ties to the lower row, for a quarter of the bytes.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace grok1 {

struct ScreenedTable {
  const float* rows;         // [V, D]
  const int8_t* values;      // [V, D]
  const float* scales;       // [V]
  const float* uncertainty;  // [V], bounds |row . x - scale * (values . x)| / |x|
  const bool* allowed;       // [V]
  int64_t num_rows, depth;
};

constexpr int64_t kUnitRows = 256;  // table rows of a unit
constexpr int64_t kAhead = 8192;     // bytes fetched ahead of their use
constexpr int kInputs = 4;  // inputs that a table row is multiplied by at a time

template <int kCount, typename Value>
void dot(const Value* row, const float* x, int64_t depth, float* products) {
  // Several sums, for the latency of an addition.
  constexpr int kSums = 8 / kCount;
  Floats sums[kCount][kSums] = {};
  int64_t k = 0;
  for (; k + kSums * kLanes <= depth; k += kSums * kLanes) {
    // Beyond the row comes the next one; an address past the table is harmless.
    for (int64_t line = 0; line < kSums * kLanes * int64_t{sizeof(Value)}; line += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(row + k) + kAhead + line);
    }
    for (int s = 0; s < kSums; ++s) {
      Floats weight = load(row + k + s * kLanes);
      for (int m = 0; m < kCount; ++m) {
        sums[m][s] += weight * load(x + m * depth + k + s * kLanes);
      }
    }
  }
  for (int m = 0; m < kCount; ++m) {
    Floats sum = sums[m][0];
    for (int s = 1; s < kSums; ++s) sum += sums[m][s];
    products[m] = sum_of(sum);
    for (int64_t rest = k; rest < depth; ++rest) products[m] += row[rest] * x[m * depth + rest];
  }
}

// An input as the screen multiplies it, and how far from its products with a row those are, as a
// multiple of the row's scale.
struct Input {
  const float* x;
  float norm, uncertainty = 0;
#if defined(__AVX512VNNI__)
  // x is close to step * (128 * high + low): a row is then multiplied as integers, at the speed of
  // the memory bus.
  std::vector<int8_t> high, low;
  int32_t sum_of_high = 0, sum_of_low = 0;
  float step = 0;
#endif

  Input(const float* x, int64_t depth) : x(x) {
    double sum = 0;
    for (int64_t k = 0; k < depth; ++k) sum += static_cast<double>(x[k]) * x[k];
    norm = static_cast<float>(std::sqrt(sum) * (1 + 1e-6));
#if defined(__AVX512VNNI__)
    constexpr float kSteps = 127 * 128;
    float largest = 0;
    for (int64_t k = 0; k < depth; ++k) largest = std::max(largest, std::abs(x[k]));
    step = largest / kSteps;
    // Half a step in each place, times the largest weight.
    uncertainty = 1.001f * static_cast<float>(depth) * 0.5f * step * 127;
    high.resize(depth);
    low.resize(depth);
    for (int64_t k = 0; k < depth; ++k) {
      // What is no number becomes 0; it finds no row by the norm.
      float steps = step > 0 && x[k] == x[k] ? x[k] / step : 0;
      int32_t rounded = static_cast<int32_t>(std::lrint(std::clamp(steps, -kSteps, kSteps)));
      int32_t upper = (rounded + 64) >> 7;
      high[k] = static_cast<int8_t>(upper);
      low[k] = static_cast<int8_t>(rounded - 128 * upper);
      sum_of_high += high[k];
      sum_of_low += low[k];
    }
#endif
  }
};

// products[kCount] of a row of the int8 copy, without its scale.
template <int kCount>
void screen(const int8_t* row, const Input* inputs, int64_t depth, float* products) {
#if defined(__AVX512VNNI__)
  constexpr int kLines = 4 / kCount;
  __m512i high[kCount][kLines] = {}, low[kCount][kLines] = {};
  const __m512i offset = _mm512_set1_epi8(-128);
  int64_t k = 0;
  for (; k + kLines * kCacheLine <= depth; k += kLines * kCacheLine) {
    for (int line = 0; line < kLines; ++line) {
      const int8_t* from = row + k + line * kCacheLine;
      // Beyond the row comes the next one; an address past the table is harmless.
      __builtin_prefetch(from + kAhead);
      // Adds 128 to each: one factor has to be unsigned.
      __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(from), offset);
      for (int m = 0; m < kCount; ++m) {
        int64_t at = k + line * kCacheLine;
        high[m][line] = _mm512_dpbusd_epi32(high[m][line], weights,
                                            _mm512_loadu_si512(inputs[m].high.data() + at));
        low[m][line] = _mm512_dpbusd_epi32(low[m][line], weights,
                                           _mm512_loadu_si512(inputs[m].low.data() + at));
      }
    }
  }
  for (int m = 0; m < kCount; ++m) {
    const Input& input = inputs[m];
    int64_t sum_of_high = 0, sum_of_low = 0;
    for (int line = 0; line < kLines; ++line) {
      sum_of_high += _mm512_reduce_add_epi32(high[m][line]);
      sum_of_low += _mm512_reduce_add_epi32(low[m][line]);
    }
    for (int64_t rest = k; rest < depth; ++rest) {
      sum_of_high += (row[rest] + 128) * input.high[rest];
      sum_of_low += (row[rest] + 128) * input.low[rest];
    }
    sum_of_high -= int64_t{128} * input.sum_of_high;
    sum_of_low -= int64_t{128} * input.sum_of_low;
    products[m] = input.step * static_cast<float>(128 * sum_of_high + sum_of_low);
  }
#else
  dot<kCount>(row, inputs->x, depth, products);
#endif
}

// index[M], product[M]: -1 and -infinity where no row is allowed or a product is no number.
inline void most_probable(xla::ffi::ThreadPool& pool, const ScreenedTable& table, const float* x,
                          int64_t num_inputs, int32_t* index, float* product) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  int64_t num_units = (table.num_rows + kUnitRows - 1) / kUnitRows;
  std::vector<Input> inputs;
  for (int64_t m = 0; m < num_inputs; ++m) inputs.emplace_back(x + m * table.depth, table.depth);
  auto bound = [&](const Input& input, int64_t row) {
    return input.norm * table.uncertainty[row] + input.uncertainty * table.scales[row];
  };
  static thread_local Scratch scratch;
  float* approximate = scratch.floats(num_inputs * (table.num_rows + num_units));
  float* best_of_unit = approximate + num_inputs * table.num_rows;  // [units, M] of lower bounds
  auto rows_of = [&](int64_t unit) {
    return std::pair{unit * kUnitRows, std::min((unit + 1) * kUnitRows, table.num_rows)};
  };
  run_units(pool, num_units, [&](int64_t unit) {
    float* best = best_of_unit + unit * num_inputs;
    std::fill_n(best, num_inputs, kLowest);
    auto [begin, end] = rows_of(unit);
    for (int64_t m = 0, count; m < num_inputs; m += count) {
      count = num_inputs - m >= kInputs ? kInputs : 1;
      auto multiply = count == 1 ? screen<1> : screen<kInputs>;
      for (int64_t row = begin; row < end; ++row) {
        float products[kInputs];
        multiply(table.values + row * table.depth, &inputs[m], table.depth, products);
        for (int64_t i = 0; i < count; ++i) {
          float value = products[i] * table.scales[row];
          approximate[(m + i) * table.num_rows + row] = value;
          float lower = value - bound(inputs[m + i], row);
          if (table.allowed[row]) best[m + i] = std::max(best[m + i], lower);
        }
      }
    }
  });
  std::vector<float> threshold(num_inputs, kLowest);
  for (int64_t unit = 0; unit < num_units; ++unit) {
    for (int64_t m = 0; m < num_inputs; ++m) {
      threshold[m] = std::max(threshold[m], best_of_unit[unit * num_inputs + m]);
    }
  }
  std::vector<int32_t> index_of_unit(num_units * num_inputs, -1);
  run_units(pool, num_units, [&](int64_t unit) {
    auto [begin, end] = rows_of(unit);
    for (int64_t m = 0; m < num_inputs; ++m) {
      float best = kLowest;
      const float* input = x + m * table.depth;
      for (int64_t row = begin; row < end; ++row) {
        float upper = approximate[m * table.num_rows + row] + bound(inputs[m], row);
        if (!table.allowed[row] || !(upper >= threshold[m])) continue;
        float exact;
        dot<1>(table.rows + row * table.depth, input, table.depth, &exact);
        if (exact > best) {
          best = exact;
          index_of_unit[unit * num_inputs + m] = static_cast<int32_t>(row);
        }
      }
      best_of_unit[unit * num_inputs + m] = best;
    }
  });
  for (int64_t m = 0; m < num_inputs; ++m) {
    index[m] = -1;
    product[m] = kLowest;
    for (int64_t unit = 0; unit < num_units; ++unit) {
      float best = best_of_unit[unit * num_inputs + m];
      if (best > product[m]) {
        product[m] = best;
        index[m] = index_of_unit[unit * num_inputs + m];
      }
    }
  }
}

}  // namespace grok1
