// What lanes of a warp do together.
#pragma once

DEVICE float sum_of_warp(float value) {
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// How many places there are for COUNT: a power of two.
template <int COUNT>
struct Places {
  static constexpr int count = COUNT <= 1 ? 1 : 2 * Places<(COUNT + 1) / 2>::count;
};

template <>
struct Places<1> {
  static constexpr int count = 1;
};

// Lanes that are MASK apart share COUNT numbers, of which each adds up half, the upper those behind. Then
// the same with half of them, until one is left.
template <int MASK, int HALF, int COUNT>
DEVICE void share_sums(float (&sums)[COUNT]) {
  if constexpr (HALF >= 1) {
    const bool is_upper = threadIdx.x & MASK;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      const float kept = is_upper ? sums[i + HALF] : sums[i], given = is_upper ? sums[i] : sums[i + HALF];
      sums[i] = kept + shuffle_xor(given, MASK);
    }
    share_sums<MASK / 2, HALF / 2>(sums);
  }
}

// Adds up each of COUNT numbers over every LANES lanes side by side; both are powers of two. The lanes
// get the sums in order, as many lanes each as there are for one.
template <int LANES, int COUNT>
DEVICE float sums_of_lanes(float (&sums)[COUNT]) {
  share_sums<LANES / 2, COUNT / 2>(sums);
#pragma unroll
  for (int mask = LANES / COUNT / 2; mask >= 1; mask /= 2) sums[0] += shuffle_xor(sums[0], mask);
  return sums[0];
}

// The largest number of the first COUNT lanes, a power of two, in each of them.
template <int COUNT>
DEVICE float largest_of_lanes(float value) {
#pragma unroll
  for (int mask = COUNT / 2; mask >= 1; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}
