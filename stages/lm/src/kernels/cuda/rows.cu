// Whole rows: their sum, and moving them.

#include "columns.cuh"

template <class T> __device__ void sum_rows(float *parts, const T *x, int rows, int width) {
    column_sums<1>(parts, rows, width, [=](int row, int first, float(&values)[1][PACK]) {
        load(values[0], x + static_cast<long long>(row) * width, first, width);
    });
}
extern "C" __global__ void sum_rows_f32(float *parts, const float *x, int rows, int width) {
    sum_rows(parts, x, rows, width);
}
extern "C" __global__ void sum_rows_bf16(float *parts, const bf16 *x, int rows, int width) {
    sum_rows(parts, x, rows, width);
}

// The sum of `count` vectors that lie `stride` apart, in a fixed order. A block has 32 columns.
extern "C" __global__ void sum_parts(float *out, const float *parts, int count, int stride, int width) {
    __shared__ float of_warps[COLUMN_WARPS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int column = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < width)
        for (int part = warp; part < count; part += COLUMN_WARPS)
            sum += parts[static_cast<long long>(part) * stride + column];
    of_warps[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= width) return;
    sum = 0.0f;
    for (int w = 0; w < COLUMN_WARPS; w++) sum += of_warps[w][lane];
    out[column] = sum;
}

// Copies a row, by a block.
template <class T> __device__ void copy_row(T *to, const T *from, int width) {
    for (int first = threadIdx.x * PACK; first < width; first += blockDim.x * PACK) {
        float values[PACK];
        load(values, from, first, width);
        store(to, first, width, values);
    }
}

// out[i] = x[indices[i]]
template <class T> __device__ void gather(T *out, const T *x, const unsigned *indices, int width) {
    copy_row(out + static_cast<long long>(blockIdx.x) * width, x + static_cast<long long>(indices[blockIdx.x]) * width,
             width);
}
extern "C" __global__ void gather_f32(float *out, const float *x, const unsigned *indices, int width) {
    gather(out, x, indices, width);
}
extern "C" __global__ void gather_bf16(bf16 *out, const bf16 *x, const unsigned *indices, int width) {
    gather(out, x, indices, width);
}

// out[indices[i]] = x[i]
template <class T> __device__ void scatter(T *out, const T *x, const unsigned *indices, int width) {
    copy_row(out + static_cast<long long>(indices[blockIdx.x]) * width, x + static_cast<long long>(blockIdx.x) * width,
             width);
}
extern "C" __global__ void scatter_f32(float *out, const float *x, const unsigned *indices, int width) {
    scatter(out, x, indices, width);
}
extern "C" __global__ void scatter_bf16(bf16 *out, const bf16 *x, const unsigned *indices, int width) {
    scatter(out, x, indices, width);
}
