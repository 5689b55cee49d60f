// Products of float32 rows with a rectangle of a 4-bit matrix, on one thread.
//
// A group of weight rows at a time is multiplied by all input rows, few or many: by floats, see
// codes.h, or in integers where the processor sums up products of bytes, see digits.h. What a row
// gives does not depend on how many there are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "codes.h"
#include "digits.h"
#include "product.h"

namespace grok1 {

constexpr int kCodeRows = 6;  // rows of bytes with the scales of a block's groups

// Most columns that a group is walked along: the longer the runs of memory the better.
constexpr int64_t kCodePanel = 8192;

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

  const uint8_t* address(int64_t k, int64_t column) const {
    return values + k / 2 * columns + column;
  }

  // to[width] = the scales of the block of weight row k, from a column on.
  void block_scales(int64_t k, int64_t column, int64_t width, float* __restrict to) const {
    const uint16_t* from = scales + k / block * columns + column;
    int64_t c = 0;
#if defined(__AVX2__) && defined(__F16C__)
    for (; c + 8 <= width; c += 8) {
      __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c));
      _mm256_storeu_ps(to + c, _mm256_cvtph_ps(halves));
    }
#endif
    for (; c < width; ++c) to[c] = half_to_float(from[c]);
  }

  // to[width] = the scales of the group of weight row k, from a column on, times those of its
  // block: 6 bits times 11 are exact.
  void group_scales(int64_t k, int64_t column, int64_t width, const float* of_block,
                    float* __restrict to) const {
    const int64_t number = k % block / group;
    const uint8_t* rows = subscales + k / block * kCodeRows * columns + column;
    const uint8_t *low = rows + number / 2 * columns, *high = rows + (4 + number / 4) * columns;
    const int low_shift = 4 * (number % 2), high_shift = 2 * (number % 4);
    int64_t c = 0;
#if defined(__AVX2__)
    const __m128i low_count = _mm_cvtsi32_si128(low_shift);
    const __m128i high_count = _mm_cvtsi32_si128(high_shift);
    for (; c + 32 <= width; c += 32) {
      __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + c));
      __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + c));
      one = _mm256_and_si256(_mm256_srl_epi16(one, low_count), _mm256_set1_epi8(15));
      two = _mm256_and_si256(_mm256_srl_epi16(two, high_count), _mm256_set1_epi8(3));
      one = _mm256_or_si256(one, _mm256_slli_epi16(two, 4));
      alignas(32) int8_t whole[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(whole),
                         _mm256_sub_epi8(one, _mm256_set1_epi8(32)));
      for (int v = 0; v < 32; v += kLanes) {
        store_floats(to + c + v, load(whole + v) * load(of_block + c + v));
      }
    }
#endif
    for (; c < width; ++c) {
      int bits = (low[c] >> low_shift & 15) | (high[c] >> high_shift & 3) << 4;
      to[c] = static_cast<float>(bits - 32) * of_block[c];
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

constexpr decltype(&multiply_codes<1>) kMultiplyCodes[] = {
    nullptr,           multiply_codes<1>, multiply_codes<2>,
#if defined(__AVX2__)
    multiply_codes<3>, multiply_codes<4>,
#endif
};

constexpr decltype(&multiply_decoded<1>) kMultiplyDecoded[kMaxRows + 1] = {
    nullptr,             multiply_decoded<1>, multiply_decoded<2>, multiply_decoded<3>,
    multiply_decoded<4>, multiply_decoded<5>, multiply_decoded<6>};

// Input rows as multiply_few and multiply_many get them, in passes of up to kMaxRows.
struct Inputs {
  const float* x;
  int64_t begin;     // the weight row of the first numbers
  int64_t num_rows;
  int64_t x_depth;   // of a block of rows; 0 if all rows lie side by side

  int64_t num_passes() const { return num_blocks(num_rows); }

  int64_t first_of(int64_t pass) const {
    return x_depth > 0 ? std::min(num_rows, pass * kMaxRows) : num_rows * pass / num_passes();
  }

  Numbers numbers(int64_t pass, int64_t k) const {
    const int64_t first = first_of(pass), rows = first_of(pass + 1) - first;
    if (x_depth > 0) return {x + first * x_depth + (k - begin) * rows, rows};
    return {x + (k - begin) * num_rows + first, num_rows};
  }
};

// What there is of a group of weight rows: from weight row `begin` to `end`, and so many columns.
struct Part {
  int64_t group, begin, end, width;
};

// The numbers of a pass for all weight rows of a group: those that are not of a part are zero.
inline Numbers numbers_of(const Inputs& packed, int64_t pass, const Part& part, int64_t depth,
                          float* some) {
  Numbers numbers = packed.numbers(pass, part.group);
  if (part.begin == part.group && part.end == part.group + depth) return numbers;
  const int64_t rows = packed.first_of(pass + 1) - packed.first_of(pass);
  std::fill_n(some, depth * rows, 0.0f);
  for (int64_t k = part.begin - part.group; k < part.end - part.group; ++k) {
    std::copy_n(numbers.x + k * numbers.stride, rows, some + k * rows);
  }
  return {some, rows};
}

#if defined(GROK1_DIGITS)
// out[num_rows, width] += scale * (x @ values), of up to kCodeColumns columns.
inline void multiply_kept(const Fours& fours, const Digits* x, int64_t num_rows,
                          const float* scale, float* out, int64_t out_stride, int64_t width) {
  for (int64_t m = 0; m < num_rows && width < kCodeColumns; ++m) {
    float sums[kCodeColumns];
    std::copy_n(out + m * out_stride, width, sums);
    multiply_fours<1>(fours, x + m, scale, sums, 0);
    std::copy_n(sums, width, out + m * out_stride);
  }
  if (width < kCodeColumns) return;
  for (; num_rows >= 2; num_rows -= 2, x += 2, out += 2 * out_stride) {
    multiply_fours<2>(fours, x, scale, out, out_stride);
  }
  if (num_rows == 1) multiply_fours<1>(fours, x, scale, out, 0);
}

// As multiply_group, in digits: two rows at a time, and of a few that are odd in number one while
// values are looked up. Segments begin and end where such groups do.
inline void multiply_in_digits(const Codes& codes, const Part& part, const Inputs& packed,
                               float* out, int64_t out_stride, Fetcher& fetcher) {
  const int64_t passes = packed.x_depth > 0 ? packed.num_passes() : 1;
  const int64_t width = std::min<int64_t>(part.width, kCodeColumns);
  const bool is_odd = passes == 1 && packed.num_rows % 2 == 1 && width == kCodeColumns;
  Fours fours;
  for (int64_t column = 0; column < codes.columns; column += kCodeColumns, out += kCodeColumns) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      const Digits* x = reinterpret_cast<const Digits*>(packed.numbers(pass, part.group).x);
      int64_t m = pass > 0 ? packed.first_of(pass) : 0;
      const int64_t end = pass + 1 < passes ? packed.first_of(pass + 1) : packed.num_rows;
      if (pass == 0 && !is_odd) {
        multiply_first<false, true>(codes, column, *x, fours, out, fetcher);
      } else if (pass == 0 && end == 1) {
        multiply_first<true, false>(codes, column, *x, fours, out, fetcher);
      } else if (pass == 0) {
        multiply_first<true, true>(codes, column, *x, fours, out, fetcher);
      }
      if (pass == 0 && is_odd) ++m, ++x;
      multiply_kept(fours, x, end - m, codes.scale + column, out + m * out_stride, out_stride,
                    width);
    }
  }
}
#endif

// out[num_rows, width] += scale * (x @ values). The codes are of as many columns, or of
// kCodeColumns.
inline void multiply_group(const Codes& codes, const Part& part, const Inputs& packed, float* out,
                           int64_t out_stride, Fetcher& fetcher) {
#if defined(GROK1_DIGITS)
  if (2 * codes.pairs == kDigitRows) {
    return multiply_in_digits(codes, part, packed, out, out_stride, fetcher);
  }
#endif
  const int64_t depth = 2 * codes.pairs, passes = packed.num_passes();
  const bool is_direct = packed.num_rows <= kMostDirect, is_edge = part.width < codes.columns;
  const int64_t step = is_direct ? codes.columns : kCodeColumns;
  alignas(kCacheLine) float tile[kMostGroupRows * kCodeColumns];
  for (int64_t column = 0; column < codes.columns; column += step) {
    if (!is_direct) {
      fetch_next(codes, fetcher);
      decode(codes, column, tile);
    }
    for (int64_t pass = 0; pass < passes; ++pass) {
      float some[kMostGroupRows * kMaxRows], sums[kMaxRows * kCodeColumns];
      const Numbers numbers = numbers_of(packed, pass, part, depth, some);
      const int64_t first = packed.first_of(pass), rows = packed.first_of(pass + 1) - first;
      float* of_pass = out + first * out_stride + column;
      for (int64_t m = 0; m < rows && is_edge; ++m) {
        std::copy_n(of_pass + m * out_stride, part.width, sums + m * kCodeColumns);
      }
      float* to = is_edge ? sums : of_pass;
      const int64_t stride = is_edge ? kCodeColumns : out_stride;
      if (is_direct) {
        kMultiplyCodes[rows](codes, numbers, to, stride, fetcher);
      } else {
        kMultiplyDecoded[rows](tile, depth, codes.scale + column, numbers, to, stride);
      }
      for (int64_t m = 0; m < rows && is_edge; ++m) {
        std::copy_n(sums + m * kCodeColumns, part.width, of_pass + m * out_stride);
      }
    }
  }
}

// As multiply_group, for fewer than kCodeColumns columns: from a copy of what there is of them.
inline void multiply_edge(const Codes& codes, const Part& part, const Inputs& packed, float* out,
                          int64_t out_stride, Fetcher& fetcher) {
  uint8_t bytes[kMostGroupRows / 2 * kCodeColumns] = {};
  float scale[kCodeColumns] = {};
  for (int64_t i = 0; i < codes.pairs; ++i) {
    std::memcpy(bytes + i * kCodeColumns, codes.begin + i * codes.stride, part.width);
  }
  std::copy_n(codes.scale, part.width, scale);
  const Codes copied{bytes, kCodeColumns, codes.pairs, kCodeColumns, scale};
  multiply_group(copied, part, packed, out, out_stride, fetcher);
}

// Memory of this thread for the scales of two panels. Never inlined: the address would be asked for
// at every use.
__attribute__((noinline)) inline float* memory_of_scales() {
  alignas(kCacheLine) static thread_local float memory[2 * kCodePanel];
  return memory;
}

// out[num_rows, width] = x @ weight over weight rows `begin` to `end` and `width` columns from
// `column` on.
inline void multiply_packed(const Int4Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                            int64_t width, const Inputs& packed, float* out, int64_t out_stride) {
  for (int64_t m = 0; m < packed.num_rows; ++m) std::fill_n(out + m * out_stride, width, 0.0f);
  float *of_block = memory_of_scales(), *scale = of_block + kCodePanel;
  const int64_t start = begin / matrix.group * matrix.group;
  for (int64_t first = 0; first < width; first += kCodePanel) {
    const int64_t panel = std::min(kCodePanel, width - first), at = column + first;
    const int64_t whole = panel / kCodeColumns * kCodeColumns;
    for (int64_t k = start, next; k < end; k = next) {
      next = k + matrix.group;
      if (k == start || k % matrix.block == 0) matrix.block_scales(k, at, panel, of_block);
      matrix.group_scales(k, at, panel, of_block, scale);
      // Behind the last group come the next columns of the first.
      const uint8_t* later =
          next < end ? matrix.address(next, at) : matrix.address(start, at + panel);
      Fetcher fetcher{reinterpret_cast<const int8_t*>(later), matrix.columns, panel};
      Part part{k, std::max(k, begin), std::min(next, end), whole};
      Codes codes{matrix.address(k, at), matrix.columns, matrix.group / 2, whole, scale};
      multiply_group(codes, part, packed, out + first, out_stride, fetcher);
      if (whole == panel) continue;
      part.width = panel - whole;
      codes.begin += whole;
      codes.scale += whole;
      multiply_edge(codes, part, packed, out + first + whole, out_stride, fetcher);
    }
  }
}

// As for int8 matrices, in product.h: groups of as many rows as digits are for take these.
inline void prepare([[maybe_unused]] const Int4Matrix& matrix, [[maybe_unused]] float* packed,
                    [[maybe_unused]] int64_t num_rows, [[maybe_unused]] int64_t depth) {
#if defined(GROK1_DIGITS)
  if (matrix.group == kDigitRows) replace_by_digits(packed, num_rows, depth);
#endif
}

// As for int8 matrices, in product.h.
constexpr int64_t most_few(const Int4Matrix&) { return kFewRows; }

// As for int8 matrices, in product.h.
inline void multiply_few(const Int4Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                         int64_t width, const float* x, int64_t num_rows, float* out,
                         int64_t out_stride) {
  multiply_packed(matrix, begin, end, column, width, {x, begin, num_rows, 0}, out, out_stride);
}

// As for int8 matrices, in product.h.
inline void multiply_many(const Int4Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                          int64_t width, const Packed& x, float* out, int64_t out_stride) {
  multiply_packed(matrix, begin, end, column, width, {x.blocks, 0, x.num_rows, x.depth}, out,
                  out_stride);
}

}  // namespace grok1
