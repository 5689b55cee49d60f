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

// Adds to four numbers side by side what COUNT blocks have published, in their order; place(i) is where,
// or null where nothing is.
template <int COUNT, class Place>
DEVICE void add_published(float4& sum, Place place) {
  constexpr int AT_ONCE = 16;  // on their way, while nothing else is in registers
#pragma unroll
  for (int from = 0; from < COUNT; from += AT_ONCE) {
    float4 more[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      more[i] = {0, 0, 0, 0};
      const float* const at = from + i < COUNT ? place(from + i) : nullptr;
      if (at != nullptr) more[i] = read_published(reinterpret_cast<const float4*>(at));
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (from + i < COUNT)
        sum.x += more[i].x, sum.y += more[i].y, sum.z += more[i].z, sum.w += more[i].w;
  }
}
