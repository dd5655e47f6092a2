// AdamW over all parameters at once, and the norm of all gradients.

#include "common.cuh"

// Elements of a block. The same number stands in `adamw.rs`.
constexpr long long CHUNK = 8192;

// A row of the table of parameters: addresses, and below the number of elements, above what the weight is multiplied
// by.
struct Parameter {
    float *weight, *first, *second;
    const float *gradient;
    unsigned count;
    float keep;
};

// `places` are pairs of a parameter and a chunk of it, one a block.
extern "C" __global__ void adamw(const Parameter *table, const unsigned *places, const float *scale, float beta1,
                                 float beta2, float rest1, float rest2, float eps, float step, float correction) {
    Parameter p = table[places[2 * blockIdx.x]];
    long long start = places[2 * blockIdx.x + 1] * CHUNK;
    long long count = min(start + CHUNK, static_cast<long long>(p.count));
    float factor = *scale;
    for (long long at = start + threadIdx.x * PACK; at < count; at += blockDim.x * PACK) {
        float weight[PACK], first[PACK], second[PACK], gradient[PACK];
        load(weight, p.weight, at, count);
        load(first, p.first, at, count);
        load(second, p.second, at, count);
        load(gradient, p.gradient, at, count);
        for (int i = 0; i < PACK; i++) {
            float g = gradient[i] * factor;
            first[i] = beta1 * first[i] + rest1 * g;
            second[i] = beta2 * second[i] + rest2 * g * g;
            weight[i] = weight[i] * p.keep - step * first[i] / (sqrtf(second[i]) * correction + eps);
        }
        store(p.weight, at, count, weight);
        store(p.first, at, count, first);
        store(p.second, at, count, second);
    }
}

struct Gradient {
    const float *values;
    long long count;
};

// The sum of squares of each chunk.
extern "C" __global__ void squares(double *parts, const Gradient *table, const unsigned *places) {
    Gradient gradient = table[places[2 * blockIdx.x]];
    long long start = places[2 * blockIdx.x + 1] * CHUNK, count = min(start + CHUNK, gradient.count);
    double sum = 0.0;
    for (long long at = start + threadIdx.x * PACK; at < count; at += blockDim.x * PACK) {
        float values[PACK];
        load(values, gradient.values, at, count);
        for (int i = 0; i < PACK; i++) sum += static_cast<double>(values[i]) * values[i];
    }
    sum = over_block<Sum>(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// The norm from the sums of squares. One block.
extern "C" __global__ void root_of_sum(double *norm, const double *parts, int count) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
    sum = over_block<Sum>(sum);
    if (threadIdx.x == 0) *norm = sqrt(sum);
}
