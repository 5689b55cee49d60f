// What the kernels ask of a device, in CUDA: copies under way, number formats, the product of
// a warp. tests/ops/standin.h has the same on a CPU.
#pragma once

#define DEVICE __device__ __forceinline__

// Reads a weight that is not worth a place in a cache.
DEVICE void load_once(const void* from, unsigned (&words)[2]) {
  asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "l"(from));
}

// Lets what will be read come as near as the second cache.
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" : : "l"(from)); }

// Shared memory whose size the launch says.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// Where something is in shared memory.
using Shared = unsigned;

DEVICE Shared shared_place(void* of) { return (Shared)__cvta_generic_to_shared(of); }

// Starts a copy of 8 or 16 bytes from global to shared memory.
template <int BYTES>
DEVICE void start_copy(Shared to, const void* from) {
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" : : "r"(to), "l"(from) : "memory");
  }
}

// The copies that were started since the last group are one.
DEVICE void end_group() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until at most COUNT groups are under way.
template <int COUNT>
DEVICE void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" : : "n"(COUNT) : "memory");
}

DEVICE void read_shared(Shared from, unsigned (&words)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

DEVICE void read_shared(Shared from, unsigned (&words)[1]) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(from) : "memory");
}

DEVICE unsigned short read_short(Shared from) {
  unsigned short bits;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(from) : "memory");
  return bits;
}

DEVICE void read_shared(Shared from, unsigned (&words)[2]) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(from)
               : "memory");
}

// A number that the assembler does not know: it would write it into instructions, of which two are
// needed then where one does with a register.
DEVICE unsigned in_register(unsigned number) { return number + (blockDim.z - 1); }

// A number that the assembler does not know how to make again: it would do so in every turn of a loop.
// All lanes of a warp call it.
DEVICE unsigned kept(unsigned number) { return __shfl_sync(~0u, number, threadIdx.x % 32); }

DEVICE float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned bits_of_float(float value) { return __float_as_uint(value); }

DEVICE float float_of_half(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

DEVICE unsigned short half_of_float(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

DEVICE int nearest(float value) { return __float2int_rn(value); }

// 1 / sqrt(x), to 22 bits.
DEVICE float inverse_root(float x) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger of two, or what of them is no number.
DEVICE float larger(float x, float y) { return x > y || x != x ? x : y; }

// Two floats, rounded to bfloat16: the first in the lower half.
DEVICE unsigned bfloats(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// x * y + z of two pairs of bfloat16.
DEVICE unsigned multiply_add_bfloats(unsigned x, unsigned y, unsigned z) {
  unsigned pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(x), "r"(y), "r"(z));
  return pair;
}

// Bytes of two words, picked by the nibbles of a selector.
DEVICE unsigned pick_bytes(unsigned x, unsigned y, unsigned selector) {
  return __byte_perm(x, y, selector);
}

// As `pick_bytes`; where a nibble's highest bit is set, all of a byte is the sign of what it picks.
// The compiler does not clear that bit first, as it does for `pick_bytes`.
DEVICE unsigned pick_signed(unsigned x, unsigned y, unsigned selector) {
  unsigned picked;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(x), "r"(y), "r"(selector));
  return picked;
}

// sum += a * b of a warp: a is 16 x 16, b 16 x 8, of bfloat16 (mma.sync.m16n8k16).
DEVICE void multiply_tile(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of signed bytes: a is 16 x 32, b 32 x 8 (mma.sync.m16n8k32).
DEVICE void multiply_tile_of_bytes(int (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE float shuffle(float value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE unsigned largest_of_warp(unsigned number) { return __reduce_max_sync(~0u, number); }
DEVICE unsigned vote(bool is_set) { return __ballot_sync(~0u, is_set); }
DEVICE int count_bits(unsigned bits) { return __popc(bits); }
DEVICE int lowest_bit(unsigned bits) { return __ffs(bits) - 1; }
DEVICE void barrier() { __syncthreads(); }

// Waits for the other lanes, and sees what they have written.
DEVICE void meet_warp() { __syncwarp(); }

// Waits for the other threads of a team; teams of several warps are numbered from 0 to 14.
template <int THREADS>
DEVICE void team_barrier(int team) {
  if constexpr (THREADS == 32) {
    meet_warp();
  } else {
    asm volatile("bar.sync %0, %1;" : : "r"(team + 1), "n"(THREADS) : "memory");
  }
}

// Memory of a kernel that lasts; zeros at first.
#define LASTING __device__

// Whether this is the last of `count` that come here; the next launch begins anew. What this thread has
// written, and what those that it has waited for at a barrier have, is published; the last sees it.
DEVICE bool arrive_last(unsigned* arrivals, unsigned count) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(arrivals), "r"(count - 1)
               : "memory");
  return before == count - 1;
}

// Reads what another block has published.
DEVICE float read_published(const float* from) { return __ldcg(from); }
DEVICE int read_published(const int* from) { return __ldcg(from); }
DEVICE float4 read_published(const float4* from) { return __ldcg(from); }

// What follows is for attention of many queries.

// Starts a copy of 16 bytes from global to shared memory, or of zeros in their place.
DEVICE void start_copy_or_zeros(Shared to, const void* from, bool is_copy) {
  const int bytes = is_copy ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(bytes) : "memory");
}

// sum += a * b of a warp, as `multiply_tile`, of float16.
DEVICE void multiply_tile_of_halves(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane l says where row l % 8 of matrix l / 8
// is, and gets of each the numbers 2 * (l % 4) and the next of row l / 4.
DEVICE void load_matrices(unsigned (&words)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// As `load_matrices`, of the transposed matrices.
DEVICE void load_transposed(unsigned (&words)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// Two floats, rounded to float16: the first in the lower half.
DEVICE unsigned halves(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2 to the power of x, and 1 / x, to 22 bits.
DEVICE float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
DEVICE float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// What follows is for the tensor cores of compute capability 9.0: four warps, a group, multiply 64
// columns of a matrix, which are in registers, by tokens' inputs in shared memory.

// Where tiles of inputs can begin: a token has 64 numbers of 16 bits in a tile, whose eight pieces
// of 16 bytes change places by the token's number % 8.
DEVICE Shared tiles_place(void* of) { return shared_place(of) + 1023 & ~1023u; }

// Lets the tensor cores see what this thread has copied.
DEVICE void show_tiles() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

// The products that were started since the last group are one.
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

// Waits until at most COUNT groups are under way.
template <int COUNT>
DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(COUNT) : "memory");
}

// Keeps the compiler from reading a sum before it was waited for.
DEVICE void settle(float& sum) { asm volatile("" : "+f"(sum) : : "memory"); }

#define OF_TOKENS(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])

// Starts sums += a * b: a is 64 x 16 of bfloat16, as in `multiply_tile` for each warp, b is 16 numbers
// of each of TOKENS tokens, the first of which are at `tile`.
template <int TOKENS>
DEVICE void start_product(float (&sums)[TOKENS / 8][4], const unsigned (&a)[4], Shared tile) {
  // Its address, the 1024 bytes from eight tokens to the next, and how pieces change places.
  const unsigned long long how = 1ull << 16 | 64ull << 32 | 1ull << 62;
  const unsigned long long inputs = (tile >> 4 & 0x3fff) | how;
  if constexpr (TOKENS == 32) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, add, 1, 1, 0; }"
        : OF_TOKENS(0), OF_TOKENS(1), OF_TOKENS(2), OF_TOKENS(3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(inputs));
  }
  if constexpr (TOKENS == 64) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add, 1, 1, 0; }"
        : OF_TOKENS(0), OF_TOKENS(1), OF_TOKENS(2), OF_TOKENS(3),
          OF_TOKENS(4), OF_TOKENS(5), OF_TOKENS(6), OF_TOKENS(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(inputs));
  }
  if constexpr (TOKENS == 96) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "{%48, %49, %50, %51}, %52, add, 1, 1, 0; }"
        : OF_TOKENS(0), OF_TOKENS(1), OF_TOKENS(2), OF_TOKENS(3),
          OF_TOKENS(4), OF_TOKENS(5), OF_TOKENS(6), OF_TOKENS(7),
          OF_TOKENS(8), OF_TOKENS(9), OF_TOKENS(10), OF_TOKENS(11)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(inputs));
  }
  if constexpr (TOKENS == 128) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, add, 1, 1, 0; }"
        : OF_TOKENS(0), OF_TOKENS(1), OF_TOKENS(2), OF_TOKENS(3),
          OF_TOKENS(4), OF_TOKENS(5), OF_TOKENS(6), OF_TOKENS(7),
          OF_TOKENS(8), OF_TOKENS(9), OF_TOKENS(10), OF_TOKENS(11),
          OF_TOKENS(12), OF_TOKENS(13), OF_TOKENS(14), OF_TOKENS(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(inputs));
  }
}

#undef OF_TOKENS
