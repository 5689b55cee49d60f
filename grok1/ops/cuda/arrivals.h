// Blocks that make parts of one result: which of them is the last, and may put the parts together.
#pragma once

// How many have come, of those of each of some results.
template <class S, int RESULTS>
LASTING unsigned arrivals[RESULTS];

// Whether this is the last of `count` blocks that make parts of a result; every thread calls it.
template <class S, int RESULTS = S::COLUMN_TILES>
DEVICE bool is_last_of(int result, int count) {
  __shared__ bool is_last;
  publish();
  barrier();
  if (threadIdx.x == 0) is_last = arrive_last(arrivals<S, RESULTS> + result, count);
  barrier();
  publish();
  return is_last;
}
