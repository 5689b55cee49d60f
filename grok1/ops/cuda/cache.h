// How the cache stores numbers, and what puts the keys and values of new tokens there.
//
// Dimension key: R row of the call, T position of it, B row of the cache, C key/value head held
// here, G queries that share one, H head dim, S capacity of the cache.
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

// A vector of H numbers in a warp, of which each lane has some side by side in either half.
//
// S has H, ADDENDS.
template <class S>
struct Vector {
  static constexpr int HALF = S::H / 2, EACH = (HALF + 31) / 32;
  float numbers[2][EACH];
  int lane;

  DEVICE int at(int half, int i) const { return half * HALF + lane * EACH + i; }
  DEVICE bool has(int i) const { return lane * EACH + i < HALF; }

  // Reads the sum of ADDENDS vectors, each so far from the next.
  DEVICE void read(const float* from, long long distance) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < EACH; ++i) numbers[half][i] = 0;
    if (!has(0)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int of = 0; of < S::ADDENDS; ++of) {
        const float* first = from + of * distance + at(half, 0);
        float more[EACH];
        if constexpr (HALF % EACH == 0) {
          read_numbers<FLOAT32>(first, more);
        } else {
#pragma unroll
          for (int i = 0; i < EACH; ++i) more[i] = has(i) ? first[i] : 0;
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) numbers[half][i] += more[i];
      }
    }
  }

  DEVICE void turn(const float* frequencies, int position) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      if (!has(i)) continue;
      float sine, cosine;
      sincosf((float)position * frequencies[at(0, i)], &sine, &cosine);
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

// The cache's arrays for one layer and more; scales are of int8 alone.
template <class S>
struct Cache {
  using Type = typename Stored<S::KIND>::Type;
  Type *keys, *values;
  float *key_scales, *value_scales;

  // Writes a key or value in the place of one of all vectors of the cache.
  DEVICE void keep(Vector<S>& vector, bool is_key, long long at) const {
    if constexpr (S::KIND == INT8) {
      const float scale = vector.scale();
      if (vector.lane == 0) (is_key ? key_scales : value_scales)[at] = scale;
    }
    vector.template write<S::KIND>((is_key ? keys : values) + at * S::H);
  }
};

// Turns queries and keys by their positions' phases, and writes keys and values to the cache. A warp
// has one vector. Grid: blocks of vectors.
//
// S has R, T, C, G, H, B, CAPACITY, ADDENDS, KIND, QUERY_KIND, WARPS. Inputs are the sums of ADDENDS
// of `[R * T, C * G queries, C keys, C values]`.
template <class S>
DEVICE void place_vector(const float* projected, const float* frequencies, const int* layer,
                         const int* slots, const int* positions, const unsigned char* valid,
                         typename Stored<S::QUERY_KIND>::Type* query, const Cache<S>& cache) {
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
  if (!valid[token] || slot < 0 || slot >= S::B || position < 0 || position >= S::CAPACITY) return;
  const long long heads = ((long long)layer[0] * S::B + slot) * S::C + (head - QUERIES) % S::C;
  cache.keep(vector, head < QUERIES + S::C, heads * S::CAPACITY + position);
}

// The cache is written in place: an input and an output are the same memory.
template <class S>
DEVICE void place(const float* projected, const float* frequencies, const int* layer, const int* slots,
                  const int* positions, const unsigned char* valid, typename Stored<S::KIND>::Type*,
                  typename Stored<S::KIND>::Type*, typename Stored<S::QUERY_KIND>::Type* query,
                  typename Stored<S::KIND>::Type* keys, typename Stored<S::KIND>::Type* values) {
  const Cache<S> cache = {keys, values, nullptr, nullptr};
  place_vector<S>(projected, frequencies, layer, slots, positions, valid, query, cache);
}

template <class S>
DEVICE void place(const float* projected, const float* frequencies, const int* layer, const int* slots,
                  const int* positions, const unsigned char* valid, typename Stored<S::KIND>::Type*,
                  typename Stored<S::KIND>::Type*, float*, float*,
                  typename Stored<S::QUERY_KIND>::Type* query, typename Stored<S::KIND>::Type* keys,
                  typename Stored<S::KIND>::Type* values, float* key_scales, float* value_scales) {
  const Cache<S> cache = {keys, values, key_scales, value_scales};
  place_vector<S>(projected, frequencies, layer, slots, positions, valid, query, cache);
}
