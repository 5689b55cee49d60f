// Blocks that make parts of one result: which of them is the last, and may put the parts together.
#pragma once

// How many have come, of those of each of some results.
template <class S, int RESULTS>
LASTING unsigned arrivals[RESULTS];

// Whether this is the last of `count` blocks that make parts of a result; every thread calls it.
template <class S, int RESULTS = S::COLUMN_TILES>
DEVICE bool is_last_of(int result, int count) {
  __shared__ bool is_last;
  barrier();
  if (threadIdx.x == 0) is_last = arrive_last(arrivals<S, RESULTS> + result, count);
  barrier();
  return is_last;
}

// Adds to four numbers side by side what COUNT blocks have published, in their order.
template <int COUNT>
DEVICE void add_published(float4& sum, const float* first, long long stride) {
  constexpr int AT_ONCE = 8;  // on their way; more take registers of other blocks
#pragma unroll
  for (int from = 0; from < COUNT; from += AT_ONCE) {
    float4 more[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (from + i < COUNT)
        more[i] = read_published(reinterpret_cast<const float4*>(first + (from + i) * stride));
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (from + i < COUNT)
        sum.x += more[i].x, sum.y += more[i].y, sum.z += more[i].z, sum.w += more[i].w;
  }
}
