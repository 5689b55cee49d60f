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

constexpr int kFours = kDigitRows / 4;

// Values of kCodeColumns columns: of each vector of columns, four weight rows side by side, one
// column after the other.
struct alignas(kCacheLine) Fours {
  __m512i values[kFours][kCodeVectors];
};

// Sums of products of a row with the values of kCodeColumns columns.
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

  // out[kCodeColumns] += scale * sums
  __attribute__((always_inline)) void add_to(const Digits& x, const float* scale, float* out) {
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; ++v) {
      const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(high[v], 8), middle[v]);
      const Floats sum = multiply_add((Floats)_mm512_cvtepi32_ps(upper), Floats{} + 256.0f,
                                      (Floats)_mm512_cvtepi32_ps(low[v]));
      const Floats product = sum * x.step;
      float* to = out + v * kLanes;
      store_floats(to, multiply_add(product, load(scale + v * kLanes), load(to)));
    }
  }
};

// Looks up the values of codes from a column on. If kMultiplies, out[kCodeColumns] += scale *
// (numbers @ values): between products that takes less time than before them. If kKeeps, the values
// are for more rows.
template <bool kMultiplies, bool kKeeps>
__attribute__((noinline)) void multiply_first(const Codes& of, int64_t column, const Digits& x,
                                              Fours& fours, float* out, Fetcher& fetcher) {
  // Interleaving bytes, then pairs of them, keeps to lanes of 16: what shall become a vector of
  // columns is therefore spread over the lanes first.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  // A copy: the caller's would be written to memory at every step.
  Fetcher ahead = fetcher;
  DigitSums sums(x);
  const uint8_t* codes = of.begin + column;
#pragma GCC unroll 4
  for (int i = 0; i < kFours; i += 2) {
    __m512i bytes[4], values[2][kCodeVectors];
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row, codes += of.stride) {
      ahead.fetch();
      __builtin_prefetch(codes + kCodeColumns, 0, 3);
      bytes[row] = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
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
  if (kMultiplies) sums.add_to(x, of.scale + column, out);
  fetcher = ahead;
}

// out[kRows, kCodeColumns] += scale * (numbers @ values), with values that were kept. The sums of two
// rows are more at a time than a product takes cycles, and share the values.
template <int kRows>
__attribute__((noinline)) void multiply_fours(const Fours& fours, const Digits* x,
                                              const float* scale, float* out, int64_t out_stride) {
  DigitSums first(x[0]), second(x[kRows - 1]);
#pragma GCC unroll 8
  for (int i = 0; i < kFours; ++i) {
    first.add(x[0], i, fours.values[i]);
    if (kRows == 2) second.add(x[1], i, fours.values[i]);
    // Registers hold what four weight rows need, and no more.
    asm volatile("" ::: "memory");
  }
  first.add_to(x[0], scale, out);
  if (kRows == 2) second.add_to(x[1], scale, out + out_stride);
}

}  // namespace grok1

#endif
