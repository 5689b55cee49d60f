// Products of float32 rows with some weight rows that are copied to the first-level cache first.
//
// More input rows than registers hold sums for read the weight several times. In a large matrix
// the lines of one column share few places of a cache, where each other's are lost between two
// reads; in a copy they lie side by side, and every line of the matrix is touched once.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace grok1 {

constexpr int64_t kNearDepth = 32;      // weight rows of a copy
constexpr int64_t kNearColumns = 2048;  // most columns of one

// Fetches runs of memory that are `stride` apart, a cache line at a time.
struct Fetcher {
  const int8_t* row;
  int64_t stride, run, column = 0;

  void fetch() {
    // An address past the weight's end is harmless: a prefetch does not fault.
    __builtin_prefetch(row + column, 0, 2);
    column += kCacheLine;
    if (column >= run) {
      column = 0;
      row += stride;
    }
  }
};

// near[strips, depth, kCacheLine] = `width` columns of weight rows, in strips of a line; what is
// beyond them is zero.
inline void copy_near(const int8_t* from, int64_t stride, int64_t depth, int64_t width,
                      int8_t* near) {
  for (int64_t k = 0; k < depth; ++k, from += stride) {
    int8_t* to = near + k * kCacheLine;
    int64_t column = 0;
    for (; column + kCacheLine <= width; column += kCacheLine, to += depth * kCacheLine) {
      std::memcpy(to, from + column, kCacheLine);
    }
    if (column < width) {
      std::memset(to, 0, kCacheLine);
      std::memcpy(to, from + column, width - column);
    }
  }
}

// sums[kRows, kCacheLine] += x @ strip[depth, kCacheLine]; x[k * x_stride + m] is row m's number
// for weight row k. If asked to, fetches meanwhile.
template <int kRows>
void multiply_strip(const int8_t* strip, int64_t depth, const float* x, int64_t x_stride,
                    float* sums, int64_t sums_stride, bool fetches, Fetcher& fetcher) {
  // A copy: the caller's would be written to memory at every step.
  Fetcher ahead = fetcher;
  for (int64_t column = 0; column < kCacheLine; column += kTileColumns) {
    Floats sum[kRows][kTileVectors];
    // Unrolled by name: otherwise compilers keep the sums in memory before and after the loop.
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        sum[m][v] = load(sums + m * sums_stride + column + v * kLanes);
      }
    }
    const int8_t* row = strip + column;
    const float* numbers = x;
    auto multiply_row = [&]() __attribute__((always_inline)) {
      Floats weight[kTileVectors];
      load(row, weight);
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          sum[m][v] = multiply_add(weight[v], numbers[m], sum[m][v]);
        }
      }
      row += kCacheLine;
      numbers += x_stride;
    };
    constexpr int64_t kRowsOfLine = kCacheLine / kTileColumns;
    int64_t k = 0;
    for (; k + kRowsOfLine <= depth; k += kRowsOfLine) {
      if (fetches) ahead.fetch();
      // Not unrolled: registers that hold the sums would not be enough.
#pragma GCC unroll 1
      for (int i = 0; i < kRowsOfLine; ++i) multiply_row();
    }
    for (; k < depth; ++k) multiply_row();
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        store_floats(sums + m * sums_stride + column + v * kLanes, sum[m][v]);
      }
    }
  }
  fetcher = ahead;
}

}  // namespace grok1
