// Products of small matrices by a whole warp, as in <mma.h>. Which lane holds which element is nobody's business on a
// GPU either: here lane l holds elements l, l + 32, l + 64, ... of the row-major matrix.
#pragma once
#include "../kernel.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
    static constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;
    static constexpr int num_elements = rows * columns / 32;
    using element_type = T;
    T x[num_elements];
};

template <class F, class V> void fill_fragment(F &fragment, V value) {
    for (auto &x : fragment.x) x = static_cast<typename F::element_type>(value);
}

namespace software_detail {
template <class F, class P, class MOVE> void each(F &fragment, P *memory, unsigned stride, bool by_rows, MOVE move) {
    if (reinterpret_cast<uintptr_t>(memory) % 32)
        software::misuse("a fragment's memory is not at a multiple of 32 bytes");
    if (stride * sizeof(P) % 16)
        software::misuse("the stride of a fragment is %zu bytes, no multiple of 16", stride * sizeof(P));
    __syncwarp();
    for (int i = 0; i < F::num_elements; i++) {
        unsigned element = i * 32 + software::lane(), row = element / F::columns, column = element % F::columns;
        move(fragment.x[i], memory[by_rows ? row * stride + column : column * stride + row]);
    }
}
} // namespace software_detail

template <class Use, int M, int N, int K, class T, class Layout, class P>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout> &fragment, const P *memory, unsigned stride) {
    software_detail::each(fragment, memory, stride, std::is_same_v<Layout, row_major>, [](T &x, const P &m) { x = m; });
}
template <int M, int N, int K, class T>
void load_matrix_sync(fragment<accumulator, M, N, K, T> &fragment, const T *memory, unsigned stride, layout_t layout) {
    software_detail::each(fragment, memory, stride, layout == mem_row_major, [](T &x, const T &m) { x = m; });
}
template <int M, int N, int K, class T>
void store_matrix_sync(T *memory, fragment<accumulator, M, N, K, T> fragment, unsigned stride, layout_t layout) {
    software_detail::each(fragment, memory, stride, layout == mem_row_major, [](const T &x, T &m) { m = x; });
}

template <class D, class A, class B, class C> void mma_sync(D &d, const A &a, const B &b, const C &c) {
    struct Own {
        D *d;
        const A *a;
        const B *b;
        const C *c;
        static void finish(void **brought, unsigned) {
            auto lane = [&](int l) { return static_cast<Own *>(brought[l]); };
            constexpr int M = A::rows, K = A::columns, N = B::columns;
            float left[M][K], right[K][N], sum[M][N];
            for (int e = 0; e < M * K; e++) left[e / K][e % K] = lane(e % 32)->a->x[e / 32];
            for (int e = 0; e < K * N; e++) right[e / N][e % N] = lane(e % 32)->b->x[e / 32];
            for (int e = 0; e < M * N; e++) sum[e / N][e % N] = lane(e % 32)->c->x[e / 32];
            for (int m = 0; m < M; m++)
                for (int k = 0; k < K; k++)
                    for (int n = 0; n < N; n++) sum[m][n] += left[m][k] * right[k][n];
            for (int e = 0; e < M * N; e++) lane(e % 32)->d->x[e / 32] = sum[e / N][e % N];
        }
    } own{&d, &a, &b, &c};
    software::meet_warp(~0u, &own, Own::finish);
}

} // namespace nvcuda::wmma
