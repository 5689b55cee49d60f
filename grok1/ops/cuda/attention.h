// Attention over the filled cache for few queries, and what puts a step's own keys there.
//
// The cap bounds logits by CAP, so that exp(logit - CAP) needs no running maximum: parts of the
// sequence are summed up each by itself.
//
// Dimension key: R row of the call, T position of it, B row of the cache, C key/value head held
// here, G queries that share one, H head dim, S capacity of the cache, P part of the sequence.
#pragma once

// How numbers of the cache are stored.
enum { FLOAT32, FLOAT16, BFLOAT16, INT8 };

template <int KIND>
struct Stored {
  using Type = float;
  static DEVICE float read(unsigned bits) { return float_of_bits(bits); }
  static DEVICE float write(float value) { return value; }
};

template <>
struct Stored<FLOAT16> {
  using Type = unsigned short;
  static DEVICE float read(unsigned bits) { return float_of_half((unsigned short)bits); }
  static DEVICE unsigned short write(float value) {
    // One outlier saturates; what is infinite already stays so, and is noticed.
    const float size = fabsf(value);
    if (size > 65504.0f && size < float_of_bits(0x7f800000u)) value = copysignf(65504.0f, value);
    return half_of_float(value);
  }
};

template <>
struct Stored<BFLOAT16> {
  using Type = unsigned short;
  static DEVICE float read(unsigned bits) { return float_of_bits(bits << 16); }
  static DEVICE unsigned short write(float value) { return (unsigned short)bfloats(value, 0); }
};

template <>
struct Stored<INT8> {
  using Type = signed char;
  static DEVICE float read(unsigned bits) { return (signed char)bits; }
  static DEVICE signed char write(float value) { return (signed char)value; }
};

// COUNT numbers that lie side by side, aligned to their size or to 16 bytes.
template <int KIND, int COUNT>
DEVICE void read_numbers(const typename Stored<KIND>::Type* from, float (&numbers)[COUNT]) {
  constexpr int SIZE = sizeof(typename Stored<KIND>::Type), BYTES = COUNT * SIZE, IN_WORD = 4 / SIZE;
  if constexpr (BYTES % 8 == 0) {
    unsigned words[BYTES / 4];
    if constexpr (BYTES % 16 == 0) {
#pragma unroll
      for (int i = 0; i < BYTES / 16; ++i) {
        const uint4 part = reinterpret_cast<const uint4*>(from)[i];
        words[4 * i] = part.x, words[4 * i + 1] = part.y;
        words[4 * i + 2] = part.z, words[4 * i + 3] = part.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < BYTES / 8; ++i) {
        const uint2 part = reinterpret_cast<const uint2*>(from)[i];
        words[2 * i] = part.x, words[2 * i + 1] = part.y;
      }
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      numbers[i] = Stored<KIND>::read(words[i / IN_WORD] >> (i % IN_WORD * 8 * SIZE));
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if constexpr (SIZE == 4) {
        numbers[i] = from[i];
      } else {
        numbers[i] = Stored<KIND>::read((unsigned)from[i]);
      }
    }
  }
}

// Sums over a part of the sequence: of exp(logit - CAP), and of that times the values. Grid: C times
// blocks of queries, R times P. Half of a warp has a key: lane l its numbers from l * H / 16 on.
//
// S has R, T, C, G, H, B, CAPACITY, PARTS, QUERIES (of a block), KIND, QUERY_KIND, SCALE, CAP, WARPS.
template <class S>
DEVICE void attend(const typename Stored<S::QUERY_KIND>::Type* query,
                   const typename Stored<S::KIND>::Type* keys,
                   const typename Stored<S::KIND>::Type* values, const float* key_scales,
                   const float* value_scales, const int* layer, const int* slots, const int* positions,
                   float* mixed, float* totals) {
  constexpr int EACH = (S::H + 15) / 16, M = S::G * S::T, UNROLL = 2, STEP = 2 * UNROLL * S::WARPS;
  constexpr int BLOCKS = (M + S::QUERIES - 1) / S::QUERIES;
  __shared__ float shared[S::WARPS][S::QUERIES][S::H + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 16, half = threadIdx.x / 16 % 2;
  const bool has_numbers = lane * EACH < S::H;  // narrow heads leave lanes without
  const int head = blockIdx.x / BLOCKS, first = blockIdx.x % BLOCKS * S::QUERIES;
  const int row = blockIdx.y / S::PARTS, part = blockIdx.y % S::PARTS;
  const int slot = slots[row];
  int last = -1;
  for (int t = 0; t < S::T; ++t) {
    const int position = positions[row * S::T + t];
    last = position > last ? position : last;
  }
  last = last < S::CAPACITY ? last : S::CAPACITY - 1;
  if (slot < 0 || slot >= S::B) last = -1;
  const int size = (last + 1 + S::PARTS * 16 - 1) / (S::PARTS * 16) * 16;
  const int begin = part * size, end = begin + size < last + 1 ? begin + size : last + 1;
  float q[S::QUERIES][EACH], sums[S::QUERIES][EACH], total[S::QUERIES];
  int upto[S::QUERIES];
#pragma unroll
  for (int m = 0; m < S::QUERIES; ++m) {
    const int number = first + m, t = number < M ? number / S::G : 0, g = number % S::G;
    upto[m] = number < M ? positions[row * S::T + t] : -1;
    total[m] = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) q[m][i] = sums[m][i] = 0;
    if (has_numbers)
      read_numbers<S::QUERY_KIND>(
          query + ((((long long)row * S::T + t) * S::C + head) * S::G + g) * S::H + lane * EACH, q[m]);
  }
  const long long heads = ((long long)layer[0] * S::B + (begin < end ? slot : 0)) * S::C + head;
  const auto* key_rows = keys + heads * S::CAPACITY * S::H;
  const auto* value_rows = values + heads * S::CAPACITY * S::H;
  for (int base = begin + warp * 2 * UNROLL; base < end; base += STEP) {
    float key[UNROLL][EACH], value[UNROLL][EACH];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int wanted = base + 2 * u + half, at = wanted < end ? wanted : end - 1;
      const long long start = (long long)at * S::H + (has_numbers ? lane * EACH : 0);
      read_numbers<S::KIND>(key_rows + start, key[u]);
      read_numbers<S::KIND>(value_rows + start, value[u]);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int wanted = base + 2 * u + half, at = wanted < end ? wanted : end - 1;
      float key_scale = S::SCALE / S::CAP, value_scale = 1;
      if constexpr (S::KIND == INT8) {
        key_scale *= key_scales[heads * S::CAPACITY + at];
        value_scale = value_scales[heads * S::CAPACITY + at];
      }
#pragma unroll
      for (int m = 0; m < S::QUERIES; ++m) {
        float product = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) product += q[m][i] * key[u][i];
#pragma unroll
        for (int mask = 8; mask >= 1; mask /= 2) product += shuffle_xor(product, mask);
        float weight = expf(S::CAP * tanhf(product * key_scale) - S::CAP);
        if (wanted >= end || wanted > upto[m]) weight = 0;
        total[m] += weight;
        weight *= value_scale;
#pragma unroll
        for (int i = 0; i < EACH; ++i) sums[m][i] += weight * value[u][i];
      }
    }
  }
#pragma unroll
  for (int m = 0; m < S::QUERIES; ++m) {
    total[m] += shuffle_xor(total[m], 16);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      sums[m][i] += shuffle_xor(sums[m][i], 16);
      if (half == 0 && has_numbers) shared[warp][m][lane * EACH + i] = sums[m][i];
    }
    if (half == 0 && lane == 0) shared[warp][m][S::H] = total[m];
  }
  barrier();
  for (int i = threadIdx.x; i < S::QUERIES * (S::H + 1); i += blockDim.x) {
    const int m = i / (S::H + 1), h = i % (S::H + 1), number = first + m;
    if (number >= M) continue;
    float sum = 0, all = 0;
    for (int of = 0; of < S::WARPS; ++of) {
      sum += shared[of][m][h];
      all += shared[of][m][S::H];
    }
    const long long out = (((long long)row * S::T + number / S::G) * S::C + head) * S::G + number % S::G;
    constexpr long long VECTORS = (long long)S::R * S::T * S::C * S::G;
    if (S::PARTS > 1) {
      if (h < S::H) mixed[(part * VECTORS + out) * S::H + h] = sum;
      if (h == S::H) totals[part * VECTORS + out] = all;
    } else if (h < S::H) {
      mixed[out * S::H + h] = last < 0 ? 0 : sum / all;
    } else {
      totals[out] = all;
    }
  }
}

template <class S>
DEVICE void attend(const typename Stored<S::QUERY_KIND>::Type* query,
                   const typename Stored<S::KIND>::Type* keys,
                   const typename Stored<S::KIND>::Type* values, const int* layer, const int* slots,
                   const int* positions, float* mixed, float* totals) {
  const float* none = nullptr;
  attend<S>(query, keys, values, none, none, layer, slots, positions, mixed, totals);
}

// Adds up the parts. Grid: vectors of H.
template <class S>
DEVICE void combine(const float* mixed, const float* totals, float* out) {
  constexpr long long VECTORS = (long long)S::R * S::T * S::C * S::G;
  const long long vector = blockIdx.x;
  float total = 0;
  for (int part = 0; part < S::PARTS; ++part) total += totals[part * VECTORS + vector];
  for (int h = threadIdx.x; h < S::H; h += blockDim.x) {
    float sum = 0;
    for (int part = 0; part < S::PARTS; ++part) sum += mixed[(part * VECTORS + vector) * S::H + h];
    out[vector * S::H + h] = total == 0 ? 0 : sum / total;
  }
}

// Turns queries and keys by their positions' phases, and writes keys and values to the cache. A warp
// has one vector: lane l its numbers 2l and 2l + 1 of either half, in turns of 64.
//
// S has R, T, C, G, H, B, CAPACITY, PARTS, KIND, QUERY_KIND, WARPS. Inputs are the sums of PARTS of
// `[R * T, C * G queries, C keys, C values]`. Grid: blocks of vectors.
template <class S>
struct Vector {
  static constexpr int EACH = (S::H / 2 + 31) / 32;
  float numbers[2][EACH];
  int lane;

  DEVICE int at(int half, int i) const { return half * (S::H / 2) + lane + 32 * i; }
  DEVICE bool has(int i) const { return lane + 32 * i < S::H / 2; }

  DEVICE void read(const float* from, long long part) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        float sum = 0;
        if (has(i))
          for (int of = 0; of < S::PARTS; ++of) sum += from[of * part + at(half, i)];
        numbers[half][i] = sum;
      }
  }

  DEVICE void turn(const float* frequencies, int position) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      if (!has(i)) continue;
      const float phase = (float)position * frequencies[lane + 32 * i];
      const float cosine = cosf(phase), sine = sinf(phase);
      const float first = numbers[0][i], second = numbers[1][i];
      numbers[0][i] = first * cosine - second * sine;
      numbers[1][i] = second * cosine + first * sine;
    }
  }

  // Scales an int8 vector to its largest number and returns the scale.
  DEVICE float scale() {
    float most = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const float size = fabsf(numbers[half][i]);
        most = size > most || size != size ? size : most;
      }
#pragma unroll
    for (int mask = 16; mask >= 1; mask /= 2) {
      const float other = shuffle_xor(most, mask);
      most = other > most || other != other ? other : most;
    }
    const float scale = most / 127, divisor = scale == 0 ? 1 : scale;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        numbers[half][i] = fminf(fmaxf(rintf(numbers[half][i] / divisor), -127.0f), 127.0f);
    return scale;
  }

  template <int KIND>
  DEVICE void write(typename Stored<KIND>::Type* to) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (has(i)) to[at(half, i)] = Stored<KIND>::write(numbers[half][i]);
  }
};

template <class S>
DEVICE void place_vector(const float* projected, const float* frequencies, const int* layer, const int* slots,
                  const int* positions, const unsigned char* valid,
                  typename Stored<S::KIND>::Type* keys, typename Stored<S::KIND>::Type* values,
                  float* key_scales, float* value_scales,
                  typename Stored<S::QUERY_KIND>::Type* query) {
  constexpr int QUERIES = S::G * S::C, HEADS = QUERIES + 2 * S::C, VECTORS = S::R * S::T * HEADS;
  const int number = blockIdx.x * S::WARPS + threadIdx.x / 32;
  if (number >= VECTORS) return;
  const int token = number / HEADS, head = number % HEADS, row = token / S::T;
  const int position = positions[token], slot = slots[row];
  Vector<S> vector;
  vector.lane = threadIdx.x % 32;
  vector.read(projected + (long long)number * S::H, (long long)VECTORS * S::H);
  if (head < QUERIES + S::C) vector.turn(frequencies, position);
  if (head < QUERIES) {
    vector.template write<S::QUERY_KIND>(query + ((long long)token * QUERIES + head) * S::H);
    return;
  }
  const bool is_kept =
      valid[token] && slot >= 0 && slot < S::B && position >= 0 && position < S::CAPACITY;
  const bool is_key = head < QUERIES + S::C;
  const int of = (head - QUERIES) % S::C;
  const long long at =
      (((long long)layer[0] * S::B + slot) * S::C + of) * S::CAPACITY + position;
  if constexpr (S::KIND == INT8) {
    const float scale = vector.scale();
    if (is_kept && vector.lane == 0) (is_key ? key_scales : value_scales)[at] = scale;
  }
  if (is_kept) vector.template write<S::KIND>((is_key ? keys : values) + at * S::H);
}

// The cache is written in place: an input and an output are the same memory.
template <class S>
DEVICE void place(const float* projected, const float* frequencies, const int* layer, const int* slots,
                  const int* positions, const unsigned char* valid, typename Stored<S::KIND>::Type*,
                  typename Stored<S::KIND>::Type*, typename Stored<S::QUERY_KIND>::Type* query,
                  typename Stored<S::KIND>::Type* keys, typename Stored<S::KIND>::Type* values) {
  float* none = nullptr;
  place_vector<S>(projected, frequencies, layer, slots, positions, valid, keys, values, none, none, query);
}

template <class S>
DEVICE void place(const float* projected, const float* frequencies, const int* layer, const int* slots,
                  const int* positions, const unsigned char* valid, typename Stored<S::KIND>::Type*,
                  typename Stored<S::KIND>::Type*, float*, float*,
                  typename Stored<S::QUERY_KIND>::Type* query, typename Stored<S::KIND>::Type* keys,
                  typename Stored<S::KIND>::Type* values, float* key_scales, float* value_scales) {
  place_vector<S>(projected, frequencies, layer, slots, positions, valid, keys, values, key_scales,
                  value_scales, query);
}
