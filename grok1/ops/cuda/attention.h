// Attention over the filled cache for few queries.
//
// The cap bounds logits by CAP, so that exp(logit - CAP) needs no running maximum: parts of the
// sequence are summed up each by itself, and the last of their blocks adds them up.
//
// Dimension key: R row of the call, T position of it, B row of the cache, C key/value head held
// here, G queries that share one, M = T * G, H head dim, S capacity of the cache, P part of the
// sequence.
#pragma once

// What is read of the cache; scales are of int8 alone.
template <class S>
struct Filled {
  const typename Stored<S::KIND>::Type *keys, *values;
  const float *key_scales, *value_scales;
};

// Reads where this stands, and not where the compiler finds that it is first needed.
template <class Type>
DEVICE Type read_now(const Type* from) {
  return *const_cast<const volatile Type*>(from);
}

// Of a warp: two in each half.
constexpr int KEYS_AT_ONCE = 4;

// What a block has of a row's filled positions: those from begin to end, part `number` of `count`.
struct Part {
  int row, slot, last, number, count, begin, end;
};

template <class S>
DEVICE Part part_of_block(const int* slots, const int* positions) {
  Part part;
  part.row = blockIdx.y / S::PARTS, part.number = blockIdx.y % S::PARTS;
  part.slot = slots[part.row], part.last = -1;
  for (int t = 0; t < S::T; ++t) {
    const int position = positions[part.row * S::T + t];
    part.last = position > part.last ? position : part.last;
  }
  part.last = part.last < S::CAPACITY ? part.last : S::CAPACITY - 1;
  if (part.slot < 0 || part.slot >= S::B) part.last = -1;
  constexpr int STEP = KEYS_AT_ONCE * S::WARPS;
  const int filled = part.last + 1, size = (filled + S::PARTS * STEP - 1) / (S::PARTS * STEP) * STEP;
  part.count = filled == 0 ? 1 : (filled + size - 1) / size;
  part.begin = part.number * size;
  part.end = part.begin + size < filled ? part.begin + size : filled;
  return part;
}

// Of the queries of a key head, those of one block, in a warp: half of it has a key, lane l of the
// half the numbers from l * H / 16 on.
template <class S>
struct Queries {
  static constexpr int EACH = (S::H + 15) / 16, M = S::G * S::T;
  static constexpr int BLOCKS = (M + S::QUERIES - 1) / S::QUERIES;
  float numbers[S::QUERIES][EACH];
  int head, first, lane, half;
  bool has_numbers;  // narrow heads leave lanes without

  DEVICE Queries() {
    head = blockIdx.x / BLOCKS, first = blockIdx.x % BLOCKS * S::QUERIES;
    lane = threadIdx.x % 16, half = threadIdx.x / 16 % 2, has_numbers = lane * EACH < S::H;
#pragma unroll
    for (int m = 0; m < S::QUERIES; ++m)
#pragma unroll
      for (int i = 0; i < EACH; ++i) numbers[m][i] = 0;
  }

  // Which position a query sees last; -1 for none.
  DEVICE int upto(const Part& part, const int* positions, int m) const {
    return first + m < M ? positions[part.row * S::T + (first + m) / S::G] : -1;
  }

  // Which of all vectors of H numbers a query is.
  DEVICE long long vector(const Part& part, int m) const {
    const int number = first + m < M ? first + m : 0;
    return (((long long)part.row * S::T + number / S::G) * S::C + head) * S::G + number % S::G;
  }
};

// Lets the keys and values that each warp begins with come nearer; `start` is where its head's are.
template <class S>
DEVICE void fetch_first(const Part& part, const Cache<S>& cache, long long start) {
  const int lane = threadIdx.x % 32, at = part.begin + threadIdx.x / 32 * KEYS_AT_ONCE + lane / 8;
  if (at < part.end)
    prefetch((lane % 2 ? cache.values : cache.keys) + (start + at) * S::H + lane / 2 % 4 * (S::H / 4));
}

// The sum of the parts of each query. Every thread calls it, of the last block of a result.
template <class S>
DEVICE void combine(const Part& part, const Queries<S>& queries, const float* mixed,
                    const float* totals, float* out) {
  constexpr long long VECTORS = (long long)S::R * S::T * S::C * S::G;
  constexpr int FOURS = S::H / 4, AT_ONCE = 8;
  for (int i = threadIdx.x; i < S::QUERIES * FOURS; i += 32 * S::WARPS) {
    const int m = i / FOURS;
    if (queries.first + m >= Queries<S>::M) continue;
    const long long vector = queries.vector(part, m), at = vector * S::H + i % FOURS * 4;
    float4 sum = {0, 0, 0, 0};
    float total = 0;
    for (int from = 0; from < part.count; from += AT_ONCE) {
      float4 more[AT_ONCE];
      float of_total[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const int of = from + j < part.count ? from + j : part.count - 1;
        more[j] = read_published(reinterpret_cast<const float4*>(mixed + of * VECTORS * S::H + at));
        of_total[j] = read_published(totals + of * VECTORS + vector);
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        if (from + j >= part.count) continue;
        sum.x += more[j].x, sum.y += more[j].y, sum.z += more[j].z, sum.w += more[j].w;
        total += of_total[j];
      }
    }
    const float factor = 1 / total;
    sum.x *= factor, sum.y *= factor, sum.z *= factor, sum.w *= factor;
    *reinterpret_cast<float4*>(out + at) = sum;
  }
}

// Sums over a part of the sequence, of exp(logit - CAP), and of that times the values; then the
// sum of the parts.
//
// Lanes add up the products of all queries and keys of their half of the warp so that each gets the
// logit of one, whose power it finds out for all.
template <class S>
DEVICE void attend_part(const Part& part, const Queries<S>& queries, const Filled<S>& cache,
                        int layer, const int* positions, float* out, float* mixed, float* totals) {
  constexpr int EACH = Queries<S>::EACH, UNROLL = KEYS_AT_ONCE / 2, STEP = KEYS_AT_ONCE * S::WARPS;
  constexpr int LOGITS = UNROLL * S::QUERIES, PLACES = Places<LOGITS>::count, OF_LOGIT = 16 / PLACES;
  static_assert(LOGITS <= 16, "a lane has one logit");
  constexpr int PITCH = S::H + KEYS_AT_ONCE;  // totals of a query's lanes stand behind its sums
  alignas(16) __shared__ float shared[S::WARPS][S::QUERIES][PITCH];
  const int warp = threadIdx.x / 32, lane = queries.lane, half = queries.half;
  const int key_of_lane = lane / OF_LOGIT / S::QUERIES, query_of_lane = lane / OF_LOGIT % S::QUERIES;
  const bool has_logit = lane % OF_LOGIT == 0 && key_of_lane < UNROLL;
  const int upto = has_logit ? queries.upto(part, positions, query_of_lane) : -1;
  float sums[S::QUERIES][EACH], total = 0;
#pragma unroll
  for (int m = 0; m < S::QUERIES; ++m)
#pragma unroll
    for (int i = 0; i < EACH; ++i) sums[m][i] = 0;
  const int slot = part.last < 0 ? 0 : part.slot;
  const long long heads = ((long long)layer * S::B + slot) * S::C + queries.head;
  const auto* key_rows = cache.keys + heads * S::CAPACITY * S::H;
  const auto* value_rows = cache.values + heads * S::CAPACITY * S::H;
  for (int base = part.begin + warp * KEYS_AT_ONCE; base < part.end; base += STEP) {
    const int of_lane = base + 2 * key_of_lane + half;
    float key_scale = S::SCALE / S::CAP, value_scale = 1;
    float key[UNROLL][EACH], value[UNROLL][EACH];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int wanted = base + 2 * u + half, at = wanted < part.end ? wanted : part.end - 1;
      const long long start = (long long)at * S::H + (queries.has_numbers ? lane * EACH : 0);
      read_numbers<S::KIND>(key_rows + start, key[u]);
      read_numbers<S::KIND>(value_rows + start, value[u]);
    }
    if constexpr (S::KIND == INT8) {
      const long long at = heads * S::CAPACITY + (of_lane < part.end ? of_lane : part.end - 1);
      key_scale *= cache.key_scales[at];
      value_scale = cache.value_scales[at];
    }
    float products[PLACES];
#pragma unroll
    for (int of = 0; of < PLACES; ++of) {
      products[of] = 0;
      if (of >= LOGITS) continue;
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        products[of] += queries.numbers[of % S::QUERIES][i] * key[of / S::QUERIES][i];
    }
    const float product = sums_of_lanes<16>(products);
    float weight = expf(S::CAP * tanhf(product * key_scale) - S::CAP);
    if (of_lane >= part.end || of_lane > upto) weight = 0;
    total += weight;
    weight *= value_scale;
#pragma unroll
    for (int of = 0; of < LOGITS; ++of) {
      const float of_query = shuffle(weight, 16 * half + of * OF_LOGIT);
#pragma unroll
      for (int i = 0; i < EACH; ++i) sums[of % S::QUERIES][i] += of_query * value[of / S::QUERIES][i];
    }
  }
  // Of two queries each half of the warp adds up one.
#pragma unroll
  for (int m = 0; m < S::QUERIES; m += 2) {
    const int next = m + 1 < S::QUERIES ? m + 1 : m;
    float both[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const float kept = half ? sums[next][i] : sums[m][i], given = half ? sums[m][i] : sums[next][i];
      both[i] = kept + shuffle_xor(given, 16);
    }
    float* to = shared[warp][half ? next : m] + lane * EACH;
    if (queries.has_numbers && (next > m || half == 0)) write_floats(both, to);
  }
  if (has_logit) shared[warp][query_of_lane][S::H + 2 * key_of_lane + half] = total;
  barrier();
  constexpr long long VECTORS = (long long)S::R * S::T * S::C * S::G;
  constexpr int FOURS = S::H / 4;
  for (int i = threadIdx.x; i < S::QUERIES * FOURS; i += 32 * S::WARPS) {
    const int m = i / FOURS, h = i % FOURS * 4;
    if (queries.first + m >= Queries<S>::M) continue;
    float4 sum = {0, 0, 0, 0}, all = {0, 0, 0, 0};
#pragma unroll
    for (int of = 0; of < S::WARPS; ++of) {
      const float4 more = *reinterpret_cast<const float4*>(shared[of][m] + h);
      const float4 of_lanes = *reinterpret_cast<const float4*>(shared[of][m] + S::H);
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      all.x += of_lanes.x, all.y += of_lanes.y, all.z += of_lanes.z, all.w += of_lanes.w;
    }
    const float total = (all.x + all.y) + (all.z + all.w);
    const long long vector = queries.vector(part, m), of_part = part.number * VECTORS + vector;
    if (part.count > 1) {
      *reinterpret_cast<float4*>(mixed + of_part * S::H + h) = sum;
      if (h == 0) totals[of_part] = total;
    } else {
      const float factor = part.last < 0 ? 0 : 1 / total;
      sum.x *= factor, sum.y *= factor, sum.z *= factor, sum.w *= factor;
      *reinterpret_cast<float4*>(out + vector * S::H + h) = sum;
    }
  }
  if constexpr (S::PARTS > 1) {
    constexpr int IN_ROW = S::C * Queries<S>::BLOCKS;
    if (part.count == 1) return;
    if (!is_last_of<S, S::R * IN_ROW>(part.row * IN_ROW + blockIdx.x, part.count)) return;
    combine<S>(part, queries, mixed, totals, out);
  }
}

// Grid: C times blocks of queries, R times P.
//
// S has R, T, C, G, H, B, CAPACITY, PARTS, QUERIES (of a block), KIND, QUERY_KIND, SCALE, CAP, WARPS.
template <class S>
DEVICE void attend(const typename Stored<S::QUERY_KIND>::Type* query,
                   const typename Stored<S::KIND>::Type* keys,
                   const typename Stored<S::KIND>::Type* values, const float* key_scales,
                   const float* value_scales, const int* layer, const int* slots, const int* positions,
                   float* out, float* mixed, float* totals) {
  const int number = read_now(layer);
  const Part part = part_of_block<S>(slots, positions);
  if (part.number >= part.count) return;
  Queries<S> queries;
#pragma unroll
  for (int m = 0; m < S::QUERIES; ++m)
    if (queries.has_numbers)
      read_numbers<S::QUERY_KIND>(
          query + queries.vector(part, m) * S::H + queries.lane * Queries<S>::EACH, queries.numbers[m]);
  const Filled<S> cache = {keys, values, key_scales, value_scales};
  attend_part<S>(part, queries, cache, number, positions, out, mixed, totals);
}

template <class S>
DEVICE void attend(const typename Stored<S::QUERY_KIND>::Type* query,
                   const typename Stored<S::KIND>::Type* keys,
                   const typename Stored<S::KIND>::Type* values, const int* layer, const int* slots,
                   const int* positions, float* out, float* mixed, float* totals) {
  const float* none = nullptr;
  attend<S>(query, keys, values, none, none, layer, slots, positions, out, mixed, totals);
}

// Attention of a step's one token a row, after its phases and its place in the cache. The block whose
// part the position is in writes the key and the value, and reads them as it reads the others.
//
// S has ADDENDS too, and T is 1; inputs are as for `place`.
template <class S>
DEVICE void place_and_attend(const float* projected, const float* frequencies, const int* layer,
                             const int* slots, const int* positions, const unsigned char* valid,
                             const Cache<S>& cache, float* out, float* mixed, float* totals) {
  static_assert(S::T == 1, "a block knows of the key that it writes, not of others");
  constexpr int HEADS = S::C * (S::G + 2);
  using Number = typename Stored<S::QUERY_KIND>::Type;
  alignas(16) __shared__ Number turned[S::QUERIES][S::H];
  const bool is_real = read_now(valid + blockIdx.y / S::PARTS);
  const int number = read_now(layer);
  const Part part = part_of_block<S>(slots, positions);
  if (part.number >= part.count) return;
  Queries<S> queries;
  const int position = positions[part.row], head = queries.head;
  const bool is_mine = part.begin <= position && position < part.end && is_real;
  const long long heads = ((long long)number * S::B + part.slot) * S::C + head;
  fetch_first<S>(part, cache, heads * S::CAPACITY);
  Vector<S> vector;
  vector.lane = threadIdx.x % 32;
  for (int of = threadIdx.x / 32; of < S::QUERIES + 2 * is_mine; of += S::WARPS) {
    const bool is_query = of < S::QUERIES, is_key = of == S::QUERIES;
    const int query = queries.first + of < S::G ? queries.first + of : 0;
    const int number = is_query ? head * S::G + query : S::C * (S::G + !is_key) + head;
    const float* from = projected + ((long long)part.row * HEADS + number) * S::H;
    vector.read(from, (long long)S::R * HEADS * S::H);
    if (is_query || is_key) vector.turn(frequencies, position);
    if (is_query) {
      vector.template write<S::QUERY_KIND>(turned[of]);
    } else {
      cache.keep(vector, is_key, heads * S::CAPACITY + position);
    }
  }
  barrier();
#pragma unroll
  for (int m = 0; m < S::QUERIES; ++m)
    if (queries.has_numbers)
      read_numbers<S::QUERY_KIND>(turned[m] + queries.lane * Queries<S>::EACH, queries.numbers[m]);
  const Filled<S> filled = {cache.keys, cache.values, cache.key_scales, cache.value_scales};
  attend_part<S>(part, queries, filled, number, positions, out, mixed, totals);
}

// The cache is written in place: an input and an output are the same memory.
template <class S>
DEVICE void place_and_attend(const float* projected, const float* frequencies, const int* layer,
                             const int* slots, const int* positions, const unsigned char* valid,
                             typename Stored<S::KIND>::Type*, typename Stored<S::KIND>::Type*, float* out,
                             float* mixed, float* totals, typename Stored<S::KIND>::Type* keys,
                             typename Stored<S::KIND>::Type* values) {
  const Cache<S> cache = {keys, values, nullptr, nullptr};
  place_and_attend<S>(projected, frequencies, layer, slots, positions, valid, cache, out, mixed, totals);
}

template <class S>
DEVICE void place_and_attend(const float* projected, const float* frequencies, const int* layer,
                             const int* slots, const int* positions, const unsigned char* valid,
                             typename Stored<S::KIND>::Type*, typename Stored<S::KIND>::Type*, float*, float*,
                             float* out, float* mixed, float* totals, typename Stored<S::KIND>::Type* keys,
                             typename Stored<S::KIND>::Type* values, float* key_scales, float* value_scales) {
  const Cache<S> cache = {keys, values, key_scales, value_scales};
  place_and_attend<S>(projected, frequencies, layer, slots, positions, valid, cache, out, mixed, totals);
}
