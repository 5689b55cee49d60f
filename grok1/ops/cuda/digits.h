// Floats as digits, for products of integers.
#pragma once

// Digits to the base 256, from -128 to 127, of a unit of numbers: `to[digit * apart + k]`, the highest
// digit first. They are to be multiplied by the unit's factor; a quarter of that is written, since
// the scales of groups come times 4. All lanes of a warp call it, of which each has every 32nd number.
template <int DIGITS, int EACH>
DEVICE void write_digits(const float (&values)[EACH], signed char* to, long long apart, float* factor) {
  constexpr int BITS = 8 * DIGITS - 1;
  const int lane = threadIdx.x % 32;
  float largest = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) largest = larger(fabsf(values[i]), largest);
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) largest = larger(shuffle_xor(largest, mask), largest);
  // A power of two, so that nothing is rounded but what is below the last digit. The highest digit
  // is to be at most 127, and what is too small for a power in float32 is as good as zero.
  const unsigned found = bits_of_float(largest * 1.01f) >> 23;
  const unsigned exponent = found < 40 ? 40 : found;
  const float inverse = float_of_bits((253 + BITS - exponent) << 23);
  const bool is_number = found < 255;
  if (lane == 0) *factor = float_of_bits(is_number ? (exponent - BITS - 1) << 23 : 0x7fc00000u);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const unsigned all = (unsigned)nearest(is_number ? values[i] * inverse : 0) + 0x80808080u;
#pragma unroll
    for (int digit = 0; digit < DIGITS; ++digit)
      to[digit * apart + 32 * i + lane] =
          (signed char)((all >> 8 * (DIGITS - 1 - digit) & 255) ^ 128);
  }
}

// digits[row][digit] and factors[row][unit] of rows of K numbers. Grid: rows, WARPS units of a row
// each.
//
// S has K, UNIT, DIGITS, WARPS.
template <class S>
DEVICE void digits_of(const float* x, signed char* digits, float* factors) {
  constexpr int UNITS = S::K / S::UNIT, EACH = S::UNIT / 32;
  const int unit = blockIdx.y * S::WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (unit >= UNITS) return;
  const long long row = blockIdx.x;
  const float* from = x + row * S::K + unit * S::UNIT + lane;
  float values[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) values[i] = from[32 * i];
  write_digits<S::DIGITS>(values, digits + row * S::DIGITS * S::K + unit * S::UNIT, S::K,
                          factors + row * UNITS + unit);
}
