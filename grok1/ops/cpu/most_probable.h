// The row of a float32 table [V, D] with the largest product, for each input row [M, D], without
// reading the whole table: only rows whose upper bound reaches the best lower bound can be the
// largest, and their float32 products decide. The answer is that of the float32 table, ties to the
// lower row.

#pragma once

#include "screen.h"

namespace grok1 {

// index[M], product[M]: -1 and -infinity where no row is allowed; NaN where a row, allowed or not,
// or the input is no number.
inline void most_probable(xla::ffi::ThreadPool& pool, const ScreenedTable& table, const float* x,
                          int64_t num_inputs, int32_t* index, float* product) {
  const Screened found = screened(pool, table, x, num_inputs);
  const int64_t num_units = table.num_units();
  std::vector<int32_t> index_of_unit(num_units * num_inputs, -1);
  std::vector<float> best_of_unit(num_units * num_inputs, kLowest);
  run_units(pool, num_units, [&](int64_t unit) {
    auto [begin, end] = table.unit(unit);
    for (int64_t m = 0; m < num_inputs; ++m) {
      float best = kLowest;
      const float* upper = found.upper + m * table.num_rows;
      const bool* allowed = table.allowed + m * table.allowed_stride;
      for (int64_t row = begin; row < end; ++row) {
        // A bound that is no number is of a product that may be none.
        if (upper[row] < found.lower[m] || !allowed[row]) continue;
        float exact = table.product(row, x + m * table.depth);
        if (exact > best || std::isnan(exact)) {
          best = exact;
          index_of_unit[unit * num_inputs + m] = static_cast<int32_t>(row);
        }
      }
      best_of_unit[unit * num_inputs + m] = best;
    }
  });
  for (int64_t m = 0; m < num_inputs; ++m) {
    index[m] = -1;
    product[m] = std::isnan(found.lower[m]) ? found.lower[m] : kLowest;
    for (int64_t unit = 0; unit < num_units; ++unit) {
      float best = best_of_unit[unit * num_inputs + m];
      if (best > product[m] || std::isnan(best)) {
        product[m] = best;
        index[m] = index_of_unit[unit * num_inputs + m];
      }
    }
  }
}

}  // namespace grok1
