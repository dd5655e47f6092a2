// Rotary positions (Su et al., "RoFormer", 2021): channels i and i + r / 2 of a head turn together,
// of r channels that are turned.

#include "common.cuh"

// Turns the first `heads` heads of each row of `x`, in place; a thread has a pair of channels. `angles` hold cosine and
// sine of each position and pair, `[P, 2, r / 2]`.
template <class T>
__device__ void rope(T *x, const unsigned *positions, const float *angles, int heads, int width, int turned,
                     int stride, float sign, long long count) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    int half = turned / 2;
    int pair = i % half, head = i / half % heads;
    long long row = i / half / heads;
    const float *cosines = angles + static_cast<long long>(positions[row]) * turned;
    float c = cosines[pair], s = sign * cosines[half + pair];
    T *at = x + row * stride + head * width + pair;
    float a = to_float(at[0]), b = to_float(at[half]);
    at[0] = from_float<T>(a * c - b * s);
    at[half] = from_float<T>(b * c + a * s);
}
extern "C" __global__ void rotate_f32(float *x, const unsigned *positions, const float *angles, int heads, int width,
                                      int turned, int stride, float sign, long long count) {
    rope(x, positions, angles, heads, width, turned, stride, sign, count);
}
extern "C" __global__ void rotate_bf16(bf16 *x, const unsigned *positions, const float *angles, int heads, int width,
                                       int turned, int stride, float sign, long long count) {
    rope(x, positions, angles, heads, width, turned, stride, sign, count);
}
