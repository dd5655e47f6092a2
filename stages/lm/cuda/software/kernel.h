// What nvcc gives a kernel, for a host's C++ compiler: included before each `.cu` file. See block.h for how threads
// run.
//
// Not there: inline PTX, textures, cooperative groups, asynchronous copies, kernels without extern "C".
#pragma once
#include <cassert>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>

#include "block.h"

// Only now: the headers above write PTX for a GPU.
#define __CUDA_ARCH__ 900
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

#undef __global__
#undef __shared__
#undef __device__
#undef __host__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __align__
#undef __grid_constant__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
#define __builtin_assume(condition)
#ifndef SOFTWARE_LIST // the list of kernels is read from the preprocessed text, in which these stay
#define __global__
#define __launch_bounds__(...)
// A variable of the processor thread: also where it is declared `extern` for dynamic shared memory.
#define __shared__ thread_local
#endif

#define threadIdx (::software::place->thread)
#define blockIdx (::software::place->block)
#define blockDim (::software::place->threads)
#define gridDim (::software::place->blocks)
constexpr int warpSize = 32;

namespace software {

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

template <class T> struct Shuffled {
    T value, result;
    unsigned source;
    static void finish(void **brought, unsigned count) {
        for (unsigned l = 0; l < count; l++)
            if (auto own = static_cast<Shuffled *>(brought[l])) {
                auto other = static_cast<Shuffled *>(brought[own->source]);
                if (!other) misuse("a shuffle that reads lane %u, which takes no part", own->source);
                own->result = other->value;
            }
    }
};
template <class T> T shuffle(unsigned mask, T value, unsigned source) {
    Shuffled<T> own{value, value, source};
    meet_warp(mask, &own, Shuffled<T>::finish);
    return own.result;
}

// A value that all who meet make together: `COMBINE` of those brought, in the order of the threads.
template <class T, T (*COMBINE)(T, T)> struct Combined {
    T value, result;
    static void finish(void **brought, unsigned count) {
        Combined *first = nullptr;
        for (unsigned i = 0; i < count; i++)
            if (auto own = static_cast<Combined *>(brought[i])) {
                if (first)
                    first->result = COMBINE(first->result, own->value);
                else
                    first = own;
            }
        for (unsigned i = 0; i < count; i++)
            if (brought[i]) static_cast<Combined *>(brought[i])->result = first->result;
    }
};
template <class T, T (*COMBINE)(T, T)> T combine_warp(unsigned mask, T value) {
    Combined<T, COMBINE> own{value, value};
    meet_warp(mask, &own, Combined<T, COMBINE>::finish);
    return own.result;
}
template <class T, T (*COMBINE)(T, T)> T combine_block(T value) {
    Combined<T, COMBINE> own{value, value};
    meet_block(&own, Combined<T, COMBINE>::finish);
    return own.result;
}
template <class T> T add(T a, T b) { return a + b; }
template <class T> T bit_or(T a, T b) { return a | b; }
template <class T> T bit_and(T a, T b) { return a & b; }
template <class T> T bit_xor(T a, T b) { return a ^ b; }
template <class T> T least(T a, T b) { return b < a ? b : a; }
template <class T> T greatest(T a, T b) { return a < b ? b : a; }

template <class T> struct Matched {
    T value;
    unsigned result;
    static void finish(void **brought, unsigned count) {
        for (unsigned i = 0; i < count; i++)
            for (unsigned j = 0; brought[i] && j < count; j++)
                if (brought[j] &&
                    static_cast<Matched *>(brought[j])->value == static_cast<Matched *>(brought[i])->value)
                    static_cast<Matched *>(brought[i])->result |= 1u << j;
    }
};

template <class T, class F> T update(T *address, F change) {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    auto place = reinterpret_cast<Bits *>(address);
    Bits before = __atomic_load_n(place, __ATOMIC_RELAXED);
    for (;;) {
        T old, changed;
        memcpy(static_cast<void *>(&old), &before, sizeof(T));
        changed = change(old);
        Bits after;
        memcpy(&after, static_cast<void *>(&changed), sizeof(T));
        if (__atomic_compare_exchange_n(place, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return old;
    }
}

template <class... A> std::function<void()> bind(void (*kernel)(A...), void **arguments) {
    size_t i = 0;
    std::tuple<std::decay_t<A>...> packed{*static_cast<std::decay_t<A> *>(arguments[i++])...};
    return [kernel, packed] { std::apply(kernel, packed); };
}

} // namespace software

inline void __syncthreads() { software::meet_block(nullptr, nullptr); }
inline int __syncthreads_or(int p) { return software::combine_block<int, software::bit_or>(p != 0); }
inline int __syncthreads_and(int p) { return software::combine_block<int, software::bit_and>(p != 0); }
inline int __syncthreads_count(int p) { return software::combine_block<int, software::add>(p != 0); }
inline void __syncwarp(unsigned mask = ~0u) { software::meet_warp(mask, nullptr, nullptr); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return software::shuffle(mask, value, (software::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = software::lane();
    return software::shuffle(mask, value, (lane & (width - 1)) < delta ? lane : lane - delta);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = software::lane();
    return software::shuffle(mask, value, (lane & (width - 1)) + delta >= unsigned(width) ? lane : lane + delta);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    unsigned lane = software::lane(), source = lane ^ bits;
    return software::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return software::combine_warp<unsigned, software::bit_or>(mask, predicate ? 1u << software::lane() : 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T> unsigned __match_any_sync(unsigned mask, T value) {
    software::Matched<T> own{value, 0};
    software::meet_warp(mask, &own, software::Matched<T>::finish);
    return own.result;
}
template <class T> T __reduce_add_sync(unsigned mask, T v) { return software::combine_warp<T, software::add>(mask, v); }
template <class T> T __reduce_min_sync(unsigned mask, T v) {
    return software::combine_warp<T, software::least>(mask, v);
}
template <class T> T __reduce_max_sync(unsigned mask, T v) {
    return software::combine_warp<T, software::greatest>(mask, v);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
    return software::combine_warp<unsigned, software::bit_or>(mask, v);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned v) {
    return software::combine_warp<unsigned, software::bit_and>(mask, v);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v) {
    return software::combine_warp<unsigned, software::bit_xor>(mask, v);
}

template <class T>
using Same = std::common_type_t<T>; // no deduction: the pointer decides the type, as in CUDA's overloads
template <class T> T atomicAdd(T *p, Same<T> v) {
    return software::update(p, [=](T old) { return T(old + v); });
}
template <class T> T atomicSub(T *p, Same<T> v) {
    return software::update(p, [=](T old) { return T(old - v); });
}
template <class T> T atomicMin(T *p, Same<T> v) {
    return software::update(p, [=](T old) { return v < old ? v : old; });
}
template <class T> T atomicMax(T *p, Same<T> v) {
    return software::update(p, [=](T old) { return old < v ? v : old; });
}
template <class T> T atomicAnd(T *p, Same<T> v) {
    return software::update(p, [=](T old) { return T(old & v); });
}
template <class T> T atomicOr(T *p, Same<T> v) {
    return software::update(p, [=](T old) { return T(old | v); });
}
template <class T> T atomicXor(T *p, Same<T> v) {
    return software::update(p, [=](T old) { return T(old ^ v); });
}
template <class T> T atomicExch(T *p, Same<T> v) {
    return software::update(p, [=](T) { return v; });
}
template <class T> T atomicCAS(T *p, Same<T> expected, Same<T> v) {
    return software::update(p, [=](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned *p, unsigned most) {
    return software::update(p, [=](unsigned old) { return old >= most ? 0 : old + 1; });
}

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T __ldca(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldlu(const T *p) { return *p; }
template <class T> void __stcg(T *p, Same<T> v) { *p = v; }
template <class T> void __stcs(T *p, Same<T> v) { *p = v; }
template <class T> void __stwt(T *p, Same<T> v) { *p = v; }

template <class To, class From> To software_bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    memcpy(&to, &from, sizeof to);
    return to;
}
inline int __float_as_int(float v) { return software_bits<int>(v); }
inline unsigned __float_as_uint(float v) { return software_bits<unsigned>(v); }
inline float __int_as_float(int v) { return software_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return software_bits<float>(v); }
inline long long __double_as_longlong(double v) { return software_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return software_bits<double>(v); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline int __mulhi(int a, int b) { return int64_t(a) * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned __int128)a * b >> 64;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __frcp_rn(float v) { return 1 / v; }
inline float __frsqrt_rn(float v) { return 1 / sqrtf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float v) { return v > 0 ? fminf(v, 1) : 0; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __double2float_rn(double v) { return v; }
inline int __float2int_rn(float v) { return lrintf(v); }
inline int __float2int_rd(float v) { return floorf(v); }
inline int __float2int_rz(float v) { return v; }
inline float __int2float_rn(int v) { return v; }
inline float __uint2float_rn(unsigned v) { return v; }
inline float rsqrtf(float v) { return 1 / sqrtf(v); }
inline double rsqrt(double v) { return 1 / sqrt(v); }
inline float normcdff(float v) { return 0.5f * erfcf(-v * 0.70710678f); }
inline double normcdf(double v) { return 0.5 * erfc(-v * 0.70710678118654752); }
// The C library declares these names for itself.
#define __expf(v) expf(v)
#define __exp10f(v) powf(10, v)
#define __logf(v) logf(v)
#define __log2f(v) log2f(v)
#define __log10f(v) log10f(v)
#define __powf(a, b) powf(a, b)
#define __sinf(v) sinf(v)
#define __cosf(v) cosf(v)
#define __tanf(v) tanf(v)

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return fmax(T(a), T(b));
    else
        return T(a) < T(b) ? T(b) : T(a);
}
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return fmin(T(a), T(b));
    else
        return T(b) < T(a) ? T(b) : T(a);
}

// Functions of the 16-bit types that NVIDIA's headers give to GPUs alone.
#define SOFTWARE_HALF(T, WIDE, NARROW)                                                                                 \
    inline T hexp(T v) { return NARROW(expf(WIDE(v))); }                                                               \
    inline T hlog(T v) { return NARROW(logf(WIDE(v))); }                                                               \
    inline T hsin(T v) { return NARROW(sinf(WIDE(v))); }                                                               \
    inline T hcos(T v) { return NARROW(cosf(WIDE(v))); }                                                               \
    inline T hsqrt(T v) { return NARROW(sqrtf(WIDE(v))); }                                                             \
    inline T hrsqrt(T v) { return NARROW(1 / sqrtf(WIDE(v))); }                                                        \
    inline T hrcp(T v) { return NARROW(1 / WIDE(v)); }                                                                 \
    inline T hceil(T v) { return NARROW(ceilf(WIDE(v))); }                                                             \
    inline T hfloor(T v) { return NARROW(floorf(WIDE(v))); }                                                           \
    inline T hrint(T v) { return NARROW(rintf(WIDE(v))); }
SOFTWARE_HALF(__half, __half2float, __float2half)
SOFTWARE_HALF(__nv_bfloat16, __bfloat162float, __float2bfloat16)
#undef SOFTWARE_HALF
