// out[M, N] = x[M, K] @ weight[K, N], on all threads.

#pragma once

#include "int4.h"
#include "product.h"
#include "threads.h"

namespace grok1 {

constexpr int64_t kUnits = 32;             // units to have, where the matrix is large enough
constexpr int64_t kUnitBytes = 1 << 19;    // least weight of a unit
constexpr int64_t kManyColumns = 256;      // columns of a unit when rows are many
constexpr int64_t kRowsOfPass = 32 * kMaxRows;  // rows whose sums stay in the second-level cache

// Segments of a matrix, where it is large enough.
constexpr int64_t kSegments = 16;

template <typename Matrix>
int64_t segment_of(const Matrix& matrix) {
  const int64_t most = matrix.depth * matrix.columns / kUnitBytes;
  return segment_depth(matrix.depth, std::clamp<int64_t>(most, 1, kSegments));
}

// Few rows: the matrix is cut into panels of columns, and those into segments, whose sums the
// thread that finishes a panel adds up in order.
template <typename Matrix>
void matmul_few(xla::ffi::ThreadPool& pool, const Matrix& matrix, const float* x,
                       int64_t num_rows, float* out) {
  static thread_local Scratch scratch;
  const int64_t segment = segment_of(matrix);
  const int64_t num_segments = std::max<int64_t>(1, (matrix.depth + segment - 1) / segment);
  const int64_t wanted = (kUnits + num_segments - 1) / num_segments;
  const int64_t narrow = whole_lines(std::max(matrix.columns / wanted, kUnitBytes / segment));
  const int64_t panel = std::min(panel_for(num_rows), narrow);
  const int64_t num_panels = (matrix.columns + panel - 1) / panel;
  const int64_t size = num_rows * matrix.columns;
  float* packed = scratch.floats(num_rows * matrix.depth + (num_segments - 1) * size);
  float* sums = packed + num_rows * matrix.depth;
  pack_rows([&](int64_t m) { return x + m * matrix.depth; }, num_rows, matrix.depth, packed);
  prepare(matrix, packed, num_rows, matrix.depth);
  auto num_done = std::make_unique<std::atomic<int64_t>[]>(num_panels);
  run_units(pool, num_panels * num_segments, [&](int64_t unit) {
    const int64_t number = unit % num_segments, column = unit / num_segments * panel;
    const int64_t width = std::min(panel, matrix.columns - column), begin = number * segment;
    float* to = number == 0 ? out : sums + (number - 1) * size;
    multiply_few(matrix, begin, std::min(matrix.depth, begin + segment), column, width,
                 packed + begin * num_rows, num_rows, to + column, matrix.columns);
    auto& done = num_done[unit / num_segments];
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < num_segments) return;
    for (int64_t other = 0; other < num_segments - 1; ++other) {
      for (int64_t m = 0; m < num_rows; ++m) {
        const int64_t start = m * matrix.columns + column;
        for (int64_t c = 0; c < width; ++c) out[start + c] += sums[other * size + start + c];
      }
    }
  }, matrix.stream());
}

template <typename Matrix>
void matmul_many(xla::ffi::ThreadPool& pool, const Matrix& matrix, const float* x,
                        int64_t num_rows, float* out) {
  static thread_local Scratch scratch;
  float* packed = scratch.floats(std::min(num_rows, kRowsOfPass) * matrix.depth);
  for (int64_t first = 0; first < num_rows; first += kRowsOfPass) {
    int64_t rows = std::min(kRowsOfPass, num_rows - first);
    auto row = [&](int64_t m) { return x + (first + m) * matrix.depth; };
    run_units(pool, num_blocks(rows), [&](int64_t block) {
      pack_block(row, rows, block, matrix.depth, packed);
      prepare(matrix, packed + block * kMaxRows * matrix.depth, rows_of_block(rows, block),
              matrix.depth);
    });
    int64_t num_panels = (matrix.columns + kManyColumns - 1) / kManyColumns;
    run_units(pool, num_panels, [&](int64_t unit) {
      static thread_local Scratch sums;
      const int64_t column = unit * kManyColumns;
      const int64_t width = std::min(kManyColumns, matrix.columns - column);
      multiply(matrix, segment_of(matrix), column, width, Packed{packed, rows, matrix.depth},
               sums.floats(rows * width), out + first * matrix.columns + column, matrix.columns);
    });
  }
}

template <typename Matrix>
void matmul(xla::ffi::ThreadPool& pool, const Matrix& matrix, const float* x,
                   int64_t num_rows, float* out) {
  if (num_rows == 0 || matrix.columns == 0) return;
  const bool are_few = num_rows <= most_few(matrix);
  (are_few ? matmul_few<Matrix> : matmul_many<Matrix>)(pool, matrix, x, num_rows, out);
}

}  // namespace grok1
