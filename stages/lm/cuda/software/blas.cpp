// libcublas.so.13 without a GPU: matrix products, plainly. Sums are in the type that cuBLAS would use: f64 for f64,
// else f32.
#include "block.h"
#include "driver.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

using namespace software;

namespace {

enum Type { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 }; // cudaDataType

size_t width(int type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }

template <class S> S read(const void *memory, int type, int64_t i) {
    switch (type) {
    case F32: return static_cast<const float *>(memory)[i];
    case F64: return static_cast<const double *>(memory)[i];
    case F16: return __half2float(static_cast<const __half *>(memory)[i]);
    case BF16: return __bfloat162float(static_cast<const __nv_bfloat16 *>(memory)[i]);
    default: misuse("a matrix product of type %d", type);
    }
}
template <class S> void write(void *memory, int type, int64_t i, S value) {
    switch (type) {
    case F32: static_cast<float *>(memory)[i] = value; break;
    case F64: static_cast<double *>(memory)[i] = value; break;
    case F16: static_cast<__half *>(memory)[i] = __float2half(value); break;
    case BF16: static_cast<__nv_bfloat16 *>(memory)[i] = __float2bfloat16(value); break;
    default: misuse("a matrix product of type %d", type);
    }
}

struct Matrix { // columns after one another, `leading` elements apart
    void *memory;
    int type, leading;
    Matrix at(int64_t element) const {
        return {static_cast<char *>(memory) + element * int64_t(width(type)), type, leading};
    }
};

// op(matrix), rows by columns, as columns without gaps.
template <class S> std::vector<S> packed(Matrix matrix, bool transposed, int rows, int columns) {
    std::vector<S> out(size_t(rows) * columns);
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = 0; r < rows; r++)
            out[c * rows + r] =
                read<S>(matrix.memory, matrix.type, transposed ? r * matrix.leading + c : c * matrix.leading + r);
    return out;
}

// C = alpha op(A) op(B) + beta C, with C of m rows and n columns.
template <class S> void product(bool ta, bool tb, int m, int n, int k, S alpha, Matrix a, Matrix b, S beta, Matrix c) {
    auto left = packed<S>(a, ta, m, k), right = packed<S>(b, tb, k, n);
    auto columns = [&](int begin, int end) {
        std::vector<S> sum(m);
        for (int64_t j = begin; j < end; j++) {
            std::fill(sum.begin(), sum.end(), 0);
            for (int64_t p = 0; p < k; p++) {
                S factor = right[j * k + p];
                for (int64_t i = 0; i < m; i++) sum[i] += left[p * m + i] * factor;
            }
            for (int64_t i = 0; i < m; i++) {
                int64_t at = j * c.leading + i;
                write<S>(c.memory, c.type, at, alpha * sum[i] + (beta == 0 ? 0 : beta * read<S>(c.memory, c.type, at)));
            }
        }
    };
    int middle = double(m) * n * k > 1e7 ? n / 2 : 0;
    std::thread other([&] { columns(0, middle); });
    columns(middle, n);
    other.join();
}

struct Handle {
    CUstream stream = nullptr;
    bool device_scalars = false;
};

int gemm(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, Matrix a, int64_t sa, Matrix b,
         int64_t sb, const void *beta, Matrix c, int64_t sc, int batch, bool doubles) {
    if (m < 0 || n < 0 || k < 0 || a.leading < std::max(1, ta ? k : m) || b.leading < std::max(1, tb ? n : k) ||
        c.leading < std::max(1, m)) {
        fprintf(stderr, "software GPU: refused: a matrix product %d x %d x %d with leading dimensions %d, %d, %d\n", m,
                n, k, a.leading, b.leading, c.leading);
        return 7; // CUBLAS_STATUS_INVALID_VALUE
    }
    if (!m || !n || !batch) return 0;
    auto extent = [&](Matrix x, int64_t stride, int64_t rows, int64_t columns, const char *what) {
        if (!rows || !columns) return;
        check(x.memory, (stride * (batch - 1) + (columns - 1) * x.leading + rows) * width(x.type), what);
    };
    extent(a, sa, ta ? k : m, ta ? m : k, "the left matrix of a product");
    extent(b, sb, tb ? n : k, tb ? k : n, "the right matrix of a product");
    extent(c, sc, m, n, "the result of a matrix product");
    auto &own = *static_cast<Handle *>(handle);
    auto scalar = [=](const void *p) {
        return doubles ? *static_cast<const double *>(p) : *static_cast<const float *>(p);
    };
    // Scalars on the host are read now, those on the device when the work is done.
    double host_alpha = own.device_scalars ? 0 : scalar(alpha), host_beta = own.device_scalars ? 0 : scalar(beta);
    bool device_scalars = own.device_scalars;
    submit(own.stream, [=] {
        double x = device_scalars ? scalar(alpha) : host_alpha, y = device_scalars ? scalar(beta) : host_beta;
        for (int64_t i = 0; i < batch; i++) {
            if (doubles)
                product<double>(ta, tb, m, n, k, x, a.at(i * sa), b.at(i * sb), y, c.at(i * sc));
            else
                product<float>(ta, tb, m, n, k, x, a.at(i * sa), b.at(i * sb), y, c.at(i * sc));
        }
    });
    return 0;
}

Matrix matrix(const void *memory, int type, int leading) { return {const_cast<void *>(memory), type, leading}; }

} // namespace

extern "C" {

int cublasCreate_v2(void **out) { return *out = new Handle, 0; }
int cublasGetProperty(int, int *value) { return *value = 13, 0; }
int cublasDestroy_v2(void *handle) { return delete static_cast<Handle *>(handle), 0; }
int cublasSetStream_v2(void *handle, CUstream stream) { return static_cast<Handle *>(handle)->stream = stream, 0; }
int cublasGetStream_v2(void *handle, CUstream *stream) { return *stream = static_cast<Handle *>(handle)->stream, 0; }
int cublasSetWorkspace_v2(void *, void *, size_t) { return 0; }
int cublasSetMathMode(void *, int) { return 0; }
int cublasSetPointerMode_v2(void *handle, int mode) { return static_cast<Handle *>(handle)->device_scalars = mode, 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) {
    return *mode = static_cast<Handle *>(handle)->device_scalars, 0;
}
const char *cublasGetStatusName(int) { return "an error of the software GPU"; }
const char *cublasGetStatusString(int) { return "an error of the software GPU"; }

int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                               int atype, int lda, long long sa, const void *b, int btype, int ldb, long long sb,
                               const void *beta, void *c, int ctype, int ldc, long long sc, int batch, int, int) {
    return gemm(handle, ta, tb, m, n, k, alpha, matrix(a, atype, lda), sa, matrix(b, btype, ldb), sb, beta,
                matrix(c, ctype, ldc), sc, batch, ctype == F64);
}
int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int atype,
                 int lda, const void *b, int btype, int ldb, const void *beta, void *c, int ctype, int ldc, int, int) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, atype, lda, 0, b, btype, ldb, 0, beta, c,
                                      ctype, ldc, 0, 1, 0, 0);
}
int cublasSgemm_v2(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int lda,
                   const float *b, int ldb, const float *beta, float *c, int ldc) {
    return cublasGemmEx(handle, ta, tb, m, n, k, alpha, a, F32, lda, b, F32, ldb, beta, c, F32, ldc, 0, 0);
}
int cublasSgemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, const float *a,
                              int lda, long long sa, const float *b, int ldb, long long sb, const float *beta, float *c,
                              int ldc, long long sc, int batch) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, F32, lda, sa, b, F32, ldb, sb, beta, c, F32,
                                      ldc, sc, batch, 0, 0);
}
int cublasDgemm_v2(void *handle, int ta, int tb, int m, int n, int k, const double *alpha, const double *a, int lda,
                   const double *b, int ldb, const double *beta, double *c, int ldc) {
    return cublasGemmEx(handle, ta, tb, m, n, k, alpha, a, F64, lda, b, F64, ldb, beta, c, F64, ldc, 0, 0);
}
int cublasDgemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k, const double *alpha, const double *a,
                              int lda, long long sa, const double *b, int ldb, long long sb, const double *beta,
                              double *c, int ldc, long long sc, int batch) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, F64, lda, sa, b, F64, ldb, sb, beta, c, F64,
                                      ldc, sc, batch, 0, 0);
}

} // extern "C"
