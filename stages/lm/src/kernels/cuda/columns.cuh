// Sums over rows, column by column: of a block of rows first, and of the blocks in their order by `sum_parts`.
#pragma once

#include "common.cuh"

// Rows and columns of a block, by 8 warps. The same numbers stand in `rows.rs`.
constexpr int COLUMN_ROWS = 64;
constexpr int COLUMN_WIDTH = WARP * PACK;
constexpr int COLUMN_WARPS = 8;

// Writes `SUMS` vectors `[width]` a block of rows, `parts` `[blocks, SUMS, width]`. `terms(row, first, values)` sets
// what elements `first ..` of a row add to each.
template <int SUMS, class Terms>
__device__ __forceinline__ void column_sums(float *parts, int rows, int width, Terms terms) {
    __shared__ float of_warps[SUMS][COLUMN_WARPS][COLUMN_WIDTH];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int first = blockIdx.y * COLUMN_WIDTH + lane * PACK, start = blockIdx.x * COLUMN_ROWS;
    float sums[SUMS][PACK] = {};
    if (first < width) {
        for (int row = start + warp; row < min(start + COLUMN_ROWS, rows); row += COLUMN_WARPS) {
            float values[SUMS][PACK];
            terms(row, first, values);
            for (int s = 0; s < SUMS; s++)
                for (int i = 0; i < PACK; i++) sums[s][i] += values[s][i];
        }
    }
    for (int s = 0; s < SUMS; s++) store_wide(&of_warps[s][warp][lane * PACK], sums[s]);
    __syncthreads();
    int column = blockIdx.y * COLUMN_WIDTH + threadIdx.x;
    if (column >= width) return;
    for (int s = 0; s < SUMS; s++) {
        float total = 0.0f;
        for (int w = 0; w < COLUMN_WARPS; w++) total += of_warps[s][w][threadIdx.x];
        parts[(static_cast<long long>(blockIdx.x) * SUMS + s) * width + column] = total;
    }
}
