// A 4-bit matrix: where its codes and scales lie, and what they stand for.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "codes.h"
#include "product.h"

namespace grok1 {

constexpr int kCodeRows = 6;  // rows of bytes with the scales of a block's groups

// Most columns that a group is walked along: the longer the runs of memory the better.
constexpr int64_t kCodePanel = 8192;

inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#elif defined(__aarch64__)
  __fp16 value;
  std::memcpy(&value, &half, sizeof(value));
  return value;
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

// Memory of this thread for the scales of two panels. Never inlined: the address would be asked for
// at every use.
__attribute__((noinline)) inline float* memory_of_scales() {
  alignas(kCacheLine) static thread_local float memory[2 * kCodePanel];
  return memory;
}

}  // namespace grok1
