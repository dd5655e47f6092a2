// Vectors of tokens, prompt and positions, and the gradients of their tables.

#include "common.cuh"

// out = vector of the input + vector of the position. Inputs from 0 are token ids, -1 - i is vector i of the
// prompt. Without positions where their table is null. A block has a row.
template <class T>
__device__ void embed(T *out, const int *inputs, const unsigned *at, const T *tokens, const T *prompt,
                      const T *positions, int width) {
    int input = inputs[blockIdx.x];
    const T *vector = input >= 0 ? tokens + static_cast<long long>(input) * width
                                 : prompt + static_cast<long long>(-1 - input) * width;
    const T *position = positions ? positions + static_cast<long long>(at[blockIdx.x]) * width : nullptr;
    T *row = out + static_cast<long long>(blockIdx.x) * width;
    for (int first = threadIdx.x * PACK; first < width; first += blockDim.x * PACK) {
        float values[PACK], others[PACK];
        load(values, vector, first, width);
        if (position) {
            load(others, position, first, width);
            for (int i = 0; i < PACK; i++) values[i] += others[i];
        }
        store(row, first, width, values);
    }
}
extern "C" __global__ void embed_f32(float *out, const int *inputs, const unsigned *at, const float *tokens,
                                     const float *prompt, const float *positions, int width) {
    embed(out, inputs, at, tokens, prompt, positions, width);
}
extern "C" __global__ void embed_bf16(bf16 *out, const int *inputs, const unsigned *at, const bf16 *tokens,
                                      const bf16 *prompt, const bf16 *positions, int width) {
    embed(out, inputs, at, tokens, prompt, positions, width);
}

// table[ids[g]] += sum of dy[order[i]] for i in starts[g] .. starts[g + 1]. A block has one place of the table and 256
// columns; its 8 warps take turns with the rows.
template <class T>
__device__ void add_groups(float *table, const T *dy, const unsigned *order, const unsigned *starts,
                           const unsigned *ids, int width) {
    constexpr int WARPS = 8;
    __shared__ float of_warps[WARPS][WARP * PACK];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int first = blockIdx.y * WARP * PACK + lane * PACK;
    float sums[PACK] = {};
    if (first < width) {
        for (unsigned i = starts[blockIdx.x] + warp; i < starts[blockIdx.x + 1]; i += WARPS) {
            float values[PACK];
            load(values, dy + static_cast<long long>(order[i]) * width, first, width);
            for (int k = 0; k < PACK; k++) sums[k] += values[k];
        }
    }
    store_wide(&of_warps[warp][lane * PACK], sums);
    __syncthreads();
    int column = blockIdx.y * WARP * PACK + threadIdx.x;
    if (column >= width) return;
    float total = 0.0f;
    for (int w = 0; w < WARPS; w++) total += of_warps[w][threadIdx.x];
    table[static_cast<long long>(ids[blockIdx.x]) * width + column] += total;
}
extern "C" __global__ void add_groups_f32(float *table, const float *dy, const unsigned *order, const unsigned *starts,
                                          const unsigned *ids, int width) {
    add_groups(table, dy, order, starts, ids, width);
}
extern "C" __global__ void add_groups_bf16(float *table, const bf16 *dy, const unsigned *order, const unsigned *starts,
                                           const unsigned *ids, int width) {
    add_groups(table, dy, order, starts, ids, width);
}
