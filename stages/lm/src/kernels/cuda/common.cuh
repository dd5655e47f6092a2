// What the kernels share: elements of two types, sums over warps and blocks, random numbers.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

// Elements that a thread moves at a time: 16 bytes of bf16. The same number stands in `mod.rs`.
constexpr int PACK = 8;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

template <class T> __device__ __forceinline__ bool wide(const T *x) {
    return (reinterpret_cast<uintptr_t>(x) & 15) == 0;
}

__device__ __forceinline__ void load_wide(float (&to)[PACK], const float *x) {
    float4 a = reinterpret_cast<const float4 *>(x)[0], b = reinterpret_cast<const float4 *>(x)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

__device__ __forceinline__ void load_wide(float (&to)[PACK], const bf16 *x) {
    uint4 pairs = *reinterpret_cast<const uint4 *>(x);
    unsigned words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    // A bf16 is the upper half of the float of the same value.
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void store_wide(float *x, const float (&from)[PACK]) {
    reinterpret_cast<float4 *>(x)[0] = make_float4(from[0], from[1], from[2], from[3]);
    reinterpret_cast<float4 *>(x)[1] = make_float4(from[4], from[5], from[6], from[7]);
}

__device__ __forceinline__ void store_wide(bf16 *x, const float (&from)[PACK]) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned low = __bfloat16_as_ushort(__float2bfloat16(from[2 * i]));
        unsigned high = __bfloat16_as_ushort(__float2bfloat16(from[2 * i + 1]));
        words[i] = low | high << 16;
    }
    *reinterpret_cast<uint4 *>(x) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Elements `first ..` of a row or matrix of `count`; 0 behind its end.
template <class T>
__device__ __forceinline__ void load(float (&to)[PACK], const T *x, long long first, long long count) {
    if (first + PACK <= count && wide(x + first)) {
        load_wide(to, x + first);
    } else {
#pragma unroll
        for (int i = 0; i < PACK; i++) to[i] = first + i < count ? to_float(x[first + i]) : 0.0f;
    }
}

// Writes what lies before the end of a row or matrix of `count`.
template <class T>
__device__ __forceinline__ void store(T *x, long long first, long long count, const float (&from)[PACK]) {
    if (first + PACK <= count && wide(x + first)) {
        store_wide(x + first, from);
    } else {
#pragma unroll
        for (int i = 0; i < PACK; i++)
            if (first + i < count) x[first + i] = from_float<T>(from[i]);
    }
}

// Where a thread's elements begin, in a loop over all elements of a matrix.
__device__ __forceinline__ long long first_element() {
    return (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
}

struct Sum {
    template <class N> static __device__ __forceinline__ N of(N a, N b) { return a + b; }
};
struct Max {
    template <class N> static __device__ __forceinline__ N of(N a, N b) { return a > b ? a : b; }
};

// Of the values of all lanes; each gets it.
template <class Op, class N> __device__ __forceinline__ N over_warp(N value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = Op::of(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// Of the values of all threads of a block of whole warps; each gets it. All threads must call.
template <class Op, class N> __device__ __forceinline__ N over_block(N value) {
    __shared__ N of_warps[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    value = over_warp<Op>(value);
    // Nobody may still read what an earlier call left.
    __syncthreads();
    if (lane == 0) of_warps[warp] = value;
    __syncthreads();
    N total = of_warps[0];
    for (int i = 1; i < warps; i++) total = Op::of(total, of_warps[i]);
    return total;
}

// Philox 4x32-10, as `contract::random`.
struct Words {
    unsigned word[4];
};
__device__ __forceinline__ Words philox(unsigned long long seed, unsigned c0, unsigned c1, unsigned c2, unsigned c3) {
    unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        unsigned n0 = static_cast<unsigned>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<unsigned>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<unsigned>(p1), c3 = static_cast<unsigned>(p0);
        c0 = n0, c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// A dropout mask: what `masks::fill` is given beside row and line.
struct Dropout {
    unsigned long long seed;
    unsigned update, purpose, threshold;
    float kept;
};

// Which of 32 elements of a line are dropped, a bit each: elements `32 block ..`. Eight lanes that follow each other
// ask for the same block together; all lanes of the warp must call.
__device__ __forceinline__ unsigned dropped(const Dropout &dropout, unsigned row, unsigned line, unsigned block) {
    unsigned counter = threadIdx.x % 8;
    Words words = philox(dropout.seed, (line << 14) + block * 8 + counter, row, dropout.update, dropout.purpose);
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) bits |= (words.word[i] < dropout.threshold ? 1u : 0u) << (8 * i + counter);
#pragma unroll
    for (int step = 1; step < 8; step *= 2) bits |= __shfl_xor_sync(ALL_LANES, bits, step);
    return bits;
}

// Multiplies a warp's packs of one row by the mask: lane `i` holds elements `first + PACK i ..`, where `first` is a
// multiple of 32. All lanes must call.
__device__ __forceinline__ void drop(float (&x)[PACK], const Dropout &dropout, unsigned row, unsigned line, int first) {
    int lane = threadIdx.x % WARP;
    // A warp's 256 elements are 8 blocks: each group of eight lanes draws two, and hands every lane its byte.
    unsigned low = dropped(dropout, row, line, first / 32 + lane / 8);
    unsigned high = dropped(dropout, row, line, first / 32 + 4 + lane / 8);
    int block = lane / 4;
    unsigned from_low = __shfl_sync(ALL_LANES, low, block % 4 * 8),
             from_high = __shfl_sync(ALL_LANES, high, block % 4 * 8);
    unsigned bits = (block < 4 ? from_low : from_high) >> (lane % 4 * 8);
#pragma unroll
    for (int i = 0; i < PACK; i++) x[i] = bits >> i & 1 ? 0.0f : x[i] * dropout.kept;
}
