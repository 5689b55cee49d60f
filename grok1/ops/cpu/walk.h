// Products of a few float32 rows with some weight rows that are read side by side.
//
// The sums of several columns are in registers while all the weight rows are multiplied; the fewer
// the input rows, the more columns: what a step costs beside its products is shared by them.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace grok1 {

// Vectors of a weight row that are walked at a time, for as many sums as registers hold.
constexpr int walked_vectors(int num_rows) {
  if (kTileColumns == kCacheLine) return kTileVectors;
  return num_rows == 1 ? 8 : num_rows <= 3 ? 4 : kTileVectors;
}

// Weight rows that lie `stride` apart, and how those are fetched that are `ahead` of them: in the
// order of memory, or as they will be walked.
struct Walk {
  const int8_t* values;
  int64_t stride, count, ahead;
  bool in_order;
};

// Where the next line to be fetched is.
struct Ahead {
  const int8_t* row;
  int64_t column = 0;
};

// sums[kRows, from `column` to `width`] += x @ values for as many columns as whole steps of
// kVectors take; returns the end of these.
template <int kRows, int kVectors>
int64_t walk_columns(const Walk& walk, int64_t column, int64_t width, const float* x,
                     int64_t x_stride, float* sums, Ahead& ahead) {
  constexpr int64_t kColumns = kVectors * kLanes;
  // Copies: what the sums are stored to might be these.
  const int64_t stride = walk.stride, count = walk.count;
  const int64_t next_step = walk.in_order ? kColumns : stride;
  const int64_t next_columns = walk.in_order ? count * kColumns : kColumns;
  const int8_t *values = walk.values, *next_row = ahead.row;
  int64_t next_column = ahead.column;
  for (; column + kColumns <= width; column += kColumns) {
    Floats sum[kRows][kVectors];
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[m][v] = load(sums + m * width + column + v * kLanes);
      }
    }
    const int8_t *row = values + column, *next = next_row + next_column;
    const float* numbers = x;
    for (int64_t k = 0; k < count; ++k, row += stride, numbers += x_stride, next += next_step) {
      // To the second-level cache, which waits for more lines at a time than the first. An address
      // past the weight's end is harmless: a prefetch does not fault.
      __builtin_prefetch(next, 0, 2);
      if constexpr (kVectors > kTileVectors) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v += kLoadedVectors) {
          Floats weight[kLoadedVectors];
          load(row + v * kLanes, weight);
#pragma GCC unroll 4
          for (int i = 0; i < kLoadedVectors; ++i) {
#pragma GCC unroll 3
            for (int m = 0; m < kRows; ++m) {
              sum[m][v + i] = multiply_add(weight[i], numbers[m], sum[m][v + i]);
            }
          }
        }
      } else {
        Floats weight[kVectors];
        load(row, weight);
        for (int m = 0; m < kRows; ++m) {
          for (int v = 0; v < kVectors; ++v) {
            sum[m][v] = multiply_add(weight[v], numbers[m], sum[m][v]);
          }
        }
      }
    }
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        store_floats(sums + m * width + column + v * kLanes, sum[m][v]);
      }
    }
    for (next_column += next_columns; next_column >= width; next_column -= width) {
      next_row += stride;
    }
  }
  ahead = {next_row, next_column};
  return column;
}

// sums[kRows, width] += x @ values. x[k * x_stride + m] is row m's number for weight row k.
template <int kRows>
void walk_rows(const Walk& walk, int64_t width, const float* x, int64_t x_stride, float* sums) {
  Ahead ahead{walk.values + walk.ahead * walk.stride};
  int64_t column = walk_columns<kRows, walked_vectors(kRows)>(walk, 0, width, x, x_stride, sums,
                                                              ahead);
  column = walk_columns<kRows, kTileVectors>(walk, column, width, x, x_stride, sums, ahead);
  for (int64_t k = 0; k < walk.count && column < width; ++k) {
    for (int m = 0; m < kRows; ++m) {
      for (int64_t c = column; c < width; ++c) {
        float& sum = sums[m * width + c];
        sum = multiply_add(x[k * x_stride + m], walk.values[k * walk.stride + c], sum);
      }
    }
  }
}

}  // namespace grok1
