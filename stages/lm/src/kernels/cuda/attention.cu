// Causal attention over packed sequences, with the softmax taken block by block of keys (Dao et al., "FlashAttention",
// 2022).
//
// A block of four warps has a tile of 64 queries (or keys) of one sequence and head; each warp has 16 of its rows.
// Products go by squares of 16 x 16: of bf16 on tensor cores, of f32 by multiplications and additions. Which elements
// of a square a lane holds is the hardware's business: `Places` finds out, so that everything elementwise happens in
// registers.
//
// Letters: N rows of the batch, d channels of a head, D channels with zeros behind them.

#include "common.cuh"

#include <float.h>
#include <mma.h>

using namespace nvcuda;

// The same numbers stand in `attention.rs`.
constexpr int TILE = 64;
constexpr int WARPS = 4;
constexpr int SQUARE = 16;
// Rows in shared memory are longer than what is in them, so that they begin in different banks.
constexpr int SCORES = TILE + 8; // a row of scores, forward
constexpr int STEP = 32;         // columns that a warp handles together, backward
constexpr int SLOPES = STEP + 8;
constexpr int STAGE = SQUARE + 8;
template <int D> constexpr int ROW = D + 8;

// What a lane holds of a square of sums: 8 of its elements.
template <class T> struct Square;
template <> struct Square<bf16> {
    wmma::fragment<wmma::accumulator, SQUARE, SQUARE, SQUARE, float> sums;
    __device__ __forceinline__ float &operator[](int i) { return sums.x[i]; }
    __device__ __forceinline__ void store(float *to, int row) const {
        wmma::store_matrix_sync(to, sums, row, wmma::mem_row_major);
    }
};
template <> struct Square<float> {
    float sums[PACK];
    __device__ __forceinline__ float &operator[](int i) { return sums[i]; }
    // A lane has half a row.
    __device__ __forceinline__ void store(float *to, int row) const {
        int lane = threadIdx.x % WARP;
        store_wide(to + lane / 2 * row + lane % 2 * PACK, sums);
    }
};

// Row and column in its square of each element that a lane holds. All threads of a block make it together.
template <class T> struct Places;
template <> struct Places<bf16> {
    Square<bf16> numbers;
    __device__ __forceinline__ Places() {
        __shared__ float count[SQUARE * SQUARE];
        for (int i = threadIdx.x; i < SQUARE * SQUARE; i += blockDim.x) count[i] = i;
        __syncthreads();
        wmma::load_matrix_sync(numbers.sums, count, SQUARE, wmma::mem_row_major);
    }
    __device__ __forceinline__ int row(int i) { return static_cast<int>(numbers[i]) / SQUARE; }
    __device__ __forceinline__ int column(int i) { return static_cast<int>(numbers[i]) % SQUARE; }
};
template <> struct Places<float> {
    __device__ __forceinline__ int row(int) { return threadIdx.x % WARP / 2; }
    __device__ __forceinline__ int column(int i) { return threadIdx.x % 2 * PACK + i; }
};

template <class T, int COUNT> __device__ __forceinline__ void clear(Square<T> (&squares)[COUNT]) {
#pragma unroll
    for (int n = 0; n < COUNT; n++)
#pragma unroll
        for (int i = 0; i < PACK; i++) squares[n][i] = 0.0f;
}

// c += a b for a row of squares: `a` is [16, 16 DEPTH]; `b` is [16 DEPTH, 16 COUNT], or the transpose of that where
// TURNED.
template <int DEPTH, bool TURNED, int COUNT>
__device__ __forceinline__ void multiply(Square<bf16> (&c)[COUNT], const bf16 *a, int a_row, const bf16 *b, int b_row) {
    using Order = std::conditional_t<TURNED, wmma::col_major, wmma::row_major>;
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
        wmma::fragment<wmma::matrix_a, SQUARE, SQUARE, SQUARE, bf16, wmma::row_major> left;
        wmma::load_matrix_sync(left, a + k * SQUARE, a_row);
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            wmma::fragment<wmma::matrix_b, SQUARE, SQUARE, SQUARE, bf16, Order> right;
            int row = TURNED ? n : k, column = TURNED ? k : n;
            wmma::load_matrix_sync(right, b + row * SQUARE * b_row + column * SQUARE, b_row);
            wmma::mma_sync(c[n].sums, left, right, c[n].sums);
        }
    }
}
template <int DEPTH, bool TURNED, int COUNT>
__device__ __forceinline__ void multiply(Square<float> (&c)[COUNT], const float *a, int a_row, const float *b,
                                         int b_row) {
    int lane = threadIdx.x % WARP, row = lane / 2, column = lane % 2 * PACK;
    for (int k = 0; k < SQUARE * DEPTH; k++) {
        float left = a[row * a_row + k];
#pragma unroll
        for (int n = 0; n < COUNT; n++)
#pragma unroll
            for (int i = 0; i < PACK; i++) {
                int at = n * SQUARE + column + i;
                c[n][i] += left * (TURNED ? b[at * b_row + k] : b[k * b_row + at]);
            }
    }
}

// One of queries, keys and values (or their gradients): the channels of a head are `width` elements of a row.
template <class T> struct Matrix {
    T *data;
    int stride;
    __device__ __forceinline__ T *at(long long row, int head, int width) const {
        return data + row * stride + head * width;
    }
};

// What every kernel is told.
struct Shape {
    int rows, queries, keys, width;
    float scale;
    // Positions that a query sees, its own and those before it.
    int window;
    Dropout dropout;
    bool dropping;
    __device__ __forceinline__ bool seen(int query, int key) const { return key <= query && query - key < window; }
    // The first tile of keys that a tile of queries sees.
    __device__ __forceinline__ int first_tile(int query) const { return max(query + 1 - window, 0) / TILE * TILE; }
};

// A tile: first row and length of its sequence, its own first row in it, the folded row id.
struct Tile {
    int start, length, first;
    unsigned id;
    __device__ __forceinline__ Tile(const unsigned *tiles, int index) {
        const unsigned *tile = tiles + 4 * index;
        start = tile[0], length = tile[1], first = tile[2], id = tile[3];
    }
};

// Copies 64 rows of one head to shared memory, `[64, ROW<D>]`, with zeros behind its channels and behind `rows`. By the
// block.
template <int D, class T> __device__ __forceinline__ void fetch(T *to, const T *from, int stride, int rows, int width) {
    for (int i = threadIdx.x; i < TILE * (D / PACK); i += blockDim.x) {
        int row = i / (D / PACK), first = i % (D / PACK) * PACK;
        const T *source = from + static_cast<long long>(row) * stride;
        T *target = to + row * ROW<D> + first;
        if (row < rows && first + PACK <= width && wide(source + first)) {
#pragma unroll
            for (int part = 0; part < sizeof(T) * PACK / sizeof(uint4); part++)
                reinterpret_cast<uint4 *>(target)[part] = reinterpret_cast<const uint4 *>(source + first)[part];
        } else {
            float values[PACK];
            load(values, source, first, row < rows ? width : 0);
            store_wide(target, values);
        }
    }
}

// Which of 64 keys from `key` on each of 64 queries from `query` on drops, two words a query. By the block.
__device__ __forceinline__ void draw(unsigned (*masks)[2], const Shape &shape, int head, unsigned id, int query,
                                     int key) {
    Dropout dropout = shape.dropout;
    dropout.purpose += head;
    for (int i = threadIdx.x / 8; i < TILE * 2; i += blockDim.x / 8)
        masks[i / 2][i % 2] = dropped(dropout, id, query + i / 2, key / 32 + i % 2);
}
__device__ __forceinline__ float kept(const unsigned (*masks)[2], const Shape &shape, int query, int key) {
    return masks[query][key / 32] >> (key % 32) & 1 ? 0.0f : shape.dropout.kept;
}

// Writes a warp's 16 rows of a result, as far as they are among `rows` and its channels among `width`.
template <class T, int COUNT>
__device__ __forceinline__ void write(const Square<T> (&squares)[COUNT], float *stage, T *to, int stride, int rows,
                                      int width) {
    int lane = threadIdx.x % WARP, row = lane / 2, column = lane % 2 * PACK;
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
        __syncwarp();
        squares[n].store(stage, STAGE);
        __syncwarp();
        float values[PACK];
        load_wide(values, stage + row * STAGE + column);
        if (row < rows) store(to + static_cast<long long>(row) * stride, n * SQUARE + column, width, values);
    }
}

// The result and the logarithm of each softmax' denominator. A block has a tile of queries of one head.
template <int D, class T>
__device__ void attention(T *out, float *normalisers, Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                          const unsigned *tiles, const Shape &shape) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ unsigned masks[TILE][2];
    __shared__ float factors[WARPS][SQUARE];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, row = lane / 2, side = lane % 2;
    T *queries = reinterpret_cast<T *>(memory), *keys = queries + TILE * ROW<D>, *values = keys + TILE * ROW<D>;
    float *scores = reinterpret_cast<float *>(values + TILE * ROW<D>) + warp * SQUARE * SCORES;
    // Probabilities take the place of the scores.
    T *probabilities = reinterpret_cast<T *>(scores);
    constexpr int PROBABILITIES = SCORES * sizeof(float) / sizeof(T);

    Tile tile(tiles, blockIdx.x);
    Places<T> places;
    int head = blockIdx.y, shared_head = head * shape.keys / shape.queries;
    fetch<D>(queries, q.at(tile.start + tile.first, head, shape.width), q.stride, tile.length - tile.first,
             shape.width);

    Square<T> result[D / SQUARE];
    clear(result);
    // Of this lane's row, which it shares with its neighbour: the largest score so far, and the sum relative to it.
    int query = tile.first + warp * SQUARE + row;
    float largest = -FLT_MAX, sum = 0.0f;
    for (int first = shape.first_tile(tile.first); first <= tile.first; first += TILE) {
        __syncthreads();
        fetch<D>(keys, k.at(tile.start + first, shared_head, shape.width), k.stride, tile.length - first, shape.width);
        fetch<D>(values, v.at(tile.start + first, shared_head, shape.width), v.stride, tile.length - first,
                 shape.width);
        if (shape.dropping) draw(masks, shape, head, tile.id, tile.first, first);
        __syncthreads();
        Square<T> products[TILE / SQUARE];
        clear(products);
        multiply<D / SQUARE, true>(products, queries + warp * SQUARE * ROW<D>, ROW<D>, keys, ROW<D>);
#pragma unroll
        for (int n = 0; n < TILE / SQUARE; n++) products[n].store(scores + n * SQUARE, SCORES);
        __syncwarp();

        // A lane has every other four columns of its row.
        float p[STEP];
        float larger = largest;
#pragma unroll
        for (int i = 0; i < STEP; i += 4) {
            int column = 2 * i + 4 * side;
            float4 four = *reinterpret_cast<const float4 *>(scores + row * SCORES + column);
            p[i] = four.x, p[i + 1] = four.y, p[i + 2] = four.z, p[i + 3] = four.w;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                p[i + j] = shape.seen(query, first + column + j) ? p[i + j] * shape.scale : -INFINITY;
                larger = p[i + j] > larger ? p[i + j] : larger;
            }
        }
        larger = fmaxf(larger, __shfl_xor_sync(ALL_LANES, larger, 1));
        float factor = expf(largest - larger), added = 0.0f;
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            p[i] = expf(p[i] - larger);
            added += p[i];
        }
        added += __shfl_xor_sync(ALL_LANES, added, 1);
        sum = sum * factor + added;
        largest = larger;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            int column = i / 4 * 8 + 4 * side + i % 4;
            if (shape.dropping) p[i] *= kept(masks, shape, warp * SQUARE + row, column);
            probabilities[row * PROBABILITIES + column] = from_float<T>(p[i]);
        }
        if (side == 0) factors[warp][row] = factor;
        __syncwarp();
#pragma unroll
        for (int n = 0; n < D / SQUARE; n++)
#pragma unroll
            for (int i = 0; i < PACK; i++) result[n][i] *= factors[warp][places.row(i)];
        multiply<TILE / SQUARE, false>(result, probabilities, PROBABILITIES, values, ROW<D>);
    }
    __syncwarp();
    if (side == 0) {
        factors[warp][row] = 1.0f / sum;
        if (query < tile.length)
            normalisers[static_cast<long long>(head) * shape.rows + tile.start + query] = largest + logf(sum);
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D / SQUARE; n++)
#pragma unroll
        for (int i = 0; i < PACK; i++) result[n][i] *= factors[warp][places.row(i)];
    int stride = shape.queries * shape.width, begin = tile.first + warp * SQUARE;
    T *to = out + static_cast<long long>(tile.start + begin) * stride + head * shape.width;
    write(result, scores, to, stride, tile.length - begin, shape.width);
}

// Of every row and head the product of result and gradient: what a softmax' derivative takes away. A warp has one.
template <class T>
__device__ void attention_products(float *products, const T *out, const T *dout, int rows, int heads, int width) {
    long long i = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (i >= static_cast<long long>(rows) * heads) return;
    float sum = 0.0f;
    for (int c = threadIdx.x % WARP; c < width; c += WARP)
        sum += to_float(out[i * width + c]) * to_float(dout[i * width + c]);
    sum = over_warp<Sum>(sum);
    if (threadIdx.x % WARP == 0) products[i % heads * rows + i / heads] = sum;
}

// Denominators and products of a tile of queries, 0 behind the end of the sequence. By the block.
__device__ __forceinline__ void fetch_rows(float (*to)[TILE], const float *normalisers, const float *products,
                                           long long start, int rows) {
    if (threadIdx.x >= TILE) return;
    bool there = static_cast<int>(threadIdx.x) < rows;
    to[0][threadIdx.x] = there ? normalisers[start + threadIdx.x] : 0.0f;
    to[1][threadIdx.x] = there ? products[start + threadIdx.x] : 0.0f;
}

// The gradient of queries. A block has a tile of them, of one head.
template <int D, class T>
__device__ void attention_queries(Matrix<T> dq, Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const T *dout,
                                  const float *normalisers, const float *products, const unsigned *tiles,
                                  const Shape &shape) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ unsigned masks[TILE][2];
    __shared__ float of_rows[2][TILE];
    int warp = threadIdx.x / WARP, stride = shape.queries * shape.width;
    T *queries = reinterpret_cast<T *>(memory), *gradients = queries + TILE * ROW<D>;
    T *keys = gradients + TILE * ROW<D>, *values = keys + TILE * ROW<D>;
    T *slopes = values + TILE * ROW<D> + warp * 2 * SQUARE * SLOPES;

    Tile tile(tiles, blockIdx.x);
    Places<T> places;
    int head = blockIdx.y, shared_head = head * shape.keys / shape.queries;
    long long begin = tile.start + tile.first;
    int rows = tile.length - tile.first;
    fetch<D>(queries, q.at(begin, head, shape.width), q.stride, rows, shape.width);
    fetch<D>(gradients, dout + begin * stride + head * shape.width, stride, rows, shape.width);
    fetch_rows(of_rows, normalisers, products, static_cast<long long>(head) * shape.rows + begin, rows);

    Square<T> result[D / SQUARE];
    clear(result);
    for (int first = shape.first_tile(tile.first); first <= tile.first; first += TILE) {
        __syncthreads();
        fetch<D>(keys, k.at(tile.start + first, shared_head, shape.width), k.stride, tile.length - first, shape.width);
        fetch<D>(values, v.at(tile.start + first, shared_head, shape.width), v.stride, tile.length - first,
                 shape.width);
        if (shape.dropping) draw(masks, shape, head, tile.id, tile.first, first);
        __syncthreads();
        for (int step = 0; step < TILE; step += STEP) {
            Square<T> s[STEP / SQUARE], dp[STEP / SQUARE];
            clear(s);
            clear(dp);
            multiply<D / SQUARE, true>(s, queries + warp * SQUARE * ROW<D>, ROW<D>, keys + step * ROW<D>, ROW<D>);
            multiply<D / SQUARE, true>(dp, gradients + warp * SQUARE * ROW<D>, ROW<D>, values + step * ROW<D>, ROW<D>);
            __syncwarp();
#pragma unroll
            for (int n = 0; n < STEP / SQUARE; n++)
#pragma unroll
                for (int i = 0; i < PACK; i++) {
                    int row = warp * SQUARE + places.row(i), column = n * SQUARE + places.column(i),
                        key = step + column;
                    bool seen = shape.seen(tile.first + row, first + key) && row < rows;
                    float p = seen ? expf(s[n][i] * shape.scale - of_rows[0][row]) : 0.0f, slope = dp[n][i];
                    if (shape.dropping) slope *= kept(masks, shape, row, key);
                    slopes[places.row(i) * SLOPES + column] =
                        from_float<T>(p * (slope - of_rows[1][row]) * shape.scale);
                }
            __syncwarp();
            multiply<STEP / SQUARE, false>(result, slopes, SLOPES, keys + step * ROW<D>, ROW<D>);
        }
    }
    rows -= warp * SQUARE;
    write(result, reinterpret_cast<float *>(slopes), dq.at(begin + warp * SQUARE, head, shape.width), dq.stride, rows,
          shape.width);
}

// The gradients of keys and values. A block has a tile of them, of one head, and goes over all queries that look at it.
template <int D, class T>
__device__ void attention_keys(Matrix<T> dk, Matrix<T> dv, Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                               const T *dout, const float *normalisers, const float *products, const unsigned *tiles,
                               const Shape &shape) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ unsigned masks[TILE][2];
    __shared__ float of_rows[2][TILE];
    int warp = threadIdx.x / WARP, stride = shape.queries * shape.width;
    T *keys = reinterpret_cast<T *>(memory), *values = keys + TILE * ROW<D>;
    T *queries = values + TILE * ROW<D>, *gradients = queries + TILE * ROW<D>;
    T *probabilities = gradients + TILE * ROW<D> + warp * 2 * SQUARE * SLOPES,
      *slopes = probabilities + SQUARE * SLOPES;

    // The other way round than queries: the first keys of a sequence have the most queries.
    Tile tile(tiles, gridDim.x - 1 - blockIdx.x);
    Places<T> places;
    int shared_head = blockIdx.y, group = shape.queries / shape.keys;
    long long begin = tile.start + tile.first;
    int rows = tile.length - tile.first;
    fetch<D>(keys, k.at(begin, shared_head, shape.width), k.stride, rows, shape.width);
    fetch<D>(values, v.at(begin, shared_head, shape.width), v.stride, rows, shape.width);

    Square<T> by_keys[D / SQUARE], by_values[D / SQUARE];
    clear(by_keys);
    clear(by_values);
    int end = min(tile.length, tile.first + TILE - 1 + shape.window);
    for (int head = shared_head * group; head < (shared_head + 1) * group; head++) {
        for (int first = tile.first; first < end; first += TILE) {
            long long from = tile.start + first;
            int there = tile.length - first;
            __syncthreads();
            fetch<D>(queries, q.at(from, head, shape.width), q.stride, there, shape.width);
            fetch<D>(gradients, dout + from * stride + head * shape.width, stride, there, shape.width);
            fetch_rows(of_rows, normalisers, products, static_cast<long long>(head) * shape.rows + from, there);
            if (shape.dropping) draw(masks, shape, head, tile.id, first, tile.first);
            __syncthreads();
            for (int step = 0; step < TILE; step += STEP) {
                // Keys by queries: everything is transposed.
                Square<T> s[STEP / SQUARE], dp[STEP / SQUARE];
                clear(s);
                clear(dp);
                multiply<D / SQUARE, true>(s, keys + warp * SQUARE * ROW<D>, ROW<D>, queries + step * ROW<D>, ROW<D>);
                multiply<D / SQUARE, true>(dp, values + warp * SQUARE * ROW<D>, ROW<D>, gradients + step * ROW<D>,
                                           ROW<D>);
                __syncwarp();
#pragma unroll
                for (int n = 0; n < STEP / SQUARE; n++)
#pragma unroll
                    for (int i = 0; i < PACK; i++) {
                        int row = places.row(i), column = n * SQUARE + places.column(i);
                        int key = warp * SQUARE + row, query = step + column;
                        bool seen = shape.seen(first + query, tile.first + key) && query < there;
                        float p = seen ? expf(s[n][i] * shape.scale - of_rows[0][query]) : 0.0f, slope = dp[n][i];
                        float factor = shape.dropping ? kept(masks, shape, query, key) : 1.0f;
                        probabilities[row * SLOPES + column] = from_float<T>(p * factor);
                        slopes[row * SLOPES + column] =
                            from_float<T>(p * (slope * factor - of_rows[1][query]) * shape.scale);
                    }
                __syncwarp();
                multiply<STEP / SQUARE, false>(by_values, probabilities, SLOPES, gradients + step * ROW<D>, ROW<D>);
                multiply<STEP / SQUARE, false>(by_keys, slopes, SLOPES, queries + step * ROW<D>, ROW<D>);
            }
        }
    }
    rows -= warp * SQUARE;
    float *stage = reinterpret_cast<float *>(probabilities);
    write(by_keys, stage, dk.at(begin + warp * SQUARE, shared_head, shape.width), dk.stride, rows, shape.width);
    write(by_values, stage, dv.at(begin + warp * SQUARE, shared_head, shape.width), dv.stride, rows, shape.width);
}

// A kernel for each type and width of heads.
#define SHAPE                                                                                                          \
    int rows, int queries, int keys, int width, float scale, int window, unsigned long long seed, unsigned update,     \
        unsigned purpose, unsigned threshold, float kept, int dropping
#define SHAPED {rows, queries, keys, width, scale, window, {seed, update, purpose, threshold, kept}, dropping != 0}
#define QKV(T) const T *q, int q_stride, const T *k, int k_stride, const T *v, int v_stride
#define OF_QKV                                                                                                         \
    {q, q_stride}, {k, k_stride}, { v, v_stride }
#define KERNELS(T, NAME, D)                                                                                            \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        attention_##D##_##NAME(T *out, float *normalisers, QKV(T), const unsigned *tiles, SHAPE) {                     \
        attention<D, T>(out, normalisers, OF_QKV, tiles, SHAPED);                                                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        attention_queries_##D##_##NAME(T *dq, int dq_stride, QKV(T), const T *dout, const float *normalisers,          \
                                       const float *products, const unsigned *tiles, SHAPE) {                          \
        attention_queries<D, T>({dq, dq_stride}, OF_QKV, dout, normalisers, products, tiles, SHAPED);                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        attention_keys_##D##_##NAME(T *dk, int dk_stride, T *dv, int dv_stride, QKV(T), const T *dout,                 \
                                    const float *normalisers, const float *products, const unsigned *tiles, SHAPE) {   \
        attention_keys<D, T>({dk, dk_stride}, {dv, dv_stride}, OF_QKV, dout, normalisers, products, tiles, SHAPED);    \
    }
KERNELS(float, f32, 32)
KERNELS(float, f32, 64)
KERNELS(float, f32, 96)
KERNELS(float, f32, 128)
KERNELS(bf16, bf16, 32)
KERNELS(bf16, bf16, 64)
KERNELS(bf16, bf16, 96)
KERNELS(bf16, bf16, 128)

extern "C" __global__ void attention_products_f32(float *products, const float *out, const float *dout, int rows,
                                                  int heads, int width) {
    attention_products(products, out, dout, rows, heads, width);
}
extern "C" __global__ void attention_products_bf16(float *products, const bf16 *out, const bf16 *dout, int rows,
                                                   int heads, int width) {
    attention_products(products, out, dout, rows, heads, width);
}
