// Products of float32 rows with a rectangle of a 4-bit matrix, on one thread.
//
// As in product.h: few rows multiply what a register holds, a group of weight rows at a time, whose
// scales are applied to the sums; for many rows a tile becomes float32 in the first-level cache. A
// byte holds the codes of two weight rows. A register's worth of them becomes floats by
// looking up 16 values: in a register where that holds as many, otherwise by bytes.

#pragma once

#include "product.h"

namespace grok1 {

constexpr float kBook[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                             1,    13,   25,  38,  53,  69,  89,  113};

// Columns that are decoded at a time.
#if defined(__AVX512F__)
constexpr int kCodeColumns = 64;
#elif defined(__AVX2__)
constexpr int kCodeColumns = 32;
#else
constexpr int kCodeColumns = 16;
#endif
constexpr int kCodeVectors = kCodeColumns / kLanes;

constexpr int kCodeRows = 6;          // rows of bytes with the scales of a block's groups
constexpr int kMostGroupRows = 32;
constexpr int kMostCodeRows = 4;  // input rows whose sums registers hold beside what is decoded
constexpr int64_t kPanel = 1024;  // columns whose sums and scales the first-level cache holds

inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31;
  uint32_t mantissa = half & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * mantissa / 16777216.0f;
  uint32_t bits = sign | (exponent == 31 ? 0x7F800000 : (exponent + 112) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

struct Int4Matrix {
  const uint8_t* values;     // [depth / 2, columns], two rows in a byte
  const uint8_t* subscales;  // [blocks, kCodeRows, columns]
  const uint16_t* scales;    // [blocks, columns], float16
  int64_t depth, columns, block, group;  // rows of a block, and of a group

  Stream stream() const { return {reinterpret_cast<const char*>(values), depth / 2 * columns}; }

  const int8_t* address(int64_t k, int64_t column) const {
    return reinterpret_cast<const int8_t*>(values) + k / 2 * columns + column;
  }

  // to[width] = the scales of the group of weight row k, from a column on.
  void group_scales(int64_t k, int64_t column, int64_t width, float* __restrict to) const {
    const int64_t number = k % block / group;
    const uint8_t* rows = subscales + k / block * kCodeRows * columns + column;
    const uint8_t *low = rows + number / 2 * columns, *high = rows + (4 + number / 4) * columns;
    const int low_shift = 4 * (number % 2), high_shift = 2 * (number % 4);
    for (int64_t c = 0; c < width; ++c) {
      int bits = (low[c] >> low_shift & 15) | (high[c] >> high_shift & 3) << 4;
      to[c] = static_cast<float>(bits - 32);
    }
  }
};

inline Int4Matrix matrix_of(const uint8_t* values, const uint8_t* subscales,
                            const uint16_t* scales, int64_t number, int64_t depth,
                            int64_t columns, int64_t num_blocks) {
  int64_t block = depth / num_blocks, group = 32;
  while (block % group != 0) group /= 2;
  return {values + number * (depth / 2) * columns,
          subscales + number * num_blocks * kCodeRows * columns,
          scales + number * num_blocks * columns,
          depth,
          columns,
          block,
          group};
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The values are exact in bfloat16, whose two bytes are looked up: a float is those before zeros.
inline __m256i book_bytes(int place) {
  return _mm256_broadcastsi128_si256(
      place == 0 ? _mm_setr_epi8(-2, -48, -90, -126, 68, 12, -80, 32, -128, 80, -56, 24, 84, -118,
                                 -78, -30)
                 : _mm_setr_epi8(-62, -62, -62, -62, -62, -62, -63, -63, 63, 65, 65, 66, 66, 66,
                                 66, 66));
}
#endif

// low, high[kCodeVectors] = the values of the codes of two weight rows; with AVX2 not in the order
// of the columns, see `in_order`.
__attribute__((always_inline)) inline void decode(const uint8_t* codes, Floats* low, Floats* high) {
#if defined(__AVX512F__)
  const __m512 book = _mm512_loadu_ps(kBook);
  for (int v = 0; v < kCodeVectors; ++v) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + v * kLanes));
    // Of an index the low four bits count.
    __m512i both = _mm512_cvtepu8_epi32(bytes);
    low[v] = _mm512_permutexvar_ps(both, book);
    high[v] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), book);
  }
#elif defined(__AVX2__)
  const __m256i first = book_bytes(0), second = book_bytes(1);
  const __m256i four = _mm256_set1_epi8(15), upper = _mm256_set1_epi32(0xFFFF0000);
  __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  auto spread = [&](__m256i code, Floats* to) {
    __m256i one = _mm256_shuffle_epi8(first, code), two = _mm256_shuffle_epi8(second, code);
    __m256i half = _mm256_unpacklo_epi8(one, two), other = _mm256_unpackhi_epi8(one, two);
    to[0] = _mm256_castsi256_ps(_mm256_slli_epi32(half, 16));
    to[1] = _mm256_castsi256_ps(_mm256_and_si256(half, upper));
    to[2] = _mm256_castsi256_ps(_mm256_slli_epi32(other, 16));
    to[3] = _mm256_castsi256_ps(_mm256_and_si256(other, upper));
  };
  spread(_mm256_and_si256(both, four), low);
  spread(_mm256_and_si256(_mm256_srli_epi16(both, 4), four), high);
#else
  for (int c = 0; c < kCodeColumns; ++c) {
    low[c / kLanes][c % kLanes] = kBook[codes[c] & 15];
    high[c / kLanes][c % kLanes] = kBook[codes[c] >> 4];
  }
#endif
}

// Brings what `decode` gave, or sums of it, to the order of the columns.
__attribute__((always_inline)) inline void in_order(Floats* floats) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256 near = _mm256_unpacklo_ps(floats[0], floats[1]);
  __m256 far = _mm256_unpackhi_ps(floats[0], floats[1]);
  __m256 other_near = _mm256_unpacklo_ps(floats[2], floats[3]);
  __m256 other_far = _mm256_unpackhi_ps(floats[2], floats[3]);
  floats[0] = _mm256_permute2f128_ps(near, far, 0x20);
  floats[1] = _mm256_permute2f128_ps(other_near, other_far, 0x20);
  floats[2] = _mm256_permute2f128_ps(near, far, 0x31);
  floats[3] = _mm256_permute2f128_ps(other_near, other_far, 0x31);
#endif
}

// The codes of a group of weight rows and of kCodeColumns columns, and what becomes of them.
struct Codes {
  const uint8_t* begin;  // rows of bytes that are `stride` apart
  int64_t stride, pairs;
  int64_t ahead;       // to the rows that will be multiplied next, which are fetched meanwhile
  const float* scale;  // [kCodeColumns], of the group
};

// total[kRows, kCodeColumns] += scale * (x @ values). x is [2 * pairs, kRows].
template <int kRows>
__attribute__((noinline)) void multiply_codes(const Codes& of, const float* x, int64_t x_stride,
                                              float* total, int64_t total_stride) {
  // Of one row both weight rows have sums of their own, because an addition waits for the one before.
  Floats sum[kRows][kCodeVectors] = {}, other[kRows == 1 ? kCodeVectors : 1] = {};
  const uint8_t* codes = of.begin;
  for (int64_t i = 0; i < of.pairs; ++i, codes += of.stride, x += 2 * x_stride) {
    __builtin_prefetch(codes + of.ahead, 0, 2);
#if defined(__AVX2__) && !defined(__AVX512F__)
    // For few rows one weight row after the other, whose floats are used at once, so that registers
    // hold the sums.
    if constexpr (kRows <= 2) {
      const __m256i four = _mm256_set1_epi8(15), upper = _mm256_set1_epi32(0xFFFF0000);
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      for (int row = 0; row < 2; ++row) {
        __m256i code = _mm256_and_si256(row == 0 ? both : _mm256_srli_epi16(both, 4), four);
        __m256i one = _mm256_shuffle_epi8(book_bytes(0), code);
        __m256i two = _mm256_shuffle_epi8(book_bytes(1), code);
        for (int side = 0; side < 2; ++side) {
          __m256i halves =
              side == 0 ? _mm256_unpacklo_epi8(one, two) : _mm256_unpackhi_epi8(one, two);
          Floats even = _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16));
          Floats odd = _mm256_castsi256_ps(_mm256_and_si256(halves, upper));
          for (int m = 0; m < kRows; ++m) {
            Floats* to = kRows == 1 && row == 1 ? other : sum[m];
            to[2 * side] += even * x[row * x_stride + m];
            to[2 * side + 1] += odd * x[row * x_stride + m];
          }
        }
      }
      continue;
    }
#endif
    Floats low[kCodeVectors], high[kCodeVectors];
    decode(codes, low, high);
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < kCodeVectors; ++v) {
        sum[m][v] += low[v] * x[m];
        (kRows == 1 ? other[v] : sum[m][v]) += high[v] * x[x_stride + m];
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    if (kRows == 1) {
      for (int v = 0; v < kCodeVectors; ++v) sum[m][v] += other[v];
    }
    in_order(sum[m]);
    for (int v = 0; v < kCodeVectors; ++v) {
      float* to = total + m * total_stride + v * kLanes;
      store_floats(to, load(to) + sum[m][v] * load(of.scale + v * kLanes));
    }
  }
}

// total[num_rows, kCodeColumns] += scale * (x @ values). x is [2 * pairs, num_rows].
inline void multiply_group(const Codes& of, const float* x, int64_t num_rows, float* total,
                           int64_t total_stride) {
  constexpr decltype(&multiply_codes<1>) kMultiply[] = {nullptr, multiply_codes<1>,
                                                        multiply_codes<2>, multiply_codes<3>,
                                                        multiply_codes<4>};
  const int64_t passes = (num_rows + kMostCodeRows - 1) / kMostCodeRows;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = num_rows * pass / passes, end = num_rows * (pass + 1) / passes;
    kMultiply[end - first](of, x + first, num_rows, total + first * total_stride, total_stride);
  }
}

// As for int8 matrices, in product.h.
constexpr int64_t most_few(const Int4Matrix&) { return kFewRows; }

// As for int8 matrices, in product.h.
inline void multiply_few(const Int4Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                         int64_t width, const float* x, int64_t num_rows, bool add, float* out,
                         int64_t out_stride) {
  if (!add) {
    for (int64_t m = 0; m < num_rows; ++m) std::fill_n(out + m * out_stride, width, 0.0f);
  }
  // Up to a whole number of what is decoded at a time.
  constexpr int64_t kWidest = kPanel + kCodeColumns;
  alignas(kCacheLine) static thread_local float scale[kWidest];
  alignas(kCacheLine) static thread_local float total[kFewRows * kWidest];
  const int64_t panel_columns = std::min(panel_for(num_rows), kPanel);
  const int64_t columns = matrix.columns;
  const int64_t pairs = matrix.group / 2;
  for (int64_t first = 0; first < width; first += panel_columns) {
    const int64_t panel = std::min(panel_columns, width - first), at = column + first;
    const int64_t row = (panel + kCodeColumns - 1) / kCodeColumns * kCodeColumns;
    for (int64_t block = begin / matrix.block; block * matrix.block < end; ++block) {
      const int64_t block_begin = std::max(begin, block * matrix.block);
      const int64_t block_end = std::min(end, (block + 1) * matrix.block);
      std::fill_n(total, num_rows * row, 0.0f);
      const int64_t first_group = block_begin / matrix.group * matrix.group;
      for (int64_t k = first_group; k < block_end; k += matrix.group) {
        // Rows of the group that are not of this rectangle are multiplied by zeros.
        float numbers[kMostGroupRows * kFewRows];
        const float* of_group = x + (k - begin) * num_rows;
        if (k < block_begin || k + matrix.group > block_end) {
          std::fill_n(numbers, matrix.group * num_rows, 0.0f);
          const int64_t from = std::max(k, block_begin), to = std::min(k + matrix.group, block_end);
          std::copy_n(x + (from - begin) * num_rows, (to - from) * num_rows,
                      numbers + (from - k) * num_rows);
          of_group = numbers;
        }
        matrix.group_scales(k, at, panel, scale);
        const uint8_t* codes = matrix.values + k / 2 * columns + at;
        // Behind the last group come the next columns of the first.
        const int64_t back = (begin / matrix.group * matrix.group - k) / 2 * columns;
        const int64_t ahead = k + matrix.group < end ? pairs * columns : back + panel;
        for (int64_t c = 0; c < panel; c += kCodeColumns) {
          uint8_t edge[kMostGroupRows / 2 * kCodeColumns];
          Codes here = {codes + c, columns, pairs, ahead, scale + c};
          if (panel - c < kCodeColumns) {
            for (int64_t i = 0; i < pairs; ++i) {
              std::memcpy(edge + i * kCodeColumns, here.begin + i * columns, panel - c);
            }
            here.begin = edge;
            here.stride = kCodeColumns;
          }
          multiply_group(here, of_group, num_rows, total + c, row);
        }
      }
      const uint16_t* halves = matrix.scales + block * columns + at;
      for (int64_t c = 0; c < panel; ++c) scale[c] = half_to_float(halves[c]);
      for (int64_t m = 0; m < num_rows; ++m) {
        float* to = out + m * out_stride + first;
        for (int64_t c = 0; c < panel; ++c) to[c] += total[m * row + c] * scale[c];
      }
    }
  }
}

constexpr int kTilesOfCodes = kCodeColumns / kTileColumns;

// tiles[kTilesOfCodes, depth, kTileColumns] = `depth` weight rows from `begin` on, which is even, and
// `width` columns; what is beyond them is zero.
inline void convert_tiles(const Int4Matrix& matrix, int64_t begin, int64_t depth, int64_t column,
                          int64_t width, float* tiles) {
  const bool is_whole = width == kCodeColumns;
  alignas(kCacheLine) float scale[kCodeColumns] = {};
  for (int64_t k = begin; k < begin + depth;) {
    const int64_t end = std::min(begin + depth, (k / matrix.group + 1) * matrix.group);
    matrix.group_scales(k, column, width, scale);
    const uint16_t* halves = matrix.scales + k / matrix.block * matrix.columns + column;
    for (int64_t c = 0; c < width; ++c) scale[c] *= half_to_float(halves[c]);
    for (; k < end; k += 2) {
      const uint8_t* codes = matrix.values + k / 2 * matrix.columns + column;
      uint8_t edge[kCodeColumns] = {};
      if (!is_whole) {
        std::memcpy(edge, codes, width);
        codes = edge;
      }
      Floats low[kCodeVectors], high[kCodeVectors];
      decode(codes, low, high);
      in_order(low);
      in_order(high);
      for (int v = 0; v < kCodeVectors; ++v) {
        float* to = tiles + ((v / kTileVectors) * depth + k - begin) * kTileColumns +
                    v % kTileVectors * kLanes;
        Floats factor = load(scale + v * kLanes);
        store_floats(to, low[v] * factor);
        store_floats(to + kTileColumns, high[v] * factor);
      }
    }
  }
}

// As for int8 matrices, in product.h.
inline void multiply_many(const Int4Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                          int64_t width, const float* x, int64_t x_depth, int64_t num_rows,
                          bool add, float* out, int64_t out_stride) {
  alignas(kCacheLine) static thread_local float tiles[kTileDepth * kCodeColumns];
  for (int64_t k = begin, depth; k < end; k += depth) {
    depth = std::min(kTileDepth, end - k);
    for (int64_t first = 0; first < width; first += kCodeColumns) {
      const int64_t wide = std::min<int64_t>(kCodeColumns, width - first);
      convert_tiles(matrix, k, depth, column + first, wide, tiles);
      const int8_t* next = matrix.address(k, column + first + kCodeColumns);
      for (int64_t done = 0; done < wide; done += kTileColumns) {
        multiply_converted(tiles + done * depth, k, depth, std::min(kTileColumns, wide - done), x,
                           x_depth, num_rows, add || k > begin, out + first + done, out_stride,
                           next, matrix.columns);
      }
    }
  }
}

}  // namespace grok1
