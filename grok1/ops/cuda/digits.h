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
  static DEVICE void write(float steps, signed char* to, long long apart) {
    const unsigned all = with_carries(steps);
#pragma unroll
    for (int digit = 0; digit < DIGITS; ++digit)
      to[digit * apart] = (signed char)((all >> 8 * (DIGITS - 1 - digit) & 255) ^ 128);
  }

  // The same of four numbers side by side, whose digits are words.
  static DEVICE void write(const float (&steps)[4], signed char* to, long long apart) {
    unsigned lower[2], upper[2];  // two bytes of two numbers each
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned first = with_carries(steps[2 * i]), second = with_carries(steps[2 * i + 1]);
      lower[i] = pick_bytes(first, second, 0x5140), upper[i] = pick_bytes(first, second, 0x7362);
    }
#pragma unroll
    for (int digit = 0; digit < DIGITS; ++digit) {
      const int byte = DIGITS - 1 - digit;
      const auto& two = byte >= 2 ? upper : lower;
      const unsigned word = pick_bytes(two[0], two[1], byte % 2 ? 0x7632 : 0x5410);
      *reinterpret_cast<unsigned*>(to + digit * apart) = word ^ 0x80808080u;
    }
  }

 private:
  // Bytes that are 128 more than the digits.
  static DEVICE unsigned with_carries(float steps) { return (unsigned)nearest(steps) + 0x80808080u; }
};

// Which number of a unit a lane has as its i-th of EACH: four side by side, where it has so many.
template <int EACH>
DEVICE int place_in_unit(int i) {
  const int lane = threadIdx.x % 32;
  return EACH % 4 == 0 ? 128 * (i / 4) + 4 * lane + i % 4 : 32 * i + lane;
}

template <int EACH>
DEVICE void read_unit(const float* from, float (&values)[EACH]) {
  if constexpr (EACH % 4 == 0) {
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + place_in_unit<EACH>(i));
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i) values[i] = from[place_in_unit<EACH>(i)];
  }
}

// The digits of a unit of numbers: `to[digit * apart + k]`. They are to be multiplied by the unit's
// factor; a quarter of that is written, since the scales of groups come times 4. All lanes of a warp
// call it, with the numbers of `place_in_unit`.
template <int DIGITS, int EACH>
DEVICE void write_digits(const float (&values)[EACH], signed char* to, long long apart, float* factor) {
  unsigned largest = 0;  // as bits, of which those of no number are the largest
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const unsigned size = bits_of_float(values[i]) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  const Steps<DIGITS> steps(float_of_bits(largest_of_warp(largest)));
  const float inverse = steps.inverse();
  if (threadIdx.x % 32 == 0) *factor = steps.template factor<2>();
  if constexpr (EACH % 4 == 0) {
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
      const float four[4] = {values[i] * inverse, values[i + 1] * inverse, values[i + 2] * inverse,
                             values[i + 3] * inverse};
      steps.write(four, to + place_in_unit<EACH>(i), apart);
    }
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i) steps.write(values[i] * inverse, to + place_in_unit<EACH>(i), apart);
  }
}

// digits[row][digit] and factors[row][unit] of rows of K numbers. Grid: rows, WARPS units of a row
// each.
//
// S has K, UNIT, DIGITS, WARPS.
template <class S>
DEVICE void digits_of(const float* x, signed char* digits, float* factors) {
  constexpr int UNITS = S::K / S::UNIT, EACH = S::UNIT / 32;
  const int unit = blockIdx.y * S::WARPS + threadIdx.x / 32;
  if (unit >= UNITS) return;
  const long long row = blockIdx.x;
  float values[EACH];
  read_unit(x + row * S::K + unit * S::UNIT, values);
  write_digits<S::DIGITS>(values, digits + row * S::DIGITS * S::K + unit * S::UNIT, S::K,
                          factors + row * UNITS + unit);
}
