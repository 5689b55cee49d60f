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

// index[M], product[M]: -1 and -infinity where no row is allowed or a product is no number.
inline void most_probable(xla::ffi::ThreadPool& pool, const ScreenedTable& table, const float* x,
                          int64_t num_inputs, int32_t* index, float* product) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  int64_t num_units = (table.num_rows + kUnitRows - 1) / kUnitRows;
  std::vector<float> norms(num_inputs);
  for (int64_t m = 0; m < num_inputs; ++m) {
    double sum = 0;
    for (int64_t k = 0; k < table.depth; ++k) {
      sum += static_cast<double>(x[m * table.depth + k]) * x[m * table.depth + k];
    }
    norms[m] = static_cast<float>(std::sqrt(sum) * (1 + 1e-6));
  }
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
      auto multiply = count == 1 ? dot<1, int8_t> : dot<kInputs, int8_t>;
      for (int64_t row = begin; row < end; ++row) {
        float products[kInputs];
        multiply(table.values + row * table.depth, x + m * table.depth, table.depth, products);
        for (int64_t i = 0; i < count; ++i) {
          float value = products[i] * table.scales[row];
          approximate[(m + i) * table.num_rows + row] = value;
          float lower = value - norms[m + i] * table.uncertainty[row];
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
        float upper =
            approximate[m * table.num_rows + row] + norms[m] * table.uncertainty[row];
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
