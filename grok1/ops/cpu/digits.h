// Products of float32 rows with a group of weight rows of a 4-bit matrix, in integers.
//
// A row's numbers for a group become integers, in steps of a power of two of which the largest of
// them takes about 2^22 or more: an error is up to 2^-23 of that number. Each integer is three
// digits from -128 to 127, and the processor sums up products of digits and values, both of them
// bytes, without error. So the bits are the same in whatever order and beside whatever rows.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "codes.h"
#include "product.h"

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define GROK1_DIGITS

namespace grok1 {

// Weight rows of a group whose products are taken in digits.
constexpr int64_t kDigitRows = 32;

// A row's numbers for a group, in the memory of the floats that they were.
struct __attribute__((may_alias)) Digits {
  // Of eight weight rows those of even places first: in this order codes come out of bytes.
  int8_t low[kDigitRows], middle[kDigitRows], high[kDigitRows];
  int32_t low_start, middle_start;  // what the sums of products begin with
  float step;
  char unused[20];
};
static_assert(sizeof(Digits) == kDigitRows * sizeof(float));

// What is added to a value: it is multiplied as an unsigned byte.
constexpr int kBias = 128;

inline __m512i biased_book() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166,
                                              181, 197, 217, 241));
}

// The digits of numbers[kDigitRows].
inline Digits digits_of(const float* numbers) {
  const __m512i sign = _mm512_set1_epi32(0x80000000);
  const __m512 first = _mm512_loadu_ps(numbers), second = _mm512_loadu_ps(numbers + 16);
  const __m512i sizes = _mm512_max_epu32(_mm512_andnot_si512(sign, _mm512_castps_si512(first)),
                                         _mm512_andnot_si512(sign, _mm512_castps_si512(second)));
  const uint32_t largest = _mm512_reduce_max_epu32(sizes);
  Digits digits{};
  if (largest >= 0x7F800000) {
    // Not finite: nor is what comes of it.
    digits.step = __builtin_nanf("");
    return digits;
  }
  // Three digits reach to 0x7F7F7F: numbers of a power of two that are beyond go with the next.
  const int exponent = (largest + 0x10101) >> 23;
  const int shift = std::min(149 - exponent, 126);  // what a float32 can be the power of two of
  const __m512 steps = _mm512_castsi512_ps(_mm512_set1_epi32((127 + shift) << 23));
  // The digits as bytes: adding half of each digit's range makes the carries.
  const __m512i half = _mm512_set1_epi32(0x808080);
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  __m512i sums{}, low_sums{};
  for (int part = 0; part < 2; ++part) {
    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(part == 0 ? first : second, steps));
    whole = _mm512_permutexvar_epi32(order, whole);
    const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(whole, half), half);
    const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(bytes, 24), 24);
    auto store = [&](int8_t* to, __m512i digit) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * part), _mm512_cvtepi32_epi8(digit));
    };
    store(digits.low, bytes);
    store(digits.middle, _mm512_srli_epi32(bytes, 8));
    store(digits.high, _mm512_srli_epi32(bytes, 16));
    sums = _mm512_add_epi32(sums, whole);
    low_sums = _mm512_add_epi32(low_sums, low);
  }
  // Without the bias of the values.
  const int32_t low_sum = _mm512_reduce_add_epi32(low_sums);
  digits.low_start = -kBias * low_sum;
  digits.middle_start = -kBias * ((_mm512_reduce_add_epi32(sums) - low_sum) / 256);
  const uint32_t step = (127 - shift) << 23;
  std::memcpy(&digits.step, &step, sizeof(step));
  return digits;
}

// The digits of packed[depth, num_rows], in their place: [depth / kDigitRows, num_rows].
inline void replace_by_digits(float* packed, int64_t num_rows, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kDigitRows, packed += kDigitRows * num_rows) {
    float numbers[kFewRows * kDigitRows];
    for (int64_t i = 0; i < kDigitRows; ++i) {
      for (int64_t m = 0; m < num_rows; ++m) numbers[m * kDigitRows + i] = packed[i * num_rows + m];
    }
    for (int64_t m = 0; m < num_rows; ++m) {
      const Digits digits = digits_of(numbers + m * kDigitRows);
      std::memcpy(packed + m * kDigitRows, &digits, sizeof(digits));
    }
  }
}

}  // namespace grok1

#endif
