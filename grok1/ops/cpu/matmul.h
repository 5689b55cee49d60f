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

// Few rows: the matrix is cut into panels of columns, and those into slots of rows, whose sums the
// thread that finishes a panel adds up in order.
template <typename Matrix>
void matmul_few(xla::ffi::ThreadPool& pool, const Matrix& matrix, const float* x,
                       int64_t num_rows, float* out) {
  static thread_local Scratch scratch;
  int64_t panel = panel_for(num_rows);
  int64_t num_panels = (matrix.columns + panel - 1) / panel;
  int64_t wanted_slots = (kUnits + num_panels - 1) / num_panels;
  int64_t most_slots = matrix.depth * std::min(panel, matrix.columns) / kUnitBytes;
  int64_t num_slots = std::max<int64_t>(1, std::min(wanted_slots, most_slots));
  int64_t size = num_rows * matrix.columns;
  float* packed = scratch.floats(num_rows * matrix.depth + (num_slots - 1) * size);
  float* partial = packed + num_rows * matrix.depth;
  pack_rows([&](int64_t m) { return x + m * matrix.depth; }, num_rows, matrix.depth, packed);
  auto slots_done = std::make_unique<std::atomic<int64_t>[]>(num_panels);
  run_units(pool, num_panels * num_slots, [&](int64_t unit) {
    int64_t slot = unit % num_slots, column = unit / num_slots * panel;
    int64_t width = std::min(panel, matrix.columns - column);
    int64_t begin = matrix.depth * slot / num_slots, end = matrix.depth * (slot + 1) / num_slots;
    float* slot_out = slot == 0 ? out : partial + (slot - 1) * size;
    multiply_few(matrix, begin, end, column, width, packed + begin * num_rows, num_rows, false,
                 slot_out + column, matrix.columns);
    auto& done = slots_done[unit / num_slots];
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < num_slots) return;
    for (int64_t other = 0; other < num_slots - 1; ++other) {
      for (int64_t m = 0; m < num_rows; ++m) {
        int64_t start = m * matrix.columns + column;
        for (int64_t c = 0; c < width; ++c) out[start + c] += partial[other * size + start + c];
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
    run_units(pool, num_blocks(rows),
              [&](int64_t block) { pack_block(row, rows, block, matrix.depth, packed); });
    int64_t num_panels = (matrix.columns + kManyColumns - 1) / kManyColumns;
    run_units(pool, num_panels, [&](int64_t unit) {
      int64_t column = unit * kManyColumns;
      multiply(matrix, 0, matrix.depth, column, std::min(kManyColumns, matrix.columns - column),
               packed, matrix.depth, rows, false, out + first * matrix.columns + column,
               matrix.columns);
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
