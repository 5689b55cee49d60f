// Products of rows in digits with a rectangle of a 4-bit matrix.
//
// A tile is a group of weight rows in kCodeColumns columns. Interleaving bytes keeps to lanes of
// 16, so that of each 16 columns four are in each register; sums stay in this order, and scales
// come in it, until all groups are done. Along wide rows fetching ahead is left to the processor,
// which follows the rows of a group sooner than a program can ask for them; it loses narrow ones
// at their ends, so those of the next group are fetched.

#pragma once

#include "digits.h"
#include "int4_matrix.h"

#if defined(GROK1_DIGITS)

namespace grok1 {

constexpr int kFours = kDigitRows / 4;

// The values of the low codes of bytes, or of the high ones.
__attribute__((always_inline)) inline __m512i values_of(__m512i bytes, int place) {
  if (place == 1) bytes = _mm512_srli_epi16(bytes, 4);
#if defined(__AVX512VBMI__)
  // The book is there four times: what comes beside a code chooses one of them.
  return _mm512_permutexvar_epi8(bytes, biased_book());
#else
  return _mm512_shuffle_epi8(biased_book(), _mm512_and_si512(bytes, _mm512_set1_epi8(15)));
#endif
}

// Numbers of kCodeColumns columns from the order of a tile to that of its columns, or back.
__attribute__((always_inline)) inline void reorder(__m512 (&from)[kCodeVectors]) {
  const __m512 first = _mm512_shuffle_f32x4(from[0], from[1], 0x44);
  const __m512 second = _mm512_shuffle_f32x4(from[2], from[3], 0x44);
  const __m512 third = _mm512_shuffle_f32x4(from[0], from[1], 0xEE);
  const __m512 fourth = _mm512_shuffle_f32x4(from[2], from[3], 0xEE);
  from[0] = _mm512_shuffle_f32x4(first, second, 0x88);
  from[1] = _mm512_shuffle_f32x4(first, second, 0xDD);
  from[2] = _mm512_shuffle_f32x4(third, fourth, 0x88);
  from[3] = _mm512_shuffle_f32x4(third, fourth, 0xDD);
}

inline void reorder(float* numbers) {
  __m512 vectors[kCodeVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kCodeVectors; ++v) vectors[v] = _mm512_loadu_ps(numbers + v * kLanes);
  reorder(vectors);
#pragma GCC unroll 4
  for (int v = 0; v < kCodeVectors; ++v) _mm512_storeu_ps(numbers + v * kLanes, vectors[v]);
}

// A group of weight rows.
struct Group {
  const uint8_t* codes;
  int64_t stride, ahead;      // bytes from a row to the next, and to what is fetched; 0 for nothing
  const uint8_t *low, *high;  // bytes with four of the six bits of its scales, and with two
  int low_shift, high_shift;
  const float* of_block;      // its block's scales times 2^-24, in the order of tiles
};

// Scales of kCodeColumns columns, in the order of a tile.
struct Scales {
  __m512 vectors[kCodeVectors];

  __attribute__((always_inline)) Scales(const Group& of, int64_t column) {
    __m512i low = _mm512_loadu_si512(of.low + column), high = _mm512_loadu_si512(of.high + column);
    low = _mm512_srl_epi16(low, _mm_cvtsi32_si128(of.low_shift));
    high = _mm512_slli_epi16(_mm512_srl_epi16(high, _mm_cvtsi32_si128(of.high_shift)), 4);
    // low & 15 | high & 48
    const __m512i bits = _mm512_and_si512(
        _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), low, high, 0xCA), _mm512_set1_epi8(63));
    const __m512i bytes = _mm512_sub_epi8(bits, _mm512_set1_epi8(32));
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; ++v) {
      // To the highest bytes of numbers whose other bytes are zero.
      const int first = 4 * v << 24;
      const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi32(
          first + 0x00808080, first + 0x01808080, first + 0x02808080, first + 0x03808080));
      const __m512i whole = _mm512_shuffle_epi8(bytes, places);
      vectors[v] = _mm512_mul_ps(_mm512_cvtepi32_ps(whole),
                                 _mm512_loadu_ps(of.of_block + column + v * kLanes));
    }
  }
};

// Values of a tile: of each vector of columns, four weight rows side by side, one column after the
// other.
struct alignas(kCacheLine) Fours {
  __m512i values[kFours][kCodeVectors];
  __m512 scales[kCodeVectors];
};

// Sums of products of a row with the values of a tile.
struct DigitSums {
  __m512i low[kCodeVectors], middle[kCodeVectors], high[kCodeVectors];

  __attribute__((always_inline)) explicit DigitSums(const Digits& x) {
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; ++v) {
      low[v] = _mm512_set1_epi32(x.low_start);
      middle[v] = _mm512_set1_epi32(x.middle_start);
      high[v] = _mm512_setzero_si512();
    }
  }

  // The products with four weight rows.
  __attribute__((always_inline)) void add(const Digits& x, int i, const __m512i* values) {
    auto four = [&](const int8_t* digits) __attribute__((always_inline)) {
      int32_t bytes;
      std::memcpy(&bytes, digits + 4 * i, sizeof(bytes));
      return _mm512_set1_epi32(bytes);
    };
    const __m512i of_low = four(x.low), of_middle = four(x.middle), of_high = four(x.high);
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; ++v) {
      low[v] = _mm512_dpbusd_epi32(low[v], values[v], of_low);
      middle[v] = _mm512_dpbusd_epi32(middle[v], values[v], of_middle);
      high[v] = _mm512_dpbusd_epi32(high[v], values[v], of_high);
    }
  }

  // out[kCodeColumns] += scales * sums
  __attribute__((always_inline)) void add_to(const Digits& x, const __m512* scales, float* out) {
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; ++v) {
      const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(high[v], 8), middle[v]);
      const Floats sum = multiply_add((Floats)_mm512_cvtepi32_ps(upper), Floats{} + 256.0f,
                                      (Floats)_mm512_cvtepi32_ps(low[v]));
      const Floats product = sum * x.step;
      float* to = out + v * kLanes;
      store_floats(to, multiply_add(product, (Floats)scales[v], load(to)));
    }
  }
};

// Looks up the values of a tile. If kMultiplies, out[kCodeColumns] += scales * (numbers @ values):
// between products that takes less time than before them. If kKeeps, the values are for more rows.
template <bool kMultiplies, bool kKeeps>
__attribute__((always_inline)) inline void look_up(const Group& of, int64_t column, const Digits& x,
                                                   Fours& fours, float* out) {
  DigitSums sums(x);
  const int64_t ahead = of.ahead;
  const uint8_t* codes = of.codes + column;
#pragma GCC unroll 4
  for (int i = 0; i < kFours; i += 2) {
    __m512i bytes[4], values[2][kCodeVectors];
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row, codes += of.stride) {
      __builtin_prefetch(codes + kCodeColumns, 0, 3);
      // Of what is near already a prefetch would take time.
      if (ahead > 0) __builtin_prefetch(codes + ahead, 0, 2);
      bytes[row] = _mm512_loadu_si512(codes);
    }
    const __m512i near[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]),
                             _mm512_unpackhi_epi8(bytes[0], bytes[1])};
    const __m512i far[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]),
                            _mm512_unpackhi_epi8(bytes[2], bytes[3])};
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; ++v) {
      const __m512i four = v % 2 == 0 ? _mm512_unpacklo_epi16(near[v / 2], far[v / 2])
                                      : _mm512_unpackhi_epi16(near[v / 2], far[v / 2]);
#pragma GCC unroll 2
      for (int place = 0; place < 2; ++place) {
        values[place][v] = values_of(four, place);
        if (kKeeps) fours.values[i + place][v] = values[place][v];
      }
    }
    if (!kMultiplies) continue;
    sums.add(x, i, values[0]);
    sums.add(x, i + 1, values[1]);
  }
  const Scales scales(of, column);
  if (kKeeps) std::memcpy(fours.scales, scales.vectors, sizeof(fours.scales));
  if (kMultiplies) sums.add_to(x, scales.vectors, out);
}

template <bool kMultiplies, bool kKeeps>
__attribute__((noinline)) void multiply_first(const Group& of, int64_t column, const Digits& x,
                                              Fours& fours, float* out) {
  look_up<kMultiplies, kKeeps>(of, column, x, fours, out);
}

// out[columns] += scales * (numbers @ values), of whole tiles: what they share stays in registers.
__attribute__((noinline)) inline void multiply_one(const Group& of, int64_t columns,
                                                   const Digits& x, float* out) {
  Fours none;
  for (int64_t column = 0; column < columns; column += kCodeColumns) {
    look_up<true, false>(of, column, x, none, out + column);
  }
}

// out[kRows, kCodeColumns] += scales * (numbers @ values), with values that were kept. The sums of
// two rows are more at a time than a product takes cycles, and share the values.
template <int kRows>
__attribute__((noinline)) void multiply_kept(const Fours& fours, const Digits* x, float* out,
                                             int64_t out_stride) {
  DigitSums first(x[0]), second(x[kRows - 1]);
#pragma GCC unroll 8
  for (int i = 0; i < kFours; ++i) {
    first.add(x[0], i, fours.values[i]);
    if (kRows == 2) second.add(x[1], i, fours.values[i]);
    // Registers hold what four weight rows need, and no more.
    asm volatile("" ::: "memory");
  }
  first.add_to(x[0], fours.scales, out);
  if (kRows == 2) second.add_to(x[1], fours.scales, out + out_stride);
}

// out[num_rows, columns] += scales * (x @ values), of whole tiles: two rows at a time, and of a few
// that are odd in number one while values are looked up.
inline void multiply_tiles(const Group& group, int64_t k, int64_t columns, const Inputs& packed,
                           float* out, int64_t out_stride) {
  if (packed.num_rows == 1) {
    const void* numbers = packed.numbers(0, k).x;
    return multiply_one(group, columns, *static_cast<const Digits*>(numbers), out);
  }
  const int64_t passes = packed.x_depth > 0 ? packed.num_passes() : 1;
  const bool is_odd = passes == 1 && packed.num_rows % 2 == 1;
  Fours fours;
  for (int64_t column = 0; column < columns; column += kCodeColumns, out += kCodeColumns) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      const Digits* x = reinterpret_cast<const Digits*>(packed.numbers(pass, k).x);
      int64_t m = pass > 0 ? packed.first_of(pass) : 0;
      const int64_t end = pass + 1 < passes ? packed.first_of(pass + 1) : packed.num_rows;
      if (pass == 0 && !is_odd) {
        multiply_first<false, true>(group, column, *x, fours, out);
      } else if (pass == 0) {
        multiply_first<true, true>(group, column, *x, fours, out);
      }
      if (pass == 0 && is_odd) ++m, ++x;
      for (; m + 2 <= end; m += 2, x += 2) {
        multiply_kept<2>(fours, x, out + m * out_stride, out_stride);
      }
      if (m < end) multiply_kept<1>(fours, x, out + m * out_stride, 0);
    }
  }
}

// to[columns] = the scales of a block times 2^-24, from a column on, in the order of tiles.
inline void scales_of_block(const Int4Matrix& matrix, int64_t k, int64_t column, int64_t columns,
                            float* to) {
  const uint16_t* from = matrix.scales + k / matrix.block * matrix.columns + column;
  for (int64_t c = 0; c < columns; c += kCodeColumns) {
    __m512 scales[kCodeVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; ++v) {
      const void* halves = from + c + v * kLanes;
      scales[v] = _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(halves)));
      scales[v] = _mm512_mul_ps(scales[v], _mm512_set1_ps(1.0f / (1 << 24)));
    }
    reorder(scales);
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; ++v) _mm512_storeu_ps(to + c + v * kLanes, scales[v]);
  }
}

// The group of weight row k, from a column on and so many columns.
inline Group group_of(const Int4Matrix& matrix, int64_t k, int64_t column, int64_t columns,
                      const float* of_block) {
  const int number = k % matrix.block / kDigitRows;
  const uint8_t* rows =
      matrix.subscales + k / matrix.block * kCodeRows * matrix.columns + column;
  const int64_t ahead = columns < kCodePanel ? kDigitRows / 2 * matrix.columns : 0;
  return {matrix.address(k, column), matrix.columns, ahead, rows + number / 2 * matrix.columns,
          rows + (4 + number / 4) * matrix.columns, 4 * (number % 2), 2 * (number % 4), of_block};
}

// out[num_rows, width] = x @ weight, for fewer columns than a tile has, a row at a time.
inline void multiply_edge(const Int4Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                          int64_t width, const Inputs& packed, float* out, int64_t out_stride) {
  uint8_t codes[kDigitRows / 2 * kCodeColumns] = {};
  uint8_t low[kCodeColumns] = {}, high[kCodeColumns] = {};
  float of_block[kCodeColumns];
  for (int64_t m = 0; m < packed.num_rows; ++m) {
    const int64_t pass = packed.x_depth > 0 ? m / kMaxRows : 0;
    const int64_t place = packed.x_depth > 0 ? m - packed.first_of(pass) : m;
    float sums[kCodeColumns] = {};
    for (int64_t k = begin; k < end; k += kDigitRows) {
      Group group = group_of(matrix, k, column, width, of_block);
      for (int64_t i = 0; i < kDigitRows / 2; ++i) {
        std::memcpy(codes + i * kCodeColumns, group.codes + i * group.stride, width);
      }
      std::memcpy(low, group.low, width);
      std::memcpy(high, group.high, width);
      std::fill_n(of_block, kCodeColumns, 0.0f);
      matrix.block_scales(k, column, width, of_block);
      for (float& scale : of_block) scale *= 1.0f / (1 << 24);
      reorder(of_block);
      group = {codes, kCodeColumns, 0, low, high, group.low_shift, group.high_shift, of_block};
      const Digits* x = reinterpret_cast<const Digits*>(packed.numbers(pass, k).x) + place;
      multiply_one(group, kCodeColumns, *x, sums);
    }
    reorder(sums);
    std::copy_n(sums, width, out + m * out_stride);
  }
}

// out[num_rows, width] = x @ weight over weight rows `begin` to `end`, where groups do, and `width`
// columns from `column` on; out is zero before.
inline void multiply_in_digits(const Int4Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                               int64_t width, const Inputs& packed, float* out,
                               int64_t out_stride) {
  const int64_t whole = width / kCodeColumns * kCodeColumns;
  float* of_block = memory_of_scales();
  for (int64_t first = 0; first < whole; first += kCodePanel) {
    const int64_t panel = std::min(kCodePanel, whole - first), at = column + first;
    for (int64_t k = begin; k < end; k += kDigitRows) {
      if (k == begin || k % matrix.block == 0) {
        scales_of_block(matrix, k, at, panel, of_block);
      }
      const Group group = group_of(matrix, k, at, panel, of_block);
      multiply_tiles(group, k, panel, packed, out + first, out_stride);
    }
    for (int64_t m = 0; m < packed.num_rows; ++m) {
      float* of_row = out + m * out_stride + first;
      for (int64_t c = 0; c < panel; c += kCodeColumns) reorder(of_row + c);
    }
  }
  if (whole < width) {
    multiply_edge(matrix, begin, end, column + whole, width - whole, packed, out + whole,
                  out_stride);
  }
}

}  // namespace grok1

#endif
