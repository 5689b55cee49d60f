// Floats as digits, for products of integers.
#pragma once

// How numbers up to a largest one become digits to the base 256, from -128 to 127: by a power of two,
// so that nothing is rounded but what is below the last digit. The highest digit is to be at most
// 127, and what is too small for a power in float32 is as good as zero.
template <int DIGITS>
struct Steps {
  static constexpr int BITS = 8 * DIGITS - 1;
  unsigned exponent;
  bool is_number;

  DEVICE explicit Steps(float largest) {
    const unsigned found = bits_of_float(largest * 1.01f) >> 23;
    exponent = found < 40 ? 40 : found;
    is_number = found < 255;
  }

  // What a number is multiplied by, before it is rounded.
  DEVICE float inverse() const { return float_of_bits((253 + BITS - exponent) << 23); }

  // A 2**-SHIFT of what the number that the digits are is to be multiplied by; NaN for no number.
  template <int SHIFT>
  DEVICE float factor() const {
    return float_of_bits(is_number ? (exponent - BITS + 1 - SHIFT) << 23 : 0x7fc00000u);
  }

  // Writes the digits of a number of steps, the highest first.
  DEVICE void write(float steps, signed char* to, long long apart) const {
    const unsigned all = (unsigned)nearest(is_number ? steps : 0) + 0x80808080u;
#pragma unroll
    for (int digit = 0; digit < DIGITS; ++digit)
      to[digit * apart] = (signed char)((all >> 8 * (DIGITS - 1 - digit) & 255) ^ 128);
  }
};

// The digits of a unit of numbers: `to[digit * apart + k]`. They are to be multiplied by the unit's
// factor; a quarter of that is written, since the scales of groups come times 4. All lanes of a warp
// call it, of which each has every 32nd number.
template <int DIGITS, int EACH>
DEVICE void write_digits(const float (&values)[EACH], signed char* to, long long apart, float* factor) {
  const int lane = threadIdx.x % 32;
  float largest = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) largest = larger(fabsf(values[i]), largest);
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) largest = larger(shuffle_xor(largest, mask), largest);
  const Steps<DIGITS> steps(largest);
  const float inverse = steps.inverse();
  if (lane == 0) *factor = steps.template factor<2>();
#pragma unroll
  for (int i = 0; i < EACH; ++i) steps.write(values[i] * inverse, to + 32 * i + lane, apart);
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
