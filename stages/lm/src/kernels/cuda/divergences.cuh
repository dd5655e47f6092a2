// The rules of `terms/divergence.rs`, printed from there by a test of that file.

// A summand f of a divergence, and h = s df/ds up to a multiple of s.
struct Summand {
    float value, slope;
};

template <class T> struct Rules {
    struct ForwardKl {
        static __device__ __forceinline__ Summand of(float s, float log_s, float t, float log_t, float a, float b) {
            float x0 = log_t - log_s;
            float x1 = t * x0;
            float x2 = -t;
            return {x1, x2};
        }
    };
    struct ReverseKl {
        static __device__ __forceinline__ Summand of(float s, float log_s, float t, float log_t, float a, float b) {
            float x0 = log_s - log_t;
            float x1 = s * x0;
            return {x1, x1};
        }
    };
    struct Jsd {
        static __device__ __forceinline__ Summand of(float s, float log_s, float t, float log_t, float a, float b) {
            float x0 = a * t;
            float x1 = 1.0f - a;
            float x2 = x1 * s;
            float x3 = x0 + x2;
            float x4 = above_zero(x3);
            float x5 = 1.0f - a;
            float x6 = x5 * s;
            float x7 = logarithm<T>(above_zero(s / x4));
            float x8 = x6 * x7;
            float x9 = a * t;
            float x10 = logarithm<T>(above_zero(t / x4));
            float x11 = x9 * x10;
            float x12 = x11 + x8;
            return {x12, x8};
        }
    };
    struct SkewedForwardKl {
        static __device__ __forceinline__ Summand of(float s, float log_s, float t, float log_t, float a, float b) {
            float x0 = a * t;
            float x1 = 1.0f - a;
            float x2 = x1 * s;
            float x3 = x0 + x2;
            float x4 = above_zero(x3);
            float x5 = logarithm<T>(above_zero(t / x4));
            float x6 = t * x5;
            float x7 = 1.0f - a;
            float x8 = -x7;
            float x9 = x8 * t;
            float x10 = s / x4;
            float x11 = x9 * x10;
            return {x6, x11};
        }
    };
    struct SkewedReverseKl {
        static __device__ __forceinline__ Summand of(float s, float log_s, float t, float log_t, float a, float b) {
            float x0 = a * s;
            float x1 = 1.0f - a;
            float x2 = x1 * t;
            float x3 = x0 + x2;
            float x4 = above_zero(x3);
            float x5 = logarithm<T>(above_zero(s / x4));
            float x6 = s * x5;
            float x7 = a * s;
            float x8 = s / x4;
            float x9 = x7 * x8;
            float x10 = x6 - x9;
            return {x6, x10};
        }
    };
    struct TotalVariation {
        static __device__ __forceinline__ Summand of(float s, float log_s, float t, float log_t, float a, float b) {
            float x0 = s - t;
            float x1 = fabsf(x0);
            float x2 = 0.5f * x1;
            float x3 = sign(x0);
            float x4 = 0.5f * x3;
            float x5 = x4 * s;
            return {x2, x5};
        }
    };
    struct AlphaBeta {
        static __device__ __forceinline__ Summand of(float s, float log_s, float t, float log_t, float a, float b) {
            float x0 = a + b;
            float x1 = a * log_t;
            float x2 = b * log_s;
            float x3 = x1 + x2;
            float x4 = exponential<T>(x3);
            float x5 = x0 * log_t;
            float x6 = exponential<T>(x5);
            float x7 = x0 * log_s;
            float x8 = exponential<T>(x7);
            float x9 = a / x0;
            float x10 = x9 * x6;
            float x11 = x4 - x10;
            float x12 = b / x0;
            float x13 = x12 * x8;
            float x14 = x11 - x13;
            float x15 = -x14;
            float x16 = a * b;
            float x17 = x15 / x16;
            float x18 = x8 - x4;
            float x19 = x18 / a;
            return {x17, x19};
        }
    };
    struct AdaptiveKl {
        static __device__ __forceinline__ Summand of(float s, float log_s, float t, float log_t, float a, float b) {
            float x0 = log_s - log_t;
            float x1 = 1.0f - a;
            float x2 = x1 * s;
            float x3 = x2 * x0;
            float x4 = a * t;
            float x5 = x4 * x0;
            float x6 = x3 - x5;
            float x7 = a * t;
            float x8 = x3 - x7;
            return {x6, x8};
        }
    };
};

#define FOR_EVERY_RULE(CASE) CASE(0, ForwardKl) CASE(1, ReverseKl) CASE(2, Jsd) CASE(3, SkewedForwardKl) CASE(4, SkewedReverseKl) CASE(5, TotalVariation) CASE(6, AlphaBeta) CASE(7, AdaptiveKl)
