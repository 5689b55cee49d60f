// Floats that lie side by side, read and written by fours where they can be: their place is a multiple
// of 16 bytes where their number is one of four, and of 8 where they are two.
#pragma once

template <int COUNT>
DEVICE void read_floats(const float* from, float (&numbers)[COUNT]) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      numbers[i] = four.x, numbers[i + 1] = four.y, numbers[i + 2] = four.z, numbers[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) numbers[i] = from[i];
  }
}

// Calls run(i, number) for each.
template <int COUNT, class Run>
DEVICE void for_each(const float (&numbers)[COUNT], Run run) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) run(i, numbers[i]);
}

template <int COUNT>
DEVICE void write_floats(const float (&numbers)[COUNT], float* to) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const float4 four = {numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]};
      *reinterpret_cast<float4*>(to + i) = four;
    }
  } else if constexpr (COUNT == 2) {
    *reinterpret_cast<float2*>(to) = {numbers[0], numbers[1]};
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = numbers[i];
  }
}
