// What a later kernel reads first comes to the second cache while the memory would have nothing to do.
// No result depends on it.
#pragma once

// Asks for the first EACH tiles of each of SHARES shares of a matrix's rows, where the teams that are
// to multiply by them begin. Each of `blocks` blocks asks for a part; all its threads call it.
//
// S has TILES, of 16 rows, BYTES of a row, SHARES, EACH.
template <class S>
DEVICE void fetch_ahead(const void* stack, long long number, int block, int blocks) {
  if constexpr (S::EACH > 0) {
    constexpr int LINE = 128;  // bytes of the cache that a request brings, and asks no one to wait for
    constexpr int OF_TILE = 16 * S::BYTES, OF_SHARE = S::EACH * OF_TILE / LINE;
    const char* matrix = static_cast<const char*>(stack) + number * S::TILES * OF_TILE;
    for (int i = block * blockDim.x + threadIdx.x; i < S::SHARES * OF_SHARE; i += blocks * blockDim.x) {
      const long long tile = (long long)(i / OF_SHARE) * S::TILES / S::SHARES;
      prefetch(matrix + tile * OF_TILE + i % OF_SHARE * LINE);
    }
  }
}
