// Constant vectors.

extern "C" __global__ void fill_f32(float *out, size_t count, float value) {
    size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) out[i] = value;
}
