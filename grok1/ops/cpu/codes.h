// Products of float32 rows with a group of weight rows of a 4-bit matrix.
//
// A byte holds the codes of two weight rows. A register's worth of them becomes floats by looking
// up 16 values: in a register where that holds as many, otherwise by bytes. Few input rows multiply
// floats as they are looked up; for more, these become a tile in the first-level cache. Either way
// the products of a group are summed up in their order, from zero on, and scaled then.

#pragma once

#include <cstdint>
#include <cstring>

#include "near.h"
#include "vectors.h"

namespace grok1 {

constexpr float kBook[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                             1,    13,   25,  38,  53,  69,  89,  113};

// Columns that are looked up at a time: with vectors, those of a whole cache line.
#if defined(__AVX2__)
constexpr int kCodeColumns = 64;
#else
constexpr int kCodeColumns = 16;
#endif
constexpr int kCodeVectors = kCodeColumns / kLanes;

// Most input rows that multiply floats as they are looked up.
#if defined(__AVX2__)
constexpr int kMostDirect = 4;
#else
constexpr int kMostDirect = 2;
#endif

constexpr int kMostGroupRows = 32;

// A group of weight rows.
struct Codes {
  const uint8_t* begin;   // rows of bytes, `stride` apart
  int64_t stride, pairs;  // a pair of weight rows is one row of bytes
  int64_t columns;        // a multiple of kCodeColumns
  const float* scale;     // [columns]
};

// Numbers of input rows: that of row m for weight row k of the group is x[k * stride + m].
struct Numbers {
  const float* x;
  int64_t stride;
};

// Fetches what the bytes of kCodeColumns columns are followed by.
inline void fetch_next(const Codes& of, Fetcher& fetcher) {
  for (int64_t i = 0; i < of.pairs * kCodeColumns; i += kCacheLine) fetcher.fetch();
}

// The values are exact in bfloat16, whose two bytes are looked up: a float is those before zeros.
constexpr int8_t kBookBytes[2][16] = {
    {-2, -48, -90, -126, 68, 12, -80, 32, -128, 80, -56, 24, 84, -118, -78, -30},
    {-62, -62, -62, -62, -62, -62, -63, -63, 63, 65, 65, 66, 66, 66, 66, 66}};

#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m256i book_bytes(int place) {
  return _mm256_broadcastsi128_si256(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(kBookBytes[place])));
}

__attribute__((always_inline)) inline __m256i load_bytes(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// The codes of one of two weight rows, from bytes with both.
__attribute__((always_inline)) inline __m256i codes_of(__m256i both, int row) {
  return _mm256_and_si256(row == 0 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
}

// value[2] = the values of half of 32 codes, in each 16 of the first eight or of the last: those of
// even places, and those of odd ones.
__attribute__((always_inline)) inline void look_up(__m256i codes, int half, Floats* value) {
  __m256i one = _mm256_shuffle_epi8(book_bytes(0), codes);
  __m256i two = _mm256_shuffle_epi8(book_bytes(1), codes);
  __m256i both = half == 0 ? _mm256_unpacklo_epi8(one, two) : _mm256_unpackhi_epi8(one, two);
  value[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  value[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xFFFF0000)));
}

// out += scale * sum, for sums of what look_up gives, which are of columns 0 to 7 and 16 to 23.
__attribute__((always_inline)) inline void add_scaled(const Floats* sum, const float* scale,
                                                      float* out) {
  __m256 near = _mm256_unpacklo_ps(sum[0], sum[1]), far = _mm256_unpackhi_ps(sum[0], sum[1]);
  Floats first = _mm256_permute2f128_ps(near, far, 0x20);
  Floats second = _mm256_permute2f128_ps(near, far, 0x31);
  store_floats(out, multiply_add(first, load(scale), load(out)));
  store_floats(out + 16, multiply_add(second, load(scale + 16), load(out + 16)));
}

// Of kLoads * 32 columns the kHalves halves from kFirst on; fetches meanwhile if these are all.
template <int kRows, int kLoads, int kHalves, int kFirst>
__attribute__((always_inline)) inline void multiply_columns(const Codes& of, int64_t column,
                                                            const Numbers& numbers, float* out,
                                                            int64_t out_stride,
                                                            Fetcher& fetcher) {
  // A copy: the caller's would be written to memory at every step.
  Fetcher ahead = fetcher;
  Floats sum[kLoads][kHalves][kRows][2] = {};
  const uint8_t* codes = of.begin + column;
  const float* x = numbers.x;
  const int64_t stride = of.stride, pairs = of.pairs, x_stride = numbers.stride;
  for (int64_t i = 0; i < pairs; ++i, codes += stride, x += 2 * x_stride) {
    // One line at a time: memory waits for no more than so many at once.
    if (kHalves == 2 && column % kCodeColumns == 0) ahead.fetch();
    // It is in the second-level cache by now, and one row is done before it is in the first.
    if (kRows == 1) __builtin_prefetch(codes + kCodeColumns, 0, 3);
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) {
#pragma GCC unroll 2
      for (int part = 0; part < kLoads; ++part) {
        const __m256i code = codes_of(load_bytes(codes + 32 * part), row);
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half) {
          Floats value[2];
          look_up(code, kFirst + half, value);
#pragma GCC unroll 4
          for (int m = 0; m < kRows; ++m) {
            const Floats number = _mm256_broadcast_ss(x + row * x_stride + m);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
              sum[part][half][m][v] += value[v] * number;
              // Without this compilers keep a sum in memory, and each addition waits for it.
              hold(sum[part][half][m][v]);
            }
          }
        }
      }
    }
  }
  fetcher = ahead;
#pragma GCC unroll 2
  for (int part = 0; part < kLoads; ++part) {
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      const int64_t at = column + 32 * part + 8 * (kFirst + half);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        add_scaled(sum[part][half][m], of.scale + at, out + m * out_stride + at);
      }
    }
  }
}

// out[kRows, columns] += scale * (x @ values).
template <int kRows>
__attribute__((noinline)) void multiply_codes(const Codes& of, const Numbers& numbers, float* out,
                                              int64_t out_stride, Fetcher& fetcher) {
  // As many columns at a time as registers hold the sums of.
  constexpr int kLoads = kRows == 1 ? 2 : 1, kHalves = kRows <= 2 ? 2 : 1;
  for (int64_t column = 0; column < of.columns; column += 32 * kLoads) {
    if (kHalves == 1 && column % kCodeColumns == 0) fetch_next(of, fetcher);
    multiply_columns<kRows, kLoads, kHalves, 0>(of, column, numbers, out, out_stride, fetcher);
    if constexpr (kHalves == 1) {
      multiply_columns<kRows, kLoads, 1, 1>(of, column, numbers, out, out_stride, fetcher);
    }
  }
}

// tile[2 * pairs, kCodeColumns] = values, from a column on.
inline void decode(const Codes& of, int64_t column, float* tile) {
  // Column c + 8 comes next to column c: what is looked up is then in the order of the columns.
  const __m256i lanes = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i places = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
  const uint8_t* codes = of.begin + column;
  for (int64_t i = 0; i < of.pairs; ++i, codes += of.stride, tile += 2 * kCodeColumns) {
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      __m256i both = _mm256_permutevar8x32_epi32(load_bytes(codes + 32 * part), lanes);
      both = _mm256_shuffle_epi8(both, places);
#pragma GCC unroll 2
      for (int row = 0; row < 2; ++row) {
        const __m256i code = codes_of(both, row);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          Floats value[2];
          look_up(code, half, value);
          float* to = tile + row * kCodeColumns + 32 * part + 16 * half;
          store_floats(to, value[0]);
          store_floats(to + 8, value[1]);
        }
      }
    }
  }
}
#else
#if defined(__aarch64__)
// values[kCodeVectors] = the values of 16 codes.
__attribute__((always_inline)) inline void look_up(uint8x16_t codes, Floats* values) {
  static_assert(kCodeColumns == 16);
  const int8x16_t one = vqtbl1q_s8(vld1q_s8(kBookBytes[0]), codes);
  const int8x16_t two = vqtbl1q_s8(vld1q_s8(kBookBytes[1]), codes);
  const uint16x8_t near = vreinterpretq_u16_s8(vzip1q_s8(one, two));
  const uint16x8_t far = vreinterpretq_u16_s8(vzip2q_s8(one, two));
  values[0] = (Floats)vshll_n_u16(vget_low_u16(near), 16);
  values[1] = (Floats)vshll_high_n_u16(near, 16);
  values[2] = (Floats)vshll_n_u16(vget_low_u16(far), 16);
  values[3] = (Floats)vshll_high_n_u16(far, 16);
}
#endif

// low, high[kCodeVectors] = the values of the codes of two weight rows.
__attribute__((always_inline)) inline void look_up(const uint8_t* codes, Floats* low,
                                                   Floats* high) {
#if defined(__AVX512F__)
  const __m512 book = _mm512_loadu_ps(kBook);
  for (int v = 0; v < kCodeVectors; ++v) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + v * kLanes));
    // Of an index the low four bits count.
    __m512i both = _mm512_cvtepu8_epi32(bytes);
    low[v] = _mm512_permutexvar_ps(both, book);
    high[v] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), book);
  }
#elif defined(__aarch64__)
  const uint8x16_t bytes = vld1q_u8(codes);
  look_up(vandq_u8(bytes, vdupq_n_u8(15)), low);
  look_up(vshrq_n_u8(bytes, 4), high);
#else
  for (int c = 0; c < kCodeColumns; ++c) {
    low[c / kLanes][c % kLanes] = kBook[codes[c] & 15];
    high[c / kLanes][c % kLanes] = kBook[codes[c] >> 4];
  }
#endif
}

// out[kRows, columns] += scale * (x @ values).
template <int kRows>
__attribute__((noinline)) void multiply_codes(const Codes& of, const Numbers& numbers, float* out,
                                              int64_t out_stride, Fetcher& fetcher) {
  for (int64_t column = 0; column < of.columns; column += kCodeColumns) {
    fetch_next(of, fetcher);
    Floats sum[kRows][kCodeVectors] = {};
    const uint8_t* codes = of.begin + column;
    const float* x = numbers.x;
    for (int64_t i = 0; i < of.pairs; ++i, codes += of.stride, x += 2 * numbers.stride) {
      Floats low[kCodeVectors], high[kCodeVectors];
      look_up(codes, low, high);
      for (int m = 0; m < kRows; ++m) {
        for (int v = 0; v < kCodeVectors; ++v) {
          sum[m][v] = multiply_add(low[v], x[m], sum[m][v]);
          sum[m][v] = multiply_add(high[v], x[numbers.stride + m], sum[m][v]);
        }
      }
    }
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < kCodeVectors; ++v) {
        const int64_t at = column + v * kLanes;
        float* to = out + m * out_stride + at;
        store_floats(to, multiply_add(sum[m][v], load(of.scale + at), load(to)));
      }
    }
  }
}

// tile[2 * pairs, kCodeColumns] = values, from a column on.
inline void decode(const Codes& of, int64_t column, float* tile) {
  const uint8_t* codes = of.begin + column;
  for (int64_t i = 0; i < of.pairs; ++i, codes += of.stride, tile += 2 * kCodeColumns) {
    Floats low[kCodeVectors], high[kCodeVectors];
    look_up(codes, low, high);
    for (int v = 0; v < kCodeVectors; ++v) {
      store_floats(tile + v * kLanes, low[v]);
      store_floats(tile + kCodeColumns + v * kLanes, high[v]);
    }
  }
}
#endif

// out[kRows, kCodeColumns] += scale * (x @ tile[depth, kCodeColumns]).
template <int kRows>
void multiply_decoded(const float* tile, int64_t depth, const float* scale, const Numbers& numbers,
                      float* out, int64_t out_stride) {
  for (int column = 0; column < kCodeColumns; column += kTileColumns) {
    Floats sum[kRows][kTileVectors];
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[m][v] = Floats{};
    }
    const float *row = tile + column, *x = numbers.x;
    for (int64_t k = 0; k < depth; ++k, row += kCodeColumns, x += numbers.stride) {
      Floats value[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        value[v] = load(row + v * kLanes);
        hold(value[v]);
      }
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sum[m][v] = multiply_add(value[v], x[m], sum[m][v]);
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const int at = column + v * kLanes;
        float* to = out + m * out_stride + at;
        store_floats(to, multiply_add(sum[m][v], load(scale + at), load(to)));
      }
    }
  }
}

}  // namespace grok1
