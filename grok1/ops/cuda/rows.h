// What is done to each row or vector by itself: norms, rotary phases, the router's choice.
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

  DEVICE void norm(const float* scale, float* shared) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) sum += row[i] * row[i];
    const float root = sqrtf(sum_of_block<S::THREADS>(sum, shared) / S::D + S::EPSILON);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int at = threadIdx.x + i * S::THREADS;
      row[i] = at < S::D ? row[i] / root * scale[at] : 0;
    }
  }

  DEVICE void add(const float* from) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int at = threadIdx.x + i * S::THREADS;
      if (at < S::D) row[i] += from[at];
    }
  }
};

template <class S>
DEVICE void norm(const float* x, const float* scales, const int* layer, float* normed) {
  __shared__ float shared[S::THREADS / 32];
  const long long start = (long long)blockIdx.x * S::D;
  Norms<S> rows;
  rows.read(x + start);
  rows.norm(scales + (long long)layer[0] * S::D, shared);
  rows.write(normed + start);
}

template <class S>
DEVICE void add_norm(const float* x, const float* branch, const float* scales, const int* layer,
                     float* sum) {
  __shared__ float shared[S::THREADS / 32];
  const long long start = (long long)blockIdx.x * S::D;
  Norms<S> rows;
  rows.read(branch + start);
  rows.norm(scales + (long long)layer[0] * S::D, shared);
  rows.add(x + start);
  rows.write(sum + start);
}

template <class S>
DEVICE void add_norm_and_norm(const float* x, const float* branch, const float* scales,
                              const float* next_scales, const int* layer, float* sum, float* normed) {
  __shared__ float shared[S::THREADS / 32];
  const long long start = (long long)blockIdx.x * S::D;
  Norms<S> rows;
  rows.read(branch + start);
  rows.norm(scales + (long long)layer[0] * S::D, shared);
  rows.add(x + start);
  rows.write(sum + start);
  rows.norm(next_scales + (long long)layer[0] * S::D, shared);
  rows.write(normed + start);
}

// The router's logits, probabilities and choice. Grid: tokens.
//
// S has D, E, A, CAP (0 for none), RENORMALIZE, THREADS.
template <class S>
DEVICE void route(const float* x, const float* routers, const int* layer, float* logits, float* probs,
                  int* indices, float* weights) {
  __shared__ float shared[S::THREADS / 32][S::E];
  const int token = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* row = x + (long long)token * S::D;
  const float* router = routers + (long long)layer[0] * S::D * S::E;
  float sums[S::E];
#pragma unroll
  for (int e = 0; e < S::E; ++e) sums[e] = 0;
  for (int d = threadIdx.x; d < S::D; d += S::THREADS) {
    const float value = row[d];
#pragma unroll
    for (int e = 0; e < S::E; ++e) sums[e] += value * router[(long long)d * S::E + e];
  }
#pragma unroll
  for (int e = 0; e < S::E; ++e) {
    const float sum = sum_of_warp(sums[e]);
    if (lane == 0) shared[warp][e] = sum;
  }
  barrier();
  if (threadIdx.x > 0) return;
  float most = float_of_bits(0xff800000u);
  for (int e = 0; e < S::E; ++e) {
    float sum = 0;
    for (int of = 0; of < S::THREADS / 32; ++of) sum += shared[of][e];
    if (S::CAP > 0) sum = S::CAP * tanhf(sum / S::CAP);
    logits[token * S::E + e] = shared[0][e] = sum;
    most = sum > most ? sum : most;
  }
  float total = 0;
  for (int e = 0; e < S::E; ++e) total += shared[0][e] = expf(shared[0][e] - most);
  for (int e = 0; e < S::E; ++e) probs[token * S::E + e] = shared[0][e] = shared[0][e] / total;
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
