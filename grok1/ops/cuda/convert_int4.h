// One 4-bit matrix of a stack as bfloat16, times its scales: as convert.h.
#pragma once

// The scales of a group of four columns, plus 32, side by side; `subscales` has the first column's.
DEVICE unsigned biased_scales(const unsigned char* subscales, long long columns, int group) {
  const unsigned low = *reinterpret_cast<const unsigned*>(subscales + group / 2 * columns);
  const unsigned high = *reinterpret_cast<const unsigned*>(subscales + (4 + group / 4) * columns);
  return (low >> group % 2 * 4 & 0x0f0f0f0fu) | (high >> group % 4 * 2 & 0x03030303u) << 4;
}

// Grid: blocks of 256 columns, blocks of WARPS * ROWS pairs of rows. A warp takes ROWS pairs of its
// columns, all of which are of one group.
//
// S has K, N, BLOCK, GROUP (rows of either), ROWS, WARPS.
template <class S>
DEVICE void convert_int4(const unsigned char* stack, const unsigned char* subscales,
                         const unsigned short* scales, const int* number, unsigned short* copy) {
  constexpr int BLOCKS = S::K / S::BLOCK, PAIRS = S::K / 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = (blockIdx.x * 32 + lane) * 8;
  const int pair = (blockIdx.y * S::WARPS + warp) * S::ROWS;
  if (column >= S::N || pair >= PAIRS) return;
  const unsigned char* matrix = stack + (long long)number[0] * PAIRS * S::N;
  unsigned words[S::ROWS][2];
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i)
    load_once(matrix + (long long)(pair + i) * S::N + column, words[i]);
  const long long block = (long long)number[0] * BLOCKS + 2 * pair / S::BLOCK;
  const int group = 2 * pair % S::BLOCK / S::GROUP;
  float factors[8];
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const unsigned four = biased_scales(subscales + 6 * block * S::N + column + j, S::N, group);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      factors[j + i] = float_of_half(scales[block * S::N + column + j + i]) *
                       ((int)(four >> 8 * i & 255) - 32);
  }
  const Book book;
#pragma unroll
  for (int i = 0; i < S::ROWS; ++i) {
    EightNumbers rows[2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      unsigned lower[2], upper[2];
      book.read(words[i][j / 2], lower, upper);
      const unsigned four = Book::together(j % 2 ? upper : lower);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float values[2];
#pragma unroll
        for (int next = 0; next < 2; ++next)
          values[next] =
              (float)(signed char)(four >> (8 * row + 16 * next) & 255) * factors[2 * j + next];
        rows[row].pairs[j] = bfloats(values[0], values[1]);
      }
    }
    *(EightNumbers*)(copy + (long long)(2 * (pair + i)) * S::N + column) = rows[0];
    *(EightNumbers*)(copy + (long long)(2 * (pair + i) + 1) * S::N + column) = rows[1];
  }
}
