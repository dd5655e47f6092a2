// Decoding with a cache of keys and values, `[B, Hkv, capacity, d]` each.

#include "common.cuh"

#include <float.h>

// Positions that a block attends to. The same number stands in `decode.rs`.
constexpr int SPLIT = 256;
constexpr int WARPS = 4;
constexpr int WIDEST = 128;

// Copies keys and values of packed rows `[N, (Hq + 2 Hkv) d]` to their places. A thread has an element.
template <class T>
__device__ void append(T *keys, T *values, const T *qkv, const unsigned *sequences, const unsigned *positions,
                       int query_heads, int key_heads, int width, int capacity, long long count) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    int channel = i % width, head = i / width % key_heads, part = i / width / key_heads % 2;
    long long row = i / width / key_heads / 2, sequence = sequences ? sequences[row] : row;
    T *cache = part == 0 ? keys : values;
    int from = query_heads + part * key_heads + head, heads = query_heads + 2 * key_heads;
    cache[((sequence * key_heads + head) * capacity + positions[row]) * width + channel] =
        qkv[(row * heads + from) * width + channel];
}
extern "C" __global__ void append_f32(float *keys, float *values, const float *qkv, const unsigned *sequences,
                                      const unsigned *positions, int query_heads, int key_heads, int width,
                                      int capacity, long long count) {
    append(keys, values, qkv, sequences, positions, query_heads, key_heads, width, capacity, count);
}
extern "C" __global__ void append_bf16(bf16 *keys, bf16 *values, const bf16 *qkv, const unsigned *sequences,
                                       const unsigned *positions, int query_heads, int key_heads, int width,
                                       int capacity, long long count) {
    append(keys, values, qkv, sequences, positions, query_heads, key_heads, width, capacity, count);
}

// Part of a softmax: the largest score, and relative to it the sum of weights and the weighted sum of values.
struct Part {
    float largest, sum, values[PACK];
    // Takes another part in, by the weights of both.
    __device__ __forceinline__ void take(float other_largest, float other_sum, const float (&others)[PACK]) {
        float larger = fmaxf(largest, other_largest);
        float own = expf(largest - larger), other = expf(other_largest - larger);
        largest = larger;
        sum = sum * own + other_sum * other;
#pragma unroll
        for (int i = 0; i < PACK; i++) values[i] = values[i] * own + others[i] * other;
    }
};

// Attention of one row over part of its cache. A block has one row, one head of queries and SPLIT positions; groups of
// lanes, PACK channels each, take turns with the positions. The result goes to `out`, or where that is shared by
// several blocks to `parts`.
template <class T>
__device__ void attend(T *out, float *parts, const T *qkv, const T *keys, const T *values, const unsigned *positions,
                       int query_heads, int key_heads, int width, float scale, int window, int capacity) {
    __shared__ float of_warps[WARPS][WIDEST + 2];
    int row = blockIdx.x, head = blockIdx.y, seen = positions[row] + 1;
    int begin = max(static_cast<int>(blockIdx.z) * SPLIT, seen - window);
    int end = min(static_cast<int>(blockIdx.z + 1) * SPLIT, seen);
    if (begin >= end) return;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // Lanes of a group: a power of two, some of which may have no channels.
    int lanes = 1;
    while (lanes * PACK < width) lanes *= 2;
    int group = warp * (WARP / lanes) + lane / lanes, groups = WARPS * WARP / lanes, channel = lane % lanes * PACK;
    int shared_head = head * key_heads / query_heads;
    long long cache = (static_cast<long long>(row) * key_heads + shared_head) * capacity;

    float query[PACK];
    load(query, qkv + (static_cast<long long>(row) * (query_heads + 2 * key_heads) + head) * width, channel, width);
    Part part = {-FLT_MAX, 0.0f, {}};
    for (int first = begin; first < end; first += groups) {
        int position = first + group;
        bool there = position < end;
        float key[PACK], value[PACK];
        long long at = (cache + (there ? position : begin)) * width;
        load(key, keys + at, channel, width);
        load(value, values + at, channel, width);
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < PACK; i++) score += query[i] * key[i];
        for (int step = lanes / 2; step > 0; step /= 2) score += __shfl_xor_sync(ALL_LANES, score, step);
        if (there) part.take(score * scale, 1.0f, value);
    }
    for (int step = lanes; step < WARP; step *= 2) {
        float others[PACK];
        float largest = __shfl_xor_sync(ALL_LANES, part.largest, step),
              sum = __shfl_xor_sync(ALL_LANES, part.sum, step);
        for (int i = 0; i < PACK; i++) others[i] = __shfl_xor_sync(ALL_LANES, part.values[i], step);
        part.take(largest, sum, others);
    }
    if (lane < lanes) {
        for (int i = 0; i < PACK && channel + i < width; i++) of_warps[warp][channel + i] = part.values[i];
        if (lane == 0) {
            of_warps[warp][WIDEST] = part.largest;
            of_warps[warp][WIDEST + 1] = part.sum;
        }
    }
    __syncthreads();
    float largest = of_warps[0][WIDEST], sum = 0.0f, result = 0.0f;
    for (int w = 1; w < WARPS; w++) largest = fmaxf(largest, of_warps[w][WIDEST]);
    int c = threadIdx.x;
    for (int w = 0; w < WARPS; w++) {
        float factor = expf(of_warps[w][WIDEST] - largest);
        sum += of_warps[w][WIDEST + 1] * factor;
        if (c < width) result += of_warps[w][c] * factor;
    }
    long long place = static_cast<long long>(row) * query_heads + head;
    if (parts) {
        float *to = parts + (place * gridDim.z + blockIdx.z) * (width + 2);
        if (c < width) to[c + 2] = result;
        if (c == 0) to[0] = largest, to[1] = sum;
    } else if (c < width) {
        out[place * width + c] = from_float<T>(result / sum);
    }
}
extern "C" __global__ void attend_f32(float *out, float *parts, const float *qkv, const float *keys,
                                      const float *values, const unsigned *positions, int query_heads, int key_heads,
                                      int width, float scale, int window, int capacity) {
    attend(out, parts, qkv, keys, values, positions, query_heads, key_heads, width, scale, window, capacity);
}
extern "C" __global__ void attend_bf16(bf16 *out, float *parts, const bf16 *qkv, const bf16 *keys, const bf16 *values,
                                       const unsigned *positions, int query_heads, int key_heads, int width,
                                       float scale, int window, int capacity) {
    attend(out, parts, qkv, keys, values, positions, query_heads, key_heads, width, scale, window, capacity);
}

// The result from the parts of a row and head, of which those before and behind what the row sees were not written. A block
// has one.
template <class T>
__device__ void combine(T *out, const float *parts, const unsigned *positions, int heads, int width, int window,
                        int splits) {
    long long place = static_cast<long long>(blockIdx.x) * heads + blockIdx.y;
    const float *from = parts + place * splits * (width + 2);
    int last = positions[blockIdx.x], used = last / SPLIT + 1, c = threadIdx.x;
    int begin = max(last + 1 - window, 0) / SPLIT;
    if (c >= width) return;
    float largest = -FLT_MAX, sum = 0.0f, result = 0.0f;
    for (int s = begin; s < used; s++) largest = fmaxf(largest, from[s * (width + 2)]);
    for (int s = begin; s < used; s++) {
        const float *part = from + s * (width + 2);
        float factor = expf(part[0] - largest);
        sum += part[1] * factor;
        result += part[c + 2] * factor;
    }
    out[place * width + c] = from_float<T>(result / sum);
}
extern "C" __global__ void combine_f32(float *out, const float *parts, const unsigned *positions, int heads, int width,
                                       int window, int splits) {
    combine(out, parts, positions, heads, width, window, splits);
}
extern "C" __global__ void combine_bf16(bf16 *out, const float *parts, const unsigned *positions, int heads, int width,
                                        int window, int splits) {
    combine(out, parts, positions, heads, width, window, splits);
}
