// Layer norm, y = (x - mean) / sqrt(variance + eps) weight + bias, and RMS norm, y = x / sqrt(mean(x^2) + eps) weight.

#include "columns.cuh"

// A block has a row. Writes mean (0 for RMS norm) and reciprocal deviation to `moments`, `[N, 2]`.
template <bool CENTRED, class T>
__device__ void norm(T *out, float *moments, const T *x, const float *weight, const float *bias, int width, float eps) {
    long long start = static_cast<long long>(blockIdx.x) * width;
    const T *row = x + start;
    float values[PACK], others[PACK];
    float total = 0.0f;
    for (int first = threadIdx.x * PACK; first < width; first += blockDim.x * PACK) {
        load(values, row, first, width);
        for (int i = 0; i < PACK; i++) total += CENTRED ? values[i] : values[i] * values[i];
    }
    total = over_block<Sum>(total);
    float mean = CENTRED ? total / width : 0.0f;
    if (CENTRED) {
        total = 0.0f;
        for (int first = threadIdx.x * PACK; first < width; first += blockDim.x * PACK) {
            load(values, row, first, width);
            for (int i = 0; i < PACK; i++) {
                float deviation = first + i < width ? values[i] - mean : 0.0f;
                total += deviation * deviation;
            }
        }
        total = over_block<Sum>(total);
    }
    float scale = 1.0f / sqrtf(total / width + eps);
    for (int first = threadIdx.x * PACK; first < width; first += blockDim.x * PACK) {
        load(values, row, first, width);
        load(others, weight, first, width);
        for (int i = 0; i < PACK; i++) values[i] = (values[i] - mean) * scale * others[i];
        if (CENTRED) {
            load(others, bias, first, width);
            for (int i = 0; i < PACK; i++) values[i] += others[i];
        }
        store(out + start, first, width, values);
    }
    if (threadIdx.x == 0) {
        moments[2 * blockIdx.x] = mean;
        moments[2 * blockIdx.x + 1] = scale;
    }
}
extern "C" __global__ void layer_norm_f32(float *out, float *moments, const float *x, const float *weight,
                                          const float *bias, int width, float eps) {
    norm<true>(out, moments, x, weight, bias, width, eps);
}
extern "C" __global__ void layer_norm_bf16(bf16 *out, float *moments, const bf16 *x, const float *weight,
                                           const float *bias, int width, float eps) {
    norm<true>(out, moments, x, weight, bias, width, eps);
}
extern "C" __global__ void rms_norm_f32(float *out, float *moments, const float *x, const float *weight,
                                        const float *bias, int width, float eps) {
    norm<false>(out, moments, x, weight, bias, width, eps);
}
extern "C" __global__ void rms_norm_bf16(bf16 *out, float *moments, const bf16 *x, const float *weight,
                                         const float *bias, int width, float eps) {
    norm<false>(out, moments, x, weight, bias, width, eps);
}

// With n = (x - mean) scale and g = dy weight: dx = scale (g - mean(g) - n mean(g n)), where RMS norm has no mean(g).
// Added to what is in dx. A block has a row.
template <bool CENTRED, class T>
__device__ void norm_backward(T *dx, const T *x, const float *weight, const float *moments, const T *dy, int width) {
    long long start = static_cast<long long>(blockIdx.x) * width;
    float mean = moments[2 * blockIdx.x], scale = moments[2 * blockIdx.x + 1];
    float n[PACK], g[PACK], factors[PACK];
    float g_sum = 0.0f, gn_sum = 0.0f;
    for (int first = threadIdx.x * PACK; first < width; first += blockDim.x * PACK) {
        load(n, x + start, first, width);
        load(g, dy + start, first, width);
        load(factors, weight, first, width);
        for (int i = 0; i < PACK; i++) {
            g[i] *= factors[i];
            g_sum += g[i];
            gn_sum += g[i] * ((n[i] - mean) * scale);
        }
    }
    float g_mean = CENTRED ? over_block<Sum>(g_sum) / width : 0.0f;
    float gn_mean = over_block<Sum>(gn_sum) / width;
    for (int first = threadIdx.x * PACK; first < width; first += blockDim.x * PACK) {
        load(n, x + start, first, width);
        load(g, dy + start, first, width);
        load(factors, weight, first, width);
        for (int i = 0; i < PACK; i++) g[i] = scale * (g[i] * factors[i] - g_mean - (n[i] - mean) * scale * gn_mean);
        load(n, dx + start, first, width);
        // Never fused with the product before it, which the compiler would do in some of the columns only.
        for (int i = 0; i < PACK; i++) g[i] = __fadd_rn(g[i], n[i]);
        store(dx + start, first, width, g);
    }
}
extern "C" __global__ void layer_norm_backward_f32(float *dx, const float *x, const float *weight, const float *moments,
                                                   const float *dy, int width) {
    norm_backward<true>(dx, x, weight, moments, dy, width);
}
extern "C" __global__ void layer_norm_backward_bf16(bf16 *dx, const bf16 *x, const float *weight, const float *moments,
                                                    const bf16 *dy, int width) {
    norm_backward<true>(dx, x, weight, moments, dy, width);
}
extern "C" __global__ void rms_norm_backward_f32(float *dx, const float *x, const float *weight, const float *moments,
                                                 const float *dy, int width) {
    norm_backward<false>(dx, x, weight, moments, dy, width);
}
extern "C" __global__ void rms_norm_backward_bf16(bf16 *dx, const bf16 *x, const float *weight, const float *moments,
                                                  const bf16 *dy, int width) {
    norm_backward<false>(dx, x, weight, moments, dy, width);
}

// Sums over blocks of rows of dy n, the gradient of the weight, and of dy, that of the bias.
template <class T>
__device__ void norm_parameters(float *parts, const T *x, const float *moments, const T *dy, int rows, int width) {
    column_sums<2>(parts, rows, width, [=](int row, int first, float(&values)[2][PACK]) {
        long long start = static_cast<long long>(row) * width;
        float mean = moments[2 * row], scale = moments[2 * row + 1];
        load(values[0], x + start, first, width);
        load(values[1], dy + start, first, width);
        for (int i = 0; i < PACK; i++) values[0][i] = values[1][i] * ((values[0][i] - mean) * scale);
    });
}
extern "C" __global__ void norm_parameters_f32(float *parts, const float *x, const float *moments, const float *dy,
                                               int rows, int width) {
    norm_parameters(parts, x, moments, dy, rows, width);
}
extern "C" __global__ void norm_parameters_bf16(float *parts, const bf16 *x, const float *moments, const bf16 *dy,
                                                int rows, int width) {
    norm_parameters(parts, x, moments, dy, rows, width);
}
