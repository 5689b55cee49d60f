// One quantised matrix of a stack as floats of 16 bits, for products of many rows.
#pragma once

struct alignas(16) EightNumbers {
  unsigned pairs[4];
};

// Grid: blocks of 256 columns, blocks of WARPS * ROWS rows. A warp takes ROWS rows of its columns, all of
// which have one scale; all are read before the first is written.
//
// S has K, N, GROUP (rows of a scale, which is multiplied by `factor`; 0 where scales are left to the
// product), ROWS, WARPS, HALVES (float16; else bfloat16).
template <class S>
DEVICE void convert(const signed char* stack, const unsigned short* scales, const int* number,
                    const float* factor, unsigned short* copy) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = (blockIdx.x * 32 + lane) * 8;
  const int row = (blockIdx.y * S::WARPS + warp) * S::ROWS;
  if (column >= S::N || row >= S::K) return;
  const signed char* matrix = stack + (long long)number[0] * S::K * S::N;
  unsigned words[S::ROWS][2];
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i)
    load_once(matrix + (long long)(row + i) * S::N + column, words[i]);
  float factors[8];
  if (S::GROUP) {
    constexpr int GROUP = S::GROUP ? S::GROUP : S::K;
    const long long of = ((long long)number[0] * (S::K / GROUP) + row / GROUP) * S::N + column;
#pragma unroll
    for (int j = 0; j < 8; ++j) factors[j] = float_of_bits((unsigned)scales[of + j] << 16) * factor[0];
  }
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) {
    EightNumbers out;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const unsigned word = words[i][j / 4] >> (j % 4 * 8);
      float low = (signed char)(word & 255), high = (signed char)(word >> 8 & 255);
      if (S::GROUP) low *= factors[j], high *= factors[j + 1];
      out.pairs[j / 2] = S::HALVES ? halves(low, high) : bfloats(low, high);
    }
    *(EightNumbers*)(copy + (long long)(row + i) * S::N + column) = out;
  }
}
