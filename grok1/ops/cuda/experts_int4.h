// The chosen experts of a few tokens, in 4 bits: as experts.h, of inputs in digits.
#pragma once

// A row of numbers at a time, of which a block of WARPS makes digits itself: in `room`, shared memory,
// while its first weights are on their way. S::TERMS must take all that an instruction has columns for.
template <int WARPS>
struct Numbers {
  const float* x;
  unsigned char* room;

  // As that of `Digits`.
  template <class S, int TILES>
  struct Mine {
    static constexpr int DIGITS = S::TERMS / 2, EACH = S::UNIT / 32;
    // Digits of a number are read at once, from different banks.
    static constexpr int APART = S::K + 32;
    Shared x, factors;

    DEVICE Mine(const Rows<Numbers>& inputs, int share) {
      static_assert(TILES == 1 && Inputs<S::TERMS, 1>::count == 1);
      // Those of the rows of all teams of a block.
      constexpr long long TILES_OF_K = S::K / 32, IN_UNIT = S::UNIT / 32;
      const int first = share / S::TEAMS * S::TEAMS;
      const int begin = (int)(first * TILES_OF_K / S::SHARES / IN_UNIT);
      const int end = (int)(((first + S::TEAMS) * TILES_OF_K / S::SHARES + IN_UNIT - 1) / IN_UNIT);
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      signed char* const digits = reinterpret_cast<signed char*>(inputs.x.room);
      float* const of_units = reinterpret_cast<float*>(digits + DIGITS * APART);
      const float* const row = inputs.x.x + (long long)inputs.rows[0] * S::K;
      float values[EACH], next[EACH];
      if (begin + warp < end) read_unit(row + (begin + warp) * S::UNIT, next);
#pragma unroll 1
      for (int unit = begin + warp; unit < end; unit += WARPS) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) values[i] = next[i];
        if (unit + WARPS < end) read_unit(row + (unit + WARPS) * S::UNIT, next);
        write_digits<DIGITS>(values, digits + unit * S::UNIT, APART, of_units + unit);
      }
      barrier();
      const int g = lane / 4, t = lane % 4;
      x = kept(shared_place(digits) + g % 4 * APART + 8 * t);
      factors = shared_place(of_units);
    }

    DEVICE void read(int, unsigned tile, unsigned (&four)[2]) const { read_shared(x + 32 * tile, four); }

    DEVICE float factor(int, unsigned unit) const {
      unsigned bits[1];
      read_shared(factors + 4 * unit, bits);
      return float_of_bits(bits[0]);
    }
  };
};

// Where hidden numbers go: to memory as digits, once a block has all of its columns.
template <class Next>
struct HiddenDigits {
  signed char* digits;
  float* factors;

  template <class Of>
  DEVICE void put(float value, long long, int, float* place) const {
    *place = value;
  }

  template <class Of, int INPUTS>
  DEVICE void finish(const float* hidden, int column, const int* rows, int count) const {
    constexpr int DIGITS = Next::TERMS / 2, UNITS = Widths<Of>::OF_TEAM / Next::UNIT;
    constexpr int EACH = Next::UNIT / 32;
    barrier();
    for (int i = threadIdx.x / 32; i < count * UNITS; i += blockDim.x / 32) {
      const int input = i / UNITS, first = i % UNITS * Next::UNIT, at = column + first;
      if (at >= Of::N) continue;
      float values[EACH];
      if constexpr (INPUTS == 1) {
        read_unit(hidden + first, values);
      } else {
#pragma unroll
        for (int j = 0; j < EACH; ++j) values[j] = hidden[(first + place_in_unit<EACH>(j)) * INPUTS + input];
      }
      const long long row = rows[input];
      write_digits<DIGITS>(values, digits + row * DIGITS * Of::N + at, Of::N,
                           factors + (row * Of::N + at) / Next::UNIT);
    }
  }
};

template <class S>
DEVICE void gate_up_int4(const signed char* digits, const float* factors, const unsigned char* gate,
                         const unsigned char* gate_subscales, const unsigned short* gate_scales,
                         const unsigned char* up, const unsigned char* up_subscales,
                         const unsigned short* up_scales, const int* layer, const int* indices,
                         const unsigned char* valid, signed char* hidden, float* hidden_factors,
                         float* parts = nullptr) {
  gate_up_of<S, Int4Matrix>(Digits{digits, factors}, {gate, gate_subscales, gate_scales},
                            {up, up_subscales, up_scales}, layer, indices, valid,
                            HiddenDigits<typename S::Out>{hidden, hidden_factors}, parts);
}

// The same of numbers.
template <class S>
DEVICE void gate_up_int4_of_numbers(const float* x, const unsigned char* gate,
                                    const unsigned char* gate_subscales,
                                    const unsigned short* gate_scales, const unsigned char* up,
                                    const unsigned char* up_subscales,
                                    const unsigned short* up_scales, const int* layer,
                                    const int* indices, const unsigned char* valid,
                                    signed char* hidden, float* hidden_factors,
                                    float* parts = nullptr) {
  using Of = Widths<typename S::Hidden>;
  DYNAMIC_SHARED(rings);
  const Numbers<2 * Of::ALL_THREADS / 32> numbers = {x, rings + 2 * S::Hidden::TEAMS * Of::RING};
  gate_up_of<S, Int4Matrix>(numbers, {gate, gate_subscales, gate_scales}, {up, up_subscales, up_scales},
                            layer, indices, valid,
                            HiddenDigits<typename S::Out>{hidden, hidden_factors}, parts);
}

template <class S>
DEVICE void down_int4(const signed char* digits, const float* factors, const unsigned char* down,
                      const unsigned char* subscales, const unsigned short* scales,
                      const int* layer, const int* indices, const unsigned char* valid,
                      const float* weights, float* out, float* parts) {
  down_of<S, Int4Matrix>(Digits{digits, factors}, {down, subscales, scales}, layer, indices, valid,
                         weights, out, parts);
}
