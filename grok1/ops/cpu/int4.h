// Products of float32 rows with a rectangle of a 4-bit matrix, on one thread.
//
// A group of weight rows at a time is multiplied by all input rows, few or many: by floats, see
// codes.h, or in integers where the processor sums up products of bytes, see digit_products.h. What
// a row gives does not depend on how many there are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "codes.h"
#include "digit_products.h"
#include "digits.h"
#include "int4_matrix.h"
#include "product.h"

namespace grok1 {

constexpr decltype(&multiply_codes<1>) kMultiplyCodes[] = {
    nullptr,           multiply_codes<1>, multiply_codes<2>,
#if defined(__AVX2__)
    multiply_codes<3>, multiply_codes<4>,
#endif
};

constexpr decltype(&multiply_decoded<1>) kMultiplyDecoded[kMaxRows + 1] = {
    nullptr,             multiply_decoded<1>, multiply_decoded<2>, multiply_decoded<3>,
    multiply_decoded<4>, multiply_decoded<5>, multiply_decoded<6>};

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

// out[num_rows, width] += scale * (x @ values). The codes are of as many columns, or of
// kCodeColumns.
inline void multiply_group(const Codes& codes, const Part& part, const Inputs& packed, float* out,
                           int64_t out_stride, Fetcher& fetcher) {
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

// out[num_rows, width] = x @ weight over weight rows `begin` to `end` and `width` columns from
// `column` on.
inline void multiply_packed(const Int4Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                            int64_t width, const Inputs& packed, float* out, int64_t out_stride) {
  for (int64_t m = 0; m < packed.num_rows; ++m) std::fill_n(out + m * out_stride, width, 0.0f);
#if defined(GROK1_DIGITS)
  if (matrix.group == kDigitRows) {
    return multiply_in_digits(matrix, begin, end, column, width, packed, out, out_stride);
  }
#endif
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
