// Rows: their sum, and moving them, whole or some of their columns.

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

// Columns of a matrix to those of another: rows of `count` elements that lie `from_stride` and `to_stride` apart. A block
// has a row.
template <class T> __device__ void copy_columns(T *to, const T *from, int to_stride, int from_stride, int count) {
    copy_row(to + static_cast<long long>(blockIdx.x) * to_stride, from + static_cast<long long>(blockIdx.x) * from_stride,
             count);
}
extern "C" __global__ void copy_columns_f32(float *to, const float *from, int to_stride, int from_stride, int count) {
    copy_columns(to, from, to_stride, from_stride, count);
}
extern "C" __global__ void copy_columns_bf16(bf16 *to, const bf16 *from, int to_stride, int from_stride, int count) {
    copy_columns(to, from, to_stride, from_stride, count);
}

// Of rows that are [a, b, d] rows that are [b, a, d]. A thread has an element.
template <class T> __device__ void regroup(T *out, const T *x, int a, int b, int d, long long count) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    long long row = i / d / a / b;
    int place = i / d % (a * b), channel = i % d;
    out[i] = x[((row * a + place % a) * b + place / a) * d + channel];
}
extern "C" __global__ void regroup_f32(float *out, const float *x, int a, int b, int d, long long count) {
    regroup(out, x, a, b, d, count);
}
extern "C" __global__ void regroup_bf16(bf16 *out, const bf16 *x, int a, int b, int d, long long count) {
    regroup(out, x, a, b, d, count);
}
