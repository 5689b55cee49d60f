// Products of float32 rows with a rectangle of an int8 matrix, on one thread.
//
// Few rows: the time is that of reading the weight once, so weight rows are walked side by side, in
// runs long enough for the memory bus, and each cache line is fetched one block ahead of its use.
// Some more: the same from a copy of these rows, see near.h.
// Many rows: the time is that of arithmetic, so a tile of the weight is converted to float once, in
// the first-level cache, and multiplied by all rows from there.

#pragma once

#include <algorithm>
#include <cstdint>

#include "forecast.h"
#include "near.h"
#include "vectors.h"

namespace grok1 {

// Most input rows whose sums, for one tile's width, stay in registers beside the weight.
constexpr int kMaxRows = 6;

// Most input rows for which the weight is walked; of more than kMaxRows in two halves.
constexpr int kFewRows = 2 * kMaxRows;

// Most input rows of a product with copies of weight rows, see near.h.
constexpr int kMostCopied = 4 * kMaxRows;

// Vectors that take a whole line at a time use it up at once.
constexpr bool is_copied(int64_t num_rows) {
  return num_rows > kMaxRows && kTileColumns < kCacheLine;
}

constexpr int64_t kTileDepth = 128;  // as float32 32 KiB with 64 columns

// Columns whose sums stay near while weight rows are walked; the processor fetches past the end of
// a run of memory, so the longer the runs the better.
constexpr int64_t panel_for(int64_t num_rows) {
  if (is_copied(num_rows)) return num_rows <= kMostCopied / 2 ? kNearColumns : kNearColumns / 2;
  return num_rows <= 2 ? 8192 : num_rows <= 4 ? 4096 : num_rows <= kMaxRows ? 2048 : 1024;
}

// Rows times columns of a panel, up to whole lines.
constexpr int64_t kMostSums = std::max<int64_t>(2 * 8192, kMostCopied / 2 * kNearColumns);

// Weight rows, of `columns` columns, walked side by side: the sums, which are more for more input
// rows, are loaded and stored once for all of them.
constexpr int64_t walked_for(int64_t num_rows, int64_t columns) {
  if (is_copied(num_rows)) return kNearDepth;
  // Lines that take several vectors stay in the first-level cache meanwhile, which has eight places
  // for those that are a multiple of 4 KiB apart, as they are in wide matrices.
  if (kTileColumns < kCacheLine && num_rows <= 4 && columns > panel_for(num_rows)) return 8;
  return num_rows <= 2 ? 8 : num_rows <= 4 ? 16 : 32;
}

struct Int8Matrix {
  const int8_t* values;    // [depth, columns]
  const uint16_t* scales;  // [groups, columns], bfloat16
  int64_t depth, columns, depth_of_group;

  Stream stream() const {
    return {reinterpret_cast<const char*>(values), depth * columns};
  }

  const uint16_t* scales_at(int64_t k) const { return scales + k / depth_of_group * columns; }
};

// Most input rows that multiply_few takes.
constexpr int64_t most_few(const Int8Matrix&) {
  return is_copied(kMostCopied) ? kMostCopied : kFewRows;
}

// Matrix `number` of a stack.
inline Int8Matrix matrix_of(const int8_t* values, const uint16_t* scales, int64_t number,
                        int64_t depth, int64_t columns, int64_t num_groups) {
  return {values + number * depth * columns, scales + number * num_groups * columns, depth, columns,
          depth / num_groups};
}

// Many input rows are packed in blocks of up to kMaxRows, each transposed, [depth, rows of the
// block]: block b begins at kMaxRows * b * depth, and only the last is smaller.
inline int64_t num_blocks(int64_t num_rows) { return (num_rows + kMaxRows - 1) / kMaxRows; }

inline int64_t rows_of_block(int64_t num_rows, int64_t block) {
  return std::min<int64_t>(kMaxRows, num_rows - block * kMaxRows);
}

// packed[depth, num_rows]: `row(m)` points at row m's `depth` floats.
template <typename Row>
void pack_rows(Row row, int64_t num_rows, int64_t depth, float* packed) {
  for (int64_t m = 0; m < num_rows; ++m) {
    const float* from = row(m);
    for (int64_t k = 0; k < depth; ++k) packed[k * num_rows + m] = from[k];
  }
}

// Packs block `block` of `num_rows` rows.
template <typename Row>
void pack_block(Row row, int64_t num_rows, int64_t block, int64_t depth, float* packed) {
  auto of_block = [&](int64_t m) { return row(block * kMaxRows + m); };
  pack_rows(of_block, rows_of_block(num_rows, block), depth, packed + block * kMaxRows * depth);
}

// sums[kRows, width] += x @ values over `count` weight rows. x[k * x_stride + m] is row m's number
// for weight row k. The rows that are `ahead` of these are fetched: in the order of memory, or as
// they will be walked.
template <int kRows>
void walk_rows(const int8_t* values, int64_t stride, int64_t count, int64_t ahead, bool in_order,
               int64_t width, const float* x, int64_t x_stride, float* sums) {
  const int8_t* next_row = values + ahead * stride;
  const int64_t next_step = in_order ? kTileColumns : stride;
  int64_t next_column = 0, column = 0;
  for (; column + kTileColumns <= width; column += kTileColumns) {
    Floats sum[kRows][kTileVectors];
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < kTileVectors; ++v) {
        sum[m][v] = load(sums + m * width + column + v * kLanes);
      }
    }
    const int8_t *row = values + column, *next = next_row + next_column;
    const float* numbers = x;
    for (int64_t k = 0; k < count; ++k, row += stride, numbers += x_stride, next += next_step) {
      // To the second-level cache, which waits for more lines at a time than the first. An address
      // past the weight's end is harmless: a prefetch does not fault.
      __builtin_prefetch(next, 0, 2);
      Floats weight[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) weight[v] = load(row + v * kLanes);
      for (int m = 0; m < kRows; ++m) {
        for (int v = 0; v < kTileVectors; ++v) sum[m][v] += weight[v] * numbers[m];
      }
    }
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < kTileVectors; ++v) {
        store_floats(sums + m * width + column + v * kLanes, sum[m][v]);
      }
    }
    next_column += in_order ? count * kTileColumns : kTileColumns;
    for (; next_column >= width; next_column -= width) next_row += stride;
  }
  for (int64_t k = 0; k < count && column < width; ++k) {
    for (int m = 0; m < kRows; ++m) {
      for (int64_t c = column; c < width; ++c) {
        sums[m * width + c] += x[k * x_stride + m] * values[k * stride + c];
      }
    }
  }
}

using WalkRows = void (*)(const int8_t*, int64_t, int64_t, int64_t, bool, int64_t, const float*,
                          int64_t, float*);

constexpr WalkRows kWalkRows[kMaxRows + 1] = {
    nullptr,      walk_rows<1>, walk_rows<2>, walk_rows<3>,
    walk_rows<4>, walk_rows<5>, walk_rows<6>};

constexpr decltype(&multiply_strip<1>) kMultiplyStrip[kMaxRows + 1] = {
    nullptr,           multiply_strip<1>, multiply_strip<2>, multiply_strip<3>,
    multiply_strip<4>, multiply_strip<5>, multiply_strip<6>};

// sums[num_rows, strips of kCacheLine] += x[depth, num_rows] @ values over `depth` weight rows and
// `width` columns, by a copy.
inline void multiply_copied(const int8_t* values, int64_t stride, int64_t depth, int64_t width,
                            const float* x, int64_t num_rows, float* sums, Fetcher& fetcher) {
  alignas(kCacheLine) static thread_local int8_t near[kNearDepth * kNearColumns];
  copy_near(values, stride, depth, width, near);
  const int64_t passes = num_blocks(num_rows);
  const int64_t padded = (width + kCacheLine - 1) / kCacheLine * kCacheLine;
  for (int64_t column = 0; column < width; column += kCacheLine) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t m = num_rows * pass / passes, end = num_rows * (pass + 1) / passes;
      kMultiplyStrip[end - m](near + column * depth, depth, x + m, num_rows,
                              sums + m * padded + column, padded, pass == 0, fetcher);
    }
  }
}

// out[num_rows, width] = (add ? out : 0) + x @ weight over weight rows `begin` to `end` and `width`
// columns from `column` on, for at most most_few(matrix) rows. x is [depth, num_rows] from weight
// row `begin` on.
inline void multiply_few(const Int8Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                         int64_t width, const float* x, int64_t num_rows, bool add, float* out,
                         int64_t out_stride) {
  const int64_t panel_columns = panel_for(num_rows), walked = walked_for(num_rows, matrix.columns);
  const int64_t half = num_rows <= kMaxRows ? num_rows : (num_rows + 1) / 2;
  if (begin == end && !add) {
    for (int64_t m = 0; m < num_rows; ++m) std::fill_n(out + m * out_stride, width, 0.0f);
  }
  alignas(kCacheLine) float sums[kMostSums];
  for (int64_t first = 0; first < width; first += panel_columns) {
    const int64_t panel = std::min(panel_columns, width - first);
    const int64_t unit = is_copied(num_rows) ? kCacheLine : 1;
    const int64_t row_of_sums = (panel + unit - 1) / unit * unit;
    const int8_t* panel_values = matrix.values + column + first;
    bool add_panel = add;
    for (int64_t group_begin = begin, group_end; group_begin < end; group_begin = group_end) {
      group_end = std::min(end, (group_begin / matrix.depth_of_group + 1) * matrix.depth_of_group);
      std::fill_n(sums, num_rows * row_of_sums, 0.0f);
      for (int64_t k = group_begin; k < group_end; k += walked) {
        const int8_t* rows = panel_values + k * matrix.columns;
        const float* numbers = x + (k - begin) * num_rows;
        const int64_t count = std::min(walked, group_end - k);
        if (is_copied(num_rows)) {
          // Behind the last rows come the next columns of the first.
          Fetcher next{k + count < end ? rows + count * matrix.columns
                                       : panel_values + begin * matrix.columns + panel,
                       matrix.columns, panel};
          multiply_copied(rows, matrix.columns, count, panel, numbers, num_rows, sums, next);
          continue;
        }
        for (int64_t m = 0; m < num_rows; m += half) {
          kWalkRows[std::min(half, num_rows - m)](rows, matrix.columns, count, walked,
                                                  half == num_rows, panel, numbers + m, num_rows,
                                                  sums + m * row_of_sums);
        }
      }
      const uint16_t* scales = matrix.scales_at(group_begin) + column + first;
      for (int64_t m = 0; m < num_rows; ++m) {
        float* out_row = out + m * out_stride + first;
        for (int64_t c = 0; c < panel; ++c) {
          float scaled = sums[m * row_of_sums + c] * to_float(scales[c]);
          out_row[c] = add_panel ? out_row[c] + scaled : scaled;
        }
      }
      add_panel = true;
    }
  }
}

// tile[depth, kTileColumns] = weight rows `begin` to `begin + depth`, all of one scale group, and
// `width` columns; what is beyond them is zero.
inline void convert_tile(const Int8Matrix& matrix, int64_t begin, int64_t depth, int64_t column,
                         int64_t width, float* tile) {
  const int8_t* row = matrix.values + begin * matrix.columns + column;
  const uint16_t* scales = matrix.scales_at(begin) + column;
  alignas(kCacheLine) float scale[kTileColumns] = {};
  for (int64_t c = 0; c < width; ++c) scale[c] = to_float(scales[c]);
  for (int64_t k = 0; k < depth; ++k, row += matrix.columns, tile += kTileColumns) {
    if (width == kTileColumns) {
      for (int v = 0; v < kTileVectors; ++v) {
        store_floats(tile + v * kLanes,
                     load(row + v * kLanes) * load(scale + v * kLanes));
      }
    } else {
      for (int64_t c = 0; c < kTileColumns; ++c) tile[c] = c < width ? row[c] * scale[c] : 0.0f;
    }
  }
}

// out[kRows, kTileColumns] = (add ? out : 0) + x @ tile. x is packed. If there is a `next`, the
// weight rows there, those of the next tile, are fetched meanwhile.
template <int kRows>
void multiply_tile(const float* tile, int64_t depth, const float* x, bool add, float* out,
                   int64_t out_stride, const int8_t* next, int64_t next_stride) {
  // From zero: sums of sums lose fewer digits than one long sum.
  Floats sum[kRows][kTileVectors];
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sum[m][v] = Floats{};
  }
  auto multiply_row = [&]() __attribute__((always_inline)) {
    Floats weight[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      weight[v] = load(tile + v * kLanes);
      hold(weight[v]);
    }
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[m][v] += weight[v] * x[m];
    }
    tile += kTileColumns;
    x += kRows;
  };
  if (next) {
    for (int64_t k = 0; k < depth; ++k, next += next_stride) {
      __builtin_prefetch(next);
      multiply_row();
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) multiply_row();
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = out + m * out_stride + v * kLanes;
      store_floats(to, add ? load(to) + sum[m][v] : sum[m][v]);
    }
  }
}

using MultiplyTile = void (*)(const float*, int64_t, const float*, bool, float*, int64_t,
                              const int8_t*, int64_t);

constexpr MultiplyTile kMultiplyTile[kMaxRows + 1] = {
    nullptr,          multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
    multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

// out[num_rows, columns] = (add ? out : 0) + x @ tile, for many rows: x is packed in blocks,
// `x_depth` deep, and begins at weight row 0, the tile at weight row k. Meanwhile the rows at
// `next` are fetched.
inline void multiply_converted(const float* tile, int64_t k, int64_t depth, int64_t columns,
                               const float* x, int64_t x_depth, int64_t num_rows, bool add,
                               float* out, int64_t out_stride, const int8_t* next,
                               int64_t next_stride) {
  for (int64_t block = 0; block < num_blocks(num_rows); ++block, next = nullptr) {
    int64_t rows = rows_of_block(num_rows, block);
    const float* x_block = x + block * kMaxRows * x_depth + k * rows;
    float* out_block = out + block * kMaxRows * out_stride;
    if (columns == kTileColumns) {
      kMultiplyTile[rows](tile, depth, x_block, add, out_block, out_stride, next, next_stride);
      continue;
    }
    alignas(kCacheLine) float edge[kMaxRows * kTileColumns];
    kMultiplyTile[rows](tile, depth, x_block, false, edge, kTileColumns, next, next_stride);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t c = 0; c < columns; ++c) {
        float& sum = out_block[m * out_stride + c];
        sum = (add ? sum : 0.0f) + edge[m * kTileColumns + c];
      }
    }
  }
}

// As multiply_few, for many rows: x is packed in blocks, `x_depth` deep, and begins at
// weight row 0.
inline void multiply_many(const Int8Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                          int64_t width, const float* x, int64_t x_depth, int64_t num_rows,
                          bool add, float* out, int64_t out_stride) {
  alignas(kCacheLine) static thread_local float tile[kTileDepth * kTileColumns];
  for (int64_t k = begin, depth; k < end; k += depth) {
    int64_t group_end = (k / matrix.depth_of_group + 1) * matrix.depth_of_group;
    depth = std::min({kTileDepth, end - k, group_end - k});
    for (int64_t first = 0; first < width; first += kTileColumns) {
      int64_t columns = std::min(kTileColumns, width - first);
      convert_tile(matrix, k, depth, column + first, columns, tile);
      const int8_t* next = matrix.values + k * matrix.columns + column + first + kTileColumns;
      multiply_converted(tile, k, depth, columns, x, x_depth, num_rows, add || k > begin,
                         out + first, out_stride, next, matrix.columns);
    }
  }
}

// out[num_rows, width] = (add ? out : 0) + x @ weight over weight rows `begin` to `end` and `width`
// columns from `column` on. x is packed in blocks, `x_depth` deep, and begins at weight row 0.
template <typename Matrix>
void multiply(const Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                     int64_t width, const float* x, int64_t x_depth, int64_t num_rows, bool add,
                     float* out, int64_t out_stride) {
  if (num_rows <= kMaxRows) {
    multiply_few(matrix, begin, end, column, width, x + begin * num_rows, num_rows, add, out,
                 out_stride);
  } else {
    multiply_many(matrix, begin, end, column, width, x, x_depth, num_rows, add, out, out_stride);
  }
}

}  // namespace grok1
