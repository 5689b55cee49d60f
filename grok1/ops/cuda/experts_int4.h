// The chosen experts of a few tokens, in 4 bits: as experts.h, of inputs in digits.
#pragma once

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
    const int lane = threadIdx.x % 32;
    barrier();
    for (int i = threadIdx.x / 32; i < count * UNITS; i += blockDim.x / 32) {
      const int input = i / UNITS, first = i % UNITS * Next::UNIT, at = column + first;
      if (at >= Of::N) continue;
      float values[EACH];
#pragma unroll
      for (int j = 0; j < EACH; ++j) values[j] = hidden[(first + 32 * j + lane) * INPUTS + input];
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

template <class S>
DEVICE void down_int4(const signed char* digits, const float* factors, const unsigned char* down,
                      const unsigned char* subscales, const unsigned short* scales,
                      const int* layer, const int* indices, const unsigned char* valid,
                      const float* weights, float* out, float* parts) {
  down_of<S, Int4Matrix>(Digits{digits, factors}, {down, subscales, scales}, layer, indices, valid,
                         weights, out, parts);
}
