// The residual stream's norms and sums of rows, on all threads.
//
// A row's result has the same bits whatever rows come with it: where XLA makes these, how it sums a
// row depends on how many there are.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"
#include "vectors.h"

namespace grok1 {

constexpr int64_t kNormedRowsOfUnit = 4;

// The root of the mean square of row[width] plus epsilon.
inline float root_mean_square(const float* row, int64_t width, float epsilon) {
  constexpr int kSums = 4;  // side by side: an addition waits for the one before
  Floats sums[kSums] = {};
  int64_t column = 0;
  for (; column + kSums * kLanes <= width; column += kSums * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      Floats x = load(row + column + i * kLanes);
      sums[i] += x * x;
    }
  }
  for (; column < width; column += kLanes) {
    Floats x{};
    std::memcpy(&x, row + column, std::min<int64_t>(kLanes, width - column) * sizeof(float));
    sums[0] += x * x;
  }
  return std::sqrt(sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) / width + epsilon);
}

// out = (x if there is one) + norm of `branch` * scale, all [num_rows, width].
inline void add_norm(xla::ffi::ThreadPool& pool, const float* x, const float* branch,
                     const float* scale, int64_t num_rows, int64_t width, float epsilon,
                     float* out) {
  const int64_t num_units = (num_rows + kNormedRowsOfUnit - 1) / kNormedRowsOfUnit;
  run_units(pool, num_units, [&](int64_t unit) {
    const int64_t first = unit * kNormedRowsOfUnit;
    for (int64_t m = first; m < std::min(num_rows, first + kNormedRowsOfUnit); ++m) {
      const float* row = branch + m * width;
      const float root = root_mean_square(row, width, epsilon);
      float* to = out + m * width;
      const float* before = x == nullptr ? nullptr : x + m * width;
      int64_t column = 0;
      for (; column + kLanes <= width; column += kLanes) {
        Floats normed = load(row + column) / root * load(scale + column);
        // Rounded before it is added: where a trace wants the norm, XLA adds it.
        hold(normed);
        store_floats(to + column, before == nullptr ? normed : load(before + column) + normed);
      }
      for (; column < width; ++column) {
        Floats normed = Floats{} + row[column] / root * scale[column];
        hold(normed);
        to[column] = before == nullptr ? normed[0] : before[column] + normed[0];
      }
    }
  });
}

}  // namespace grok1
