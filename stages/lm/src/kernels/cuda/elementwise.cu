// Loops over single elements: nonlinearities, sums, bias, dropout, conversions.

#include "common.cuh"

// x += y
template <class T> __device__ void add(T *x, const T *y, long long count) {
    long long first = first_element();
    if (first >= count) return;
    float a[PACK], b[PACK];
    load(a, x, first, count);
    load(b, y, first, count);
    for (int i = 0; i < PACK; i++) a[i] += b[i];
    store(x, first, count, a);
}
extern "C" __global__ void add_f32(float *x, const float *y, long long count) { add(x, y, count); }
extern "C" __global__ void add_bf16(bf16 *x, const bf16 *y, long long count) { add(x, y, count); }

template <class To, class From> __device__ void cast(To *out, const From *x, long long count) {
    long long first = first_element();
    if (first >= count) return;
    float values[PACK];
    load(values, x, first, count);
    store(out, first, count, values);
}
extern "C" __global__ void convert_f32_f32(float *out, const float *x, long long count) { cast(out, x, count); }
extern "C" __global__ void convert_f32_bf16(bf16 *out, const float *x, long long count) { cast(out, x, count); }
extern "C" __global__ void convert_bf16_f32(float *out, const bf16 *x, long long count) { cast(out, x, count); }
extern "C" __global__ void convert_bf16_bf16(bf16 *out, const bf16 *x, long long count) { cast(out, x, count); }

// sqrt(2 / pi), of the tanh approximation of GELU.
constexpr float ROOT = 0.7978846f;
constexpr float CUBIC = 0.044715f;
constexpr float INVERSE_ROOT_2 = 0.70710678f;
constexpr float DENSITY_AT_0 = 0.39894228f;

struct GeluTanh {
    static __device__ __forceinline__ float of(float x) {
        return 0.5f * x * (1.0f + tanhf(ROOT * (x + CUBIC * x * x * x)));
    }
    static __device__ __forceinline__ float slope(float x) {
        float t = tanhf(ROOT * (x + CUBIC * x * x * x));
        return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * ROOT * (1.0f + 3.0f * CUBIC * x * x);
    }
};
struct GeluErf {
    static __device__ __forceinline__ float of(float x) { return x * 0.5f * (1.0f + erff(x * INVERSE_ROOT_2)); }
    static __device__ __forceinline__ float slope(float x) {
        return 0.5f * (1.0f + erff(x * INVERSE_ROOT_2)) + x * DENSITY_AT_0 * expf(-0.5f * x * x);
    }
};
struct Relu {
    static __device__ __forceinline__ float of(float x) { return x > 0.0f ? x : 0.0f; }
    static __device__ __forceinline__ float slope(float x) { return x > 0.0f ? 1.0f : 0.0f; }
};
struct Silu {
    static __device__ __forceinline__ float share(float x) { return 1.0f / (1.0f + expf(-x)); }
    static __device__ __forceinline__ float of(float x) { return x * share(x); }
    static __device__ __forceinline__ float slope(float x) {
        float s = share(x);
        return s * (1.0f + x * (1.0f - s));
    }
};

// out = f(x)
template <class F, class T> __device__ void activation(T *out, const T *x, long long count) {
    long long first = first_element();
    if (first >= count) return;
    float values[PACK];
    load(values, x, first, count);
    for (int i = 0; i < PACK; i++) values[i] = F::of(values[i]);
    store(out, first, count, values);
}

// dy *= f'(x)
template <class F, class T> __device__ void activation_backward(T *dy, const T *x, long long count) {
    long long first = first_element();
    if (first >= count) return;
    float slopes[PACK], values[PACK];
    load(slopes, dy, first, count);
    load(values, x, first, count);
    for (int i = 0; i < PACK; i++) slopes[i] *= F::slope(values[i]);
    store(dy, first, count, slopes);
}

extern "C" __global__ void gelu_tanh_f32(float *out, const float *x, long long n) { activation<GeluTanh>(out, x, n); }
extern "C" __global__ void gelu_tanh_bf16(bf16 *out, const bf16 *x, long long n) { activation<GeluTanh>(out, x, n); }
extern "C" __global__ void gelu_erf_f32(float *out, const float *x, long long n) { activation<GeluErf>(out, x, n); }
extern "C" __global__ void gelu_erf_bf16(bf16 *out, const bf16 *x, long long n) { activation<GeluErf>(out, x, n); }
extern "C" __global__ void relu_f32(float *out, const float *x, long long n) { activation<Relu>(out, x, n); }
extern "C" __global__ void relu_bf16(bf16 *out, const bf16 *x, long long n) { activation<Relu>(out, x, n); }

extern "C" __global__ void gelu_tanh_backward_f32(float *dy, const float *x, long long n) {
    activation_backward<GeluTanh>(dy, x, n);
}
extern "C" __global__ void gelu_tanh_backward_bf16(bf16 *dy, const bf16 *x, long long n) {
    activation_backward<GeluTanh>(dy, x, n);
}
extern "C" __global__ void gelu_erf_backward_f32(float *dy, const float *x, long long n) {
    activation_backward<GeluErf>(dy, x, n);
}
extern "C" __global__ void gelu_erf_backward_bf16(bf16 *dy, const bf16 *x, long long n) {
    activation_backward<GeluErf>(dy, x, n);
}
extern "C" __global__ void relu_backward_f32(float *dy, const float *x, long long n) {
    activation_backward<Relu>(dy, x, n);
}
extern "C" __global__ void relu_backward_bf16(bf16 *dy, const bf16 *x, long long n) {
    activation_backward<Relu>(dy, x, n);
}

// out = silu(gate) up
template <class T> __device__ void swiglu(T *out, const T *gate, const T *up, long long count) {
    long long first = first_element();
    if (first >= count) return;
    float g[PACK], u[PACK];
    load(g, gate, first, count);
    load(u, up, first, count);
    for (int i = 0; i < PACK; i++) g[i] = Silu::of(g[i]) * u[i];
    store(out, first, count, g);
}
extern "C" __global__ void swiglu_f32(float *out, const float *gate, const float *up, long long n) {
    swiglu(out, gate, up, n);
}
extern "C" __global__ void swiglu_bf16(bf16 *out, const bf16 *gate, const bf16 *up, long long n) {
    swiglu(out, gate, up, n);
}

template <class T>
__device__ void swiglu_backward(T *dgate, T *dup, const T *dy, const T *gate, const T *up, long long count) {
    long long first = first_element();
    if (first >= count) return;
    float d[PACK], g[PACK], u[PACK];
    load(d, dy, first, count);
    load(g, gate, first, count);
    load(u, up, first, count);
    float by_gate[PACK];
    for (int i = 0; i < PACK; i++) by_gate[i] = d[i] * u[i] * Silu::slope(g[i]);
    for (int i = 0; i < PACK; i++) d[i] *= Silu::of(g[i]);
    store(dgate, first, count, by_gate);
    store(dup, first, count, d);
}
extern "C" __global__ void swiglu_backward_f32(float *dgate, float *dup, const float *dy, const float *gate,
                                               const float *up, long long n) {
    swiglu_backward(dgate, dup, dy, gate, up, n);
}
extern "C" __global__ void swiglu_backward_bf16(bf16 *dgate, bf16 *dup, const bf16 *dy, const bf16 *gate,
                                                const bf16 *up, long long n) {
    swiglu_backward(dgate, dup, dy, gate, up, n);
}

// x = dropout(x + bias); without bias or dropout where their pointer is null. A block has a row.
template <class T>
__device__ void bias_dropout(T *x, const float *bias, int width, const unsigned *keys, Dropout dropout) {
    T *own = x + static_cast<long long>(blockIdx.x) * width;
    unsigned row = keys ? keys[2 * blockIdx.x] : 0, line = keys ? keys[2 * blockIdx.x + 1] : 0;
    int warp_start = threadIdx.x / WARP * WARP * PACK;
    // The lanes of a warp stay together: they draw masks together.
    for (; warp_start < width; warp_start += blockDim.x * PACK) {
        int first = warp_start + threadIdx.x % WARP * PACK;
        float values[PACK], biases[PACK];
        load(values, own, first, width);
        if (bias) {
            load(biases, bias, first, width);
            for (int i = 0; i < PACK; i++) values[i] += biases[i];
        }
        if (keys) drop(values, dropout, row, line, warp_start);
        store(own, first, width, values);
    }
}
extern "C" __global__ void bias_dropout_f32(float *x, const float *bias, int width, const unsigned *keys,
                                            unsigned long long seed, unsigned update, unsigned purpose,
                                            unsigned threshold, float kept) {
    bias_dropout(x, bias, width, keys, {seed, update, purpose, threshold, kept});
}
extern "C" __global__ void bias_dropout_bf16(bf16 *x, const float *bias, int width, const unsigned *keys,
                                             unsigned long long seed, unsigned update, unsigned purpose,
                                             unsigned threshold, float kept) {
    bias_dropout(x, bias, width, keys, {seed, update, purpose, threshold, kept});
}
