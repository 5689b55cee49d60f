// Products of float32 rows with a rectangle of an int8 matrix, on one thread.
//
// Few rows: the time is that of reading the weight once, so weight rows are walked side by side, in
// runs long enough for the memory bus, and each cache line is fetched one block ahead of its use, see
// walk.h.
// Some more: the same from a copy of these rows, see near.h.
// Many rows: the time is that of arithmetic, so a tile of the weight is converted to float once, in
// the first-level cache, and multiplied by all rows from there.
//
// A row's result has the same bits whatever rows come with it. The depth is cut alike for all: into
// segments, each added up for itself, and those into runs of weight rows, whose sums begin at zero
// and are scaled as they are added. Columns may be cut in any way.

#pragma once

#include <algorithm>
#include <cstdint>

#include "forecast.h"
#include "near.h"
#include "vectors.h"
#include "walk.h"

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

// Most weight rows of a run; as float32 32 KiB with 64 columns.
constexpr int64_t kTileDepth = 128;

// Columns up to whole cache lines of a weight.
constexpr int64_t whole_lines(int64_t columns) {
  return (columns + kCacheLine - 1) / kCacheLine * kCacheLine;
}

// Weight rows of a segment where `count` of them are wanted: whole runs.
constexpr int64_t segment_depth(int64_t depth, int64_t count) {
  const int64_t runs = (depth + kTileDepth - 1) / kTileDepth;
  return std::max<int64_t>(1, (runs + count - 1) / count) * kTileDepth;
}

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

// Whether the processor keeps up with the rows that are walked, which it does where a whole line is
// taken at a time for few input rows: best if what is fetched beside them comes in the same order.
constexpr bool is_followed(int64_t num_rows) { return kTileColumns == kCacheLine && num_rows <= 4; }

struct Int8Matrix {
  const int8_t* values;    // [depth, columns]
  const uint16_t* scales;  // [groups, columns], bfloat16
  int64_t depth, columns, depth_of_group;

  Stream stream() const {
    return {reinterpret_cast<const char*>(values), depth * columns};
  }

  const uint16_t* scales_at(int64_t k) const { return scales + k / depth_of_group * columns; }

  // The end of the run of weight row k, all of one scale.
  int64_t end_of_run(int64_t k, int64_t end) const {
    return std::min({end, (k / kTileDepth + 1) * kTileDepth,
                     (k / depth_of_group + 1) * depth_of_group});
  }
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

// Makes of packed[depth, num_rows] what products with a matrix take, in the same memory. These are
// numbers for weight rows that begin and end where groups do.
inline void prepare(const Int8Matrix&, float* /*packed*/, int64_t /*num_rows*/,
                    int64_t /*depth*/) {}

constexpr decltype(&walk_rows<1>) kWalkRows[kMaxRows + 1] = {
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
  const int64_t padded = whole_lines(width);
  for (int64_t column = 0; column < width; column += kCacheLine) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t m = num_rows * pass / passes, end = num_rows * (pass + 1) / passes;
      kMultiplyStrip[end - m](near + column * depth, depth, x + m, num_rows,
                              sums + m * padded + column, padded, pass == 0, fetcher);
    }
  }
}

// out[width] = (add ? out : 0) + sums * scales
inline void add_scaled(const float* sums, const uint16_t* scales, int64_t width, bool add,
                       float* out) {
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    Floats before = add ? load(out + column) : Floats{};
    store_floats(out + column,
                 multiply_add(load(sums + column), load_bfloat16(scales + column), before));
  }
  for (; column < width; ++column) {
    Floats before = Floats{} + (add ? out[column] : 0.0f);
    Floats factor = Floats{} + to_float(scales[column]);
    out[column] = multiply_add(Floats{} + sums[column], factor, before)[0];
  }
}

// out[num_rows, width] = x @ weight over a segment, weight rows `begin` to `end`, and `width` columns
// from `column` on, for at most most_few(matrix) rows. x is [depth, num_rows] from weight row
// `begin` on.
inline void multiply_few(const Int8Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                         int64_t width, const float* x, int64_t num_rows, float* out,
                         int64_t out_stride) {
  const int64_t panel_columns = panel_for(num_rows), walked = walked_for(num_rows, matrix.columns);
  const int64_t half = num_rows <= kMaxRows ? num_rows : (num_rows + 1) / 2;
  for (int64_t m = 0; begin == end && m < num_rows; ++m) std::fill_n(out + m * out_stride, width, 0);
  alignas(kCacheLine) float sums[kMostSums];
  for (int64_t first = 0; first < width; first += panel_columns) {
    const int64_t panel = std::min(panel_columns, width - first);
    const int64_t row_of_sums = is_copied(num_rows) ? whole_lines(panel) : panel;
    const int8_t* panel_values = matrix.values + column + first;
    for (int64_t run = begin, run_end; run < end; run = run_end) {
      run_end = matrix.end_of_run(run, end);
      std::fill_n(sums, num_rows * row_of_sums, 0.0f);
      for (int64_t k = run; k < run_end; k += walked) {
        const int8_t* rows = panel_values + k * matrix.columns;
        const float* numbers = x + (k - begin) * num_rows;
        const int64_t count = std::min(walked, run_end - k);
        if (is_copied(num_rows)) {
          // Behind the last rows come the next columns of the first.
          Fetcher next{k + count < end ? rows + count * matrix.columns
                                       : panel_values + begin * matrix.columns + panel,
                       matrix.columns, panel};
          multiply_copied(rows, matrix.columns, count, panel, numbers, num_rows, sums, next);
          continue;
        }
        const bool in_order = half == num_rows && !is_followed(num_rows);
        for (int64_t m = 0; m < num_rows; m += half) {
          const Walk walk{rows, matrix.columns, count, walked, in_order};
          kWalkRows[std::min(half, num_rows - m)](walk, panel, numbers + m, num_rows,
                                                  sums + m * row_of_sums);
        }
      }
      const uint16_t* scales = matrix.scales_at(run) + column + first;
      for (int64_t m = 0; m < num_rows; ++m) {
        add_scaled(sums + m * row_of_sums, scales, panel, run > begin, out + m * out_stride + first);
      }
    }
  }
}

// tile[depth, kTileColumns] = weight rows `begin` to `begin + depth` and `width` columns, as they
// are; what is beyond them is zero.
inline void convert_tile(const Int8Matrix& matrix, int64_t begin, int64_t depth, int64_t column,
                         int64_t width, float* tile) {
  const int8_t* row = matrix.values + begin * matrix.columns + column;
  for (int64_t k = 0; k < depth; ++k, row += matrix.columns, tile += kTileColumns) {
    if (width == kTileColumns) {
      Floats weight[kTileVectors];
      load(row, weight);
      for (int v = 0; v < kTileVectors; ++v) store_floats(tile + v * kLanes, weight[v]);
    } else {
      for (int64_t c = 0; c < kTileColumns; ++c) tile[c] = c < width ? row[c] : 0.0f;
    }
  }
}

// A tile of a weight as float32, [depth, kTileColumns], and the scales of its columns.
struct Tile {
  const float* values;
  const float* scale;
  int64_t depth;
};

// Scales of what is not scaled.
struct Ones {
  alignas(kCacheLine) float values[kTileColumns] = {};
  constexpr Ones() {
    for (float& value : values) value = 1.0f;
  }
};
inline constexpr Ones kOnes;

// out[kRows, kTileColumns] = (add ? out : 0) + scale * (x @ values). x is packed. If there is a
// `next`, the weight rows there, those of the next tile, are fetched meanwhile.
template <int kRows>
void multiply_tile(const Tile& tile, const float* x, bool add, float* out, int64_t out_stride,
                   const int8_t* next, int64_t next_stride) {
  const float* values = tile.values;
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
      weight[v] = load(values + v * kLanes);
      hold(weight[v]);
    }
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[m][v] = multiply_add(weight[v], x[m], sum[m][v]);
    }
    values += kTileColumns;
    x += kRows;
  };
  if (next) {
    for (int64_t k = 0; k < tile.depth; ++k, next += next_stride) {
      __builtin_prefetch(next);
      multiply_row();
    }
  } else {
    for (int64_t k = 0; k < tile.depth; ++k) multiply_row();
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = out + m * out_stride + v * kLanes;
      Floats before = add ? load(to) : Floats{};
      store_floats(to, multiply_add(sum[m][v], load(tile.scale + v * kLanes), before));
    }
  }
}

constexpr decltype(&multiply_tile<1>) kMultiplyTile[kMaxRows + 1] = {
    nullptr,          multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
    multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

// Many rows, packed in blocks, `depth` deep.
struct Packed {
  const float* blocks;
  int64_t num_rows, depth;

  const float* of_block(int64_t block, int64_t k) const {
    return blocks + block * kMaxRows * depth + k * rows_of_block(num_rows, block);
  }
};

// out[num_rows, columns] = (add ? out : 0) + scale * (x @ values), for a tile that begins at weight
// row k. Meanwhile the rows at `next` are fetched.
inline void multiply_converted(const Tile& tile, int64_t k, int64_t columns, const Packed& x,
                               bool add, float* out, int64_t out_stride, const int8_t* next,
                               int64_t next_stride) {
  for (int64_t block = 0; block < num_blocks(x.num_rows); ++block, next = nullptr) {
    const int64_t rows = rows_of_block(x.num_rows, block);
    const auto multiply = kMultiplyTile[rows];
    const float* of_block = x.of_block(block, k);
    float* out_block = out + block * kMaxRows * out_stride;
    if (columns == kTileColumns) {
      multiply(tile, of_block, add, out_block, out_stride, next, next_stride);
      continue;
    }
    alignas(kCacheLine) float edge[kMaxRows * kTileColumns];
    for (int64_t m = 0; add && m < rows; ++m) {
      std::copy_n(out_block + m * out_stride, columns, edge + m * kTileColumns);
    }
    multiply(tile, of_block, add, edge, kTileColumns, next, next_stride);
    for (int64_t m = 0; m < rows; ++m) {
      std::copy_n(edge + m * kTileColumns, columns, out_block + m * out_stride);
    }
  }
}

// As multiply_few, for many rows, which begin at weight row 0.
inline void multiply_many(const Int8Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                          int64_t width, const Packed& x, float* out, int64_t out_stride) {
  alignas(kCacheLine) static thread_local float values[kTileDepth * kTileColumns];
  for (int64_t k = begin, run_end; k < end; k = run_end) {
    run_end = matrix.end_of_run(k, end);
    for (int64_t first = 0; first < width; first += kTileColumns) {
      const int64_t columns = std::min(kTileColumns, width - first);
      convert_tile(matrix, k, run_end - k, column + first, columns, values);
      alignas(kCacheLine) float scale[kTileColumns] = {};
      const uint16_t* scales = matrix.scales_at(k) + column + first;
      for (int64_t c = 0; c < columns; ++c) scale[c] = to_float(scales[c]);
      const int8_t* next = matrix.values + k * matrix.columns + column + first + kTileColumns;
      multiply_converted({values, scale, run_end - k}, k, columns, x, k > begin, out + first,
                         out_stride, next, matrix.columns);
    }
  }
}

// out[num_rows, width] = x @ weight over all weight rows, in segments of `segment`, and `width`
// columns from `column` on. `sums` is memory for num_rows * width floats.
template <typename Matrix>
void multiply(const Matrix& matrix, int64_t segment, int64_t column, int64_t width,
              const Packed& x, float* sums, float* out, int64_t out_stride) {
  for (int64_t begin = 0; begin == 0 || begin < matrix.depth; begin += segment) {
    const int64_t end = std::min(matrix.depth, begin + segment);
    float* to = begin == 0 ? out : sums;
    const int64_t stride = begin == 0 ? out_stride : width;
    if (x.num_rows <= kMaxRows) {
      multiply_few(matrix, begin, end, column, width, x.of_block(0, begin), x.num_rows, to, stride);
    } else {
      multiply_many(matrix, begin, end, column, width, x, to, stride);
    }
    for (int64_t m = 0; begin > 0 && m < x.num_rows; ++m) {
      for (int64_t c = 0; c < width; ++c) out[m * out_stride + c] += sums[m * width + c];
    }
  }
}

}  // namespace grok1
