// Rows in terms of bfloat16, as products of many rows copy them.
#pragma once

// terms[row][tile][term][k of the tile's 16]: each is what those before it leave, rounded. Grid: rows,
// blocks of THREADS times four numbers.
//
// S has K, TERMS, THREADS.
template <class S>
DEVICE void split(const float* x, unsigned short* terms) {
  const int at = 4 * (blockIdx.y * S::THREADS + threadIdx.x);
  if (at >= S::K) return;
  const long long row = blockIdx.x;
  float left[4];
  read_floats(x + row * S::K + at, left);
  unsigned short* to = terms + (row * S::K + at / 16 * 16) * S::TERMS + at % 16;
#pragma unroll
  for (int term = 0; term < S::TERMS; ++term) {
    const unsigned first = bfloats(left[0], left[1]), second = bfloats(left[2], left[3]);
    *reinterpret_cast<uint2*>(to + 16 * term) = {first, second};
    // The bits of a pair are taken apart, which no compiler takes for a conversion that it may drop.
    left[0] -= float_of_bits(first << 16), left[1] -= float_of_bits(first & 0xffff0000u);
    left[2] -= float_of_bits(second << 16), left[3] -= float_of_bits(second & 0xffff0000u);
  }
}
