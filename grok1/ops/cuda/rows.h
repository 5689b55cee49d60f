// What is done to each row by itself: norms, sums, the router's choice.
#pragma once

DEVICE float sum_of_warp(float value) {
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// The sum over all threads of a block, in each of them; `shared` has a float for each warp.
template <int THREADS>
DEVICE float sum_of_block(float value, float* shared) {
  value = sum_of_warp(value);
  barrier();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  barrier();
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += shared[warp];
  return sum;
}

// x += norm(branch) and the norm of that, or either alone. Grid: rows.
//
// S has D, EPSILON, THREADS.
template <class S>
struct Norms {
  static constexpr int EACH = (S::D + S::THREADS - 1) / S::THREADS;
  float row[EACH];

  DEVICE void read(const float* from) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int at = threadIdx.x + i * S::THREADS;
      row[i] = at < S::D ? from[at] : 0;
    }
  }

  DEVICE void write(float* to) const {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int at = threadIdx.x + i * S::THREADS;
      if (at < S::D) to[at] = row[i];
    }
  }

  DEVICE void norm(const Norms& scale, float* shared) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) sum += row[i] * row[i];
    const float root = sqrtf(sum_of_block<S::THREADS>(sum, shared) / S::D + S::EPSILON);
#pragma unroll
    for (int i = 0; i < EACH; ++i) row[i] = row[i] / root * scale.row[i];
  }

  DEVICE void add(const Norms& other) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) row[i] += other.row[i];
  }
};

// Everything is read before anything waits for all threads.
template <class S>
DEVICE void norm(const float* x, const float* scales, const int* layer, float* normed) {
  __shared__ float shared[S::THREADS / 32];
  const long long start = (long long)blockIdx.x * S::D;
  Norms<S> rows, scale;
  rows.read(x + start);
  scale.read(scales + (long long)layer[0] * S::D);
  rows.norm(scale, shared);
  rows.write(normed + start);
}

template <class S>
DEVICE void add_norm(const float* x, const float* branch, const float* scales, const int* layer,
                     float* sum) {
  __shared__ float shared[S::THREADS / 32];
  const long long start = (long long)blockIdx.x * S::D;
  Norms<S> rows, scale, others;
  rows.read(branch + start);
  others.read(x + start);
  scale.read(scales + (long long)layer[0] * S::D);
  rows.norm(scale, shared);
  rows.add(others);
  rows.write(sum + start);
}

// Returns the thread's part of the norm of the sum; calls `meanwhile` while what it reads is coming.
template <class S, class Meanwhile>
DEVICE Norms<S> add_norm_and_norm(const float* x, const float* branch, const float* scales,
                                  const float* next_scales, const int* layer, float* sum,
                                  float* normed, Meanwhile meanwhile) {
  __shared__ float shared[S::THREADS / 32];
  const long long start = (long long)blockIdx.x * S::D;
  Norms<S> rows, scale, next_scale, others;
  rows.read(branch + start);
  others.read(x + start);
  scale.read(scales + (long long)layer[0] * S::D);
  next_scale.read(next_scales + (long long)layer[0] * S::D);
  meanwhile();
  rows.norm(scale, shared);
  rows.add(others);
  rows.write(sum + start);
  rows.norm(next_scale, shared);
  rows.write(normed + start);
  return rows;
}

template <class S>
DEVICE void add_norm_and_norm(const float* x, const float* branch, const float* scales,
                              const float* next_scales, const int* layer, float* sum, float* normed) {
  add_norm_and_norm<S>(x, branch, scales, next_scales, layer, sum, normed, [] {});
}

DEVICE float largest_of_warp(float value) {
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// The router's logits, probabilities and choice.
//
// S has D, E, A, CAP (0 for none), RENORMALIZE, THREADS.
template <class S>
struct Router {
  float sums[S::E];

  DEVICE Router() {
#pragma unroll
    for (int e = 0; e < S::E; ++e) sums[e] = 0;
  }

  // Adds what a number of the row brings, whose weights lie side by side.
  DEVICE void add(float value, const float* weights) {
    if constexpr (S::E % 4 == 0) {
#pragma unroll
      for (int e = 0; e < S::E; e += 4) {
        const float4 four = *reinterpret_cast<const float4*>(weights + e);
        sums[e] += value * four.x, sums[e + 1] += value * four.y;
        sums[e + 2] += value * four.z, sums[e + 3] += value * four.w;
      }
    } else {
#pragma unroll
      for (int e = 0; e < S::E; ++e) sums[e] += value * weights[e];
    }
  }

  // Puts together what the threads have; every thread of the block calls it.
  DEVICE void choose(int token, float* logits, float* probs, int* indices, float* weights) {
    __shared__ float shared[S::THREADS / 32][S::E];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      const float sum = sum_of_warp(sums[e]);
      if (lane == 0) shared[warp][e] = sum;
    }
    barrier();
    if (warp > 0) return;
    const float lowest = float_of_bits(0xff800000u);
    float logit = lowest;
    if (lane < S::E) {
      float sum = 0;
#pragma unroll
      for (int of = 0; of < S::THREADS / 32; ++of) sum += shared[of][lane];
      if constexpr (S::CAP > 0) sum = S::CAP * tanhf(sum / S::CAP);
      logits[token * S::E + lane] = logit = sum;
    }
    const float most = largest_of_warp(logit), weight = lane < S::E ? expf(logit - most) : 0;
    const float prob = weight / sum_of_warp(weight);
    if (lane < S::E) probs[token * S::E + lane] = shared[0][lane] = prob;
    meet_warp();
    if (lane > 0) return;
    unsigned left = S::E == 32 ? ~0u : (1u << S::E) - 1;
    float chosen = 0;
    for (int a = 0; a < S::A; ++a) {
      int best = lowest_bit(left);  // of equals the first, and one even where nothing is a number
      for (int e = best + 1; e < S::E; ++e)
        if (left >> e & 1 && shared[0][e] > shared[0][best]) best = e;
      left &= ~(1u << best);
      indices[token * S::A + a] = best;
      weights[token * S::A + a] = shared[0][best];
      chosen += shared[0][best];
    }
    if (S::RENORMALIZE)
      for (int a = 0; a < S::A; ++a) weights[token * S::A + a] /= chosen;
  }
};

// Grid: tokens.
template <class S>
DEVICE void route(const float* x, const float* routers, const int* layer, float* logits, float* probs,
                  int* indices, float* weights) {
  const float* row = x + (long long)blockIdx.x * S::D;
  const float* router = routers + (long long)layer[0] * S::D * S::E;
  Router<S> sums;
#pragma unroll 3
  for (int d = threadIdx.x; d < S::D; d += S::THREADS) sums.add(row[d], router + (long long)d * S::E);
  sums.choose(blockIdx.x, logits, probs, indices, weights);
}

// `add_norm_and_norm` of a token, and where the router sends it. Grid: tokens.
template <class S>
DEVICE void add_and_route(const float* x, const float* branch, const float* scales,
                          const float* next_scales, const float* routers, const int* layer, float* sum,
                          float* normed, float* logits, float* probs, int* indices, float* weights) {
  const float* router = routers + (long long)layer[0] * S::D * S::E;
  const Norms<S> row = add_norm_and_norm<S>(
      x, branch, scales, next_scales, layer, sum, normed, [&] {
        for (int d = threadIdx.x; d < S::D; d += S::THREADS) prefetch(router + (long long)d * S::E);
      });
  Router<S> sums;
#pragma unroll
  for (int i = 0; i < Norms<S>::EACH; ++i) {
    const int at = threadIdx.x + i * S::THREADS;
    if (at < S::D) sums.add(row.row[i], router + (long long)at * S::E);
  }
  sums.choose(blockIdx.x, logits, probs, indices, weights);
}
