// Products of float32 rows with all rows of a float32 table, on all threads.
//
// A product has the same bits whatever rows come with it: the same additions in the same order for
// one row, where the time is that of reading the table, and for many, where it is that of arithmetic.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace grok1 {

constexpr int kProductRows = 6;            // most rows whose sums, by two of the table, are in registers
constexpr int64_t kTableRows = 64;         // of a unit
constexpr int64_t kProductDepth = 1024;    // floats of a row that stay in the first-level cache
constexpr int64_t kMostProductRows = 96;   // rows of a pass, whose sums stay in the second

// sums[kRows, kColumns, kLanes] += x * table, lane by lane, over `depth` numbers; their rows are
// `x_stride` and `table_stride` apart, those of the sums kTableRows vectors.
template <int kRows, int kColumns>
__attribute__((noinline)) void add_products(const float* x, int64_t x_stride, const float* table,
                                            int64_t table_stride, int64_t depth, Floats* sums) {
  Floats sum[kRows][kColumns];
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) sum[m][v] = sums[m * kTableRows + v];
  }
  auto add = [&](auto load_floats) __attribute__((always_inline)) {
    Floats row[kColumns];
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      row[v] = load_floats(table + v * table_stride);
      hold(row[v]);
    }
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      Floats number = load_floats(x + m * x_stride);
      hold(number);
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) sum[m][v] = multiply_add(number, row[v], sum[m][v]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes, x += kLanes, table += kLanes) {
    add([](const float* from) { return load(from); });
  }
  if (k < depth) {
    add([&](const float* from) {
      Floats floats{};
      std::memcpy(&floats, from, (depth - k) * sizeof(float));
      return floats;
    });
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) sums[m * kTableRows + v] = sum[m][v];
  }
}

template <int kRows>
void add_products_of(const float* x, int64_t x_stride, const float* table, int64_t table_stride,
                     int64_t depth, int64_t count, Floats* sums) {
  // One chain of additions is slow: of few rows there are more of the table side by side.
  constexpr int kColumns = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;
  int64_t v = 0;
  for (; v + kColumns <= count; v += kColumns) {
    add_products<kRows, kColumns>(x, x_stride, table + v * table_stride, table_stride, depth,
                                  sums + v);
  }
  for (; v < count; ++v) {
    add_products<kRows, 1>(x, x_stride, table + v * table_stride, table_stride, depth, sums + v);
  }
}

constexpr decltype(&add_products_of<1>) kAddProducts[kProductRows + 1] = {
    nullptr,            add_products_of<1>, add_products_of<2>, add_products_of<3>,
    add_products_of<4>, add_products_of<5>, add_products_of<6>};

// The depth is cut in four, which are added up each for itself and then in order, so that one product
// alone need not wait for each of its additions.
constexpr int kQuarters = 4;

inline int64_t quarter_of(int64_t depth) {
  return (depth + kQuarters * kLanes - 1) / (kQuarters * kLanes) * kLanes;
}

// One product of those of `table_products`.
inline float table_product(const float* x, const float* row, int64_t depth) {
  const int64_t quarter = quarter_of(depth);
  const int64_t common = std::max<int64_t>(0, depth - (kQuarters - 1) * quarter) / kLanes * kLanes;
  Floats sums[kQuarters] = {};
  for (int64_t k = 0; k < common; k += kLanes) {
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q) {
      const int64_t at = q * quarter + k;
      sums[q] = multiply_add(load(x + at), load(row + at), sums[q]);
    }
  }
  for (int q = 0; q < kQuarters; ++q) {
    const int64_t at = q * quarter + common, end = std::min(depth, (q + 1) * quarter);
    if (at < end) add_products<1, 1>(x + at, 0, row + at, 0, end - at, &sums[q]);
  }
  return sum_of(((sums[0] + sums[1]) + sums[2]) + sums[3]);
}

// out[num_rows, table_size] = x[num_rows, depth] @ table[table_size, depth] transposed
inline void table_products(xla::ffi::ThreadPool& pool, const float* x, const float* table,
                           int64_t num_rows, int64_t table_size, int64_t depth, float* out) {
  const int64_t quarter = quarter_of(depth);
  run_units(pool, (table_size + kTableRows - 1) / kTableRows, [&](int64_t unit) {
    static thread_local std::vector<Floats> sums, totals;
    const int64_t first = unit * kTableRows, count = std::min(kTableRows, table_size - first);
    for (int64_t pass = 0; pass < num_rows; pass += kMostProductRows) {
      const int64_t rows = std::min(kMostProductRows, num_rows - pass);
      totals.assign(rows * kTableRows, Floats{});
      for (int64_t begin = 0; begin < depth; begin += quarter) {
        const int64_t end = std::min(depth, begin + quarter);
        sums.assign(rows * kTableRows, Floats{});
        for (int64_t k = begin; k < end; k += kProductDepth) {
          for (int64_t m = 0; m < rows; m += kProductRows) {
            kAddProducts[std::min<int64_t>(kProductRows, rows - m)](
                x + (pass + m) * depth + k, depth, table + first * depth + k, depth,
                std::min(kProductDepth, end - k), count, sums.data() + m * kTableRows);
          }
        }
        for (size_t i = 0; i < sums.size(); ++i) totals[i] += sums[i];
      }
      for (int64_t m = 0; m < rows; ++m) {
        float* to = out + (pass + m) * table_size + first;
        for (int64_t v = 0; v < count; ++v) to[v] = sum_of(totals[m * kTableRows + v]);
      }
    }
  });
}

}  // namespace grok1
