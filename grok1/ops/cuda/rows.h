// What is done to each row by itself: norms, sums, the router's choice.
#pragma once

// The sum over all threads of a block, in each of them; `shared` has a float for each warp, which nobody
// reads any more.
template <int THREADS>
DEVICE float sum_of_block(float value, float* shared) {
  const int lane = threadIdx.x % 32;
  value = sum_of_warp(value);
  if (lane == 0) shared[threadIdx.x / 32] = value;
  barrier();
  return sum_of_warp(lane < THREADS / 32 ? shared[lane] : 0);
}

// A thread's numbers of a row: pieces of WIDE that lie side by side. One multiprocessor has all of a row's
// threads, so that what they do is as few instructions as can be.
//
// S has D, THREADS.
template <class S>
struct Pieces {
  static constexpr int WIDE = S::D % 4 == 0 ? 4 : 1;
  static constexpr int COUNT = (S::D / WIDE + S::THREADS - 1) / S::THREADS;
  static constexpr bool IS_WHOLE = COUNT * S::THREADS * WIDE == S::D;
  float of[COUNT][WIDE];

  static DEVICE int at(int i) { return ((int)threadIdx.x + i * S::THREADS) * WIDE; }
  static DEVICE bool has(int i) { return IS_WHOLE || at(i) < S::D; }

  DEVICE void read(const float* from) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
      for (int j = 0; j < WIDE; ++j) of[i][j] = 0;
      if (has(i)) read_floats(from + at(i), of[i]);
    }
  }

  DEVICE void write(float* to) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (has(i)) write_floats(of[i], to + at(i));
    }
  }
};

// Those of a row that is normed, or of the scales of a norm. S has EPSILON too.
template <class S>
struct Norms : Pieces<S> {
  DEVICE void norm(const Norms& scale, float* shared) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < Norms::COUNT; ++i)
#pragma unroll
      for (int j = 0; j < Norms::WIDE; ++j) sum += this->of[i][j] * this->of[i][j];
    const float inverse = inverse_root(sum_of_block<S::THREADS>(sum, shared) * (1.0f / S::D) + S::EPSILON);
#pragma unroll
    for (int i = 0; i < Norms::COUNT; ++i)
#pragma unroll
      for (int j = 0; j < Norms::WIDE; ++j) this->of[i][j] *= inverse * scale.of[i][j];
  }

  DEVICE void add(const Norms& other) {
#pragma unroll
    for (int i = 0; i < Norms::COUNT; ++i)
#pragma unroll
      for (int j = 0; j < Norms::WIDE; ++j) this->of[i][j] += other.of[i][j];
  }
};

// The norm of x. Grid of this and what follows: rows.
//
// Everything is read before anything waits for all threads.
template <class S>
DEVICE void norm(const float* x, const float* scales, const int* layer, float* normed) {
  __shared__ float shared[S::THREADS / 32];
  const long long start = (long long)blockIdx.x * S::D;
  Norms<S> row, scale;
  row.read(x + start);
  scale.read(scales + (long long)layer[0] * S::D);
  row.norm(scale, shared);
  row.write(normed + start);
}

// x += norm(branch).
template <class S>
DEVICE void add_norm(const float* x, const float* branch, const float* scales, const int* layer,
                     float* sum) {
  __shared__ float shared[S::THREADS / 32];
  const long long start = (long long)blockIdx.x * S::D;
  Norms<S> row, scale, others;
  row.read(branch + start);
  others.read(x + start);
  scale.read(scales + (long long)layer[0] * S::D);
  row.norm(scale, shared);
  row.add(others);
  row.write(sum + start);
}

// Returns the thread's part of the norm of the sum. Calls `before` when all that it reads is on its way,
// and `between` before the second norm.
template <class S, class Before, class Between>
DEVICE Norms<S> add_norm_and_norm(const float* x, const float* branch, const float* scales,
                                  const float* next_scales, int layer, float* sum, float* normed,
                                  Before before, Between between) {
  __shared__ float shared[2][S::THREADS / 32];
  const long long start = (long long)blockIdx.x * S::D;
  Norms<S> row, scale, next_scale, others;
  row.read(branch + start);
  others.read(x + start);
  scale.read(scales + (long long)layer * S::D);
  next_scale.read(next_scales + (long long)layer * S::D);
  before();
  row.norm(scale, shared[0]);
  row.add(others);
  between();
  row.write(sum + start);
  row.norm(next_scale, shared[1]);
  row.write(normed + start);
  return row;
}

// x += norm(branch), and the norm of that.
template <class S>
DEVICE void add_norm_and_norm(const float* x, const float* branch, const float* scales,
                              const float* next_scales, const int* layer, float* sum, float* normed) {
  add_norm_and_norm<S>(x, branch, scales, next_scales, layer[0], sum, normed, [] {}, [] {});
}

// The router's logits, probabilities and choice.
//
// S has D, E, A, CAP (0 for none), RENORMALIZE, THREADS.
template <class S>
struct Router {
  static constexpr int PLACES = Places<S::E>::count, WIDE = Pieces<S>::WIDE;
  // Weights of a piece of a row: those of each of its numbers lie side by side.
  using Weights = float[WIDE * S::E];
  float sums[PLACES];

  DEVICE Router() {
#pragma unroll
    for (int e = 0; e < PLACES; ++e) sums[e] = 0;
  }

  static DEVICE void fetch(const float* router, int i) {
    if (!Pieces<S>::has(i)) return;
#pragma unroll
    for (int of = 0; of < WIDE * S::E; of += 32)
      prefetch(router + (long long)Pieces<S>::at(i) * S::E + of);
  }

  static DEVICE void read(const float* router, int i, Weights& weights) {
    if (Pieces<S>::has(i)) read_floats(router + (long long)Pieces<S>::at(i) * S::E, weights);
  }

  // Adds what a piece of a row brings.
  DEVICE void add(int i, const float (&piece)[WIDE], const Weights& weights) {
    if (!Pieces<S>::has(i)) return;
#pragma unroll
    for (int j = 0; j < WIDE; ++j)
#pragma unroll
      for (int e = 0; e < S::E; ++e) sums[e] += piece[j] * weights[j * S::E + e];
  }

  // Puts together what the threads have; every thread of the block calls it.
  DEVICE void choose(int token, float* logits, float* probs, int* indices, float* weights) {
    __shared__ float shared[S::THREADS / 32][PLACES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float of_warp = sums_of_lanes<32>(sums);
    if (lane % (32 / PLACES) == 0) shared[warp][lane / (32 / PLACES)] = of_warp;
    barrier();
    if (warp > 0) return;
    const bool is_expert = lane < S::E;
    float logit = float_of_bits(0xff800000u);
    if (is_expert) {
      float sum = 0;
#pragma unroll
      for (int of = 0; of < S::THREADS / 32; ++of) sum += shared[of][lane];
      if constexpr (S::CAP > 0) sum = S::CAP * tanhf(sum / S::CAP);
      logits[token * S::E + lane] = logit = sum;
    }
    const float most = largest_of_lanes<PLACES>(logit), weight = is_expert ? expf(logit - most) : 0;
    float total = weight;
#pragma unroll
    for (int mask = PLACES / 2; mask >= 1; mask /= 2) total += shuffle_xor(total, mask);
    const float prob = weight / total;
    if (is_expert) probs[token * S::E + lane] = prob;
    bool is_left = is_expert;
    int best[S::A];
    float of_best[S::A], chosen = 0;
#pragma unroll
    for (int a = 0; a < S::A; ++a) {
      of_best[a] = largest_of_lanes<PLACES>(is_left ? prob : float_of_bits(0xff800000u));
      // Of equals the first, and one even where nothing is a number.
      const unsigned left = vote(is_left), equal = vote(is_left && prob == of_best[a]);
      best[a] = lowest_bit(equal == 0 ? left : equal);
      if (equal == 0) of_best[a] = prob;
      is_left = is_left && lane != best[a];
      chosen += of_best[a];
    }
    if (lane > 0) return;
#pragma unroll
    for (int a = 0; a < S::A; ++a) {
      indices[token * S::A + a] = best[a];
      weights[token * S::A + a] = S::RENORMALIZE ? of_best[a] / chosen : of_best[a];
    }
  }
};

// Grid: tokens.
template <class S>
DEVICE void route(const float* x, const float* routers, const int* layer, float* logits, float* probs,
                  int* indices, float* weights) {
  const float* router = routers + (long long)layer[0] * S::D * S::E;
  Pieces<S> row;
  row.read(x + (long long)blockIdx.x * S::D);
  Router<S> sums;
#pragma unroll
  for (int i = 0; i < Pieces<S>::COUNT; ++i) {
    typename Router<S>::Weights of_piece;
    sums.read(router, i, of_piece);
    sums.add(i, row.of[i], of_piece);
  }
  sums.choose(blockIdx.x, logits, probs, indices, weights);
}

// `add_norm_and_norm` of a token, and where the router sends it. Grid: tokens.
//
// What fits in registers of the router's weights is read while the norms are waited for, since one
// multiprocessor takes as long to read all of them.
template <class S>
DEVICE void add_and_route(const float* x, const float* branch, const float* scales,
                          const float* next_scales, const float* routers, const int* layer, float* sum,
                          float* normed, float* logits, float* probs, int* indices, float* weights) {
  constexpr int COUNT = Pieces<S>::COUNT, EARLY = Router<S>::WIDE * S::E > 32 ? 0 : COUNT < 2 ? COUNT : 2;
  const int number = layer[0];
  const float* router = routers + (long long)number * S::D * S::E;
  typename Router<S>::Weights early[2];
  const Norms<S> row = add_norm_and_norm<S>(
      x, branch, scales, next_scales, number, sum, normed,
      [&] {
        if constexpr (EARLY > 0) Router<S>::read(router, 0, early[0]);
#pragma unroll
        for (int i = EARLY > 0; i < COUNT; ++i) Router<S>::fetch(router, i);
      },
      [&] {
        if constexpr (EARLY > 1) Router<S>::read(router, 1, early[1]);
      });
  Router<S> sums;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (i < EARLY) {
      sums.add(i, row.of[i], early[i]);
    } else {
      typename Router<S>::Weights late;
      sums.read(router, i, late);
      sums.add(i, row.of[i], late);
    }
  }
  sums.choose(blockIdx.x, logits, probs, indices, weights);
}
