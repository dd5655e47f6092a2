// Cross-entropy and divergences of rows of logits, and their slopes.

#include "common.cuh"

#include <float.h>

// Least log-probability, as on the CPU.
constexpr float LOG_FLOOR = -1e4f;

// With numbers of 8 bits the fast functions lose nothing that is kept.
template <class T> struct Fast {
    static constexpr bool IS = sizeof(T) == 2;
};
template <class T> __device__ __forceinline__ float exponential(float x) { return Fast<T>::IS ? __expf(x) : expf(x); }
template <class T> __device__ __forceinline__ float logarithm(float x) { return Fast<T>::IS ? __logf(x) : logf(x); }

// Logits `first ..` of a row; negative infinity behind its end.
template <class T>
__device__ __forceinline__ void load_logits(float (&to)[PACK], const T *row, int first, int vocabulary) {
    load(to, row, first, vocabulary);
    if (first + PACK > vocabulary)
        for (int i = 0; i < PACK; i++)
            if (first + i >= vocabulary) to[i] = -INFINITY;
}

// What turns logits into log-probabilities.
struct Normaliser {
    float max, scale, log_sum;
    __device__ __forceinline__ float log_probability(float logit) const {
        float log = (logit - max) * scale - log_sum;
        return log < LOG_FLOOR ? LOG_FLOOR : log;
    }
};

// Of softmax(row) and of softmax(row * scale), in one pass of the whole block.
template <class T>
__device__ void normalise(const T *row, int vocabulary, float scale, Normaliser &plain, Normaliser &scaled) {
    // The maximum that this thread has seen, and its sums of exponentials relative to that.
    float largest = -FLT_MAX, sum = 0.0f, scaled_sum = 0.0f;
    for (int first = threadIdx.x * PACK; first < vocabulary; first += blockDim.x * PACK) {
        float x[PACK];
        load_logits(x, row, first, vocabulary);
        float larger = largest;
        for (int i = 0; i < PACK; i++) larger = x[i] > larger ? x[i] : larger;
        if (larger > largest) {
            sum *= exponential<T>(largest - larger);
            scaled_sum *= exponential<T>((largest - larger) * scale);
            largest = larger;
        }
        for (int i = 0; i < PACK; i++) sum += exponential<T>(x[i] - largest);
        if (scale != 1.0f)
            for (int i = 0; i < PACK; i++) scaled_sum += exponential<T>((x[i] - largest) * scale);
    }
    float max = over_block<Max>(largest);
    double total = over_block<Sum>(static_cast<double>(sum * exponential<T>(largest - max)));
    plain = {max, 1.0f, static_cast<float>(log(total))};
    if (scale == 1.0f) {
        scaled = plain;
    } else {
        total = over_block<Sum>(static_cast<double>(scaled_sum * exponential<T>((largest - max) * scale)));
        scaled = {max, scale, static_cast<float>(log(total))};
    }
}

// What the rules of divergences are made of.
__device__ __forceinline__ float above_zero(float x) { return x < FLT_MIN ? FLT_MIN : x; }
__device__ __forceinline__ float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

#include "divergences.cuh"

// One row, by a block.
template <class T> struct Row {
    const T *logits;
    T *slopes; // null where nobody wants them; may be the logits
    bool accumulate;
    int vocabulary;
    // Cross-entropy, where there is a label.
    bool labelled;
    unsigned label;
    float label_factor;
    Normaliser plain;
    // The divergence, where there is a target.
    const T *target;
    float a, b, target_factor;
    Normaliser of_logits, of_target;

    template <class Rule> __device__ __forceinline__ Summand summand(float logit, float target_logit, float &s) const {
        float log_s = of_logits.log_probability(logit), log_t = of_target.log_probability(target_logit);
        s = exponential<T>(log_s);
        return Rule::of(s, log_s, exponential<T>(log_t), log_t, a, b);
    }

    // The divergence; writes the slopes of both terms.
    template <class Rule> __device__ double diverge() const {
        float value = 0.0f, slope = 0.0f;
        for (int first = threadIdx.x * PACK; first < vocabulary; first += blockDim.x * PACK) {
            float x[PACK], y[PACK], s;
            load_logits(x, logits, first, vocabulary);
            load_logits(y, target, first, vocabulary);
            for (int i = 0; i < PACK; i++) {
                if (first + i >= vocabulary) break;
                Summand summand = this->summand<Rule>(x[i], y[i], s);
                value += summand.value;
                slope += summand.slope;
            }
        }
        double total = over_block<Sum>(static_cast<double>(value));
        float slope_sum = static_cast<float>(over_block<Sum>(static_cast<double>(slope)));
        write([&](int first, const float(&x)[PACK], float(&to)[PACK]) {
            float y[PACK], s;
            load_logits(y, target, first, vocabulary);
            for (int i = 0; i < PACK; i++) {
                Summand summand = this->summand<Rule>(x[i], y[i], s);
                to[i] += target_factor * (summand.slope - s * slope_sum);
            }
        });
        return total;
    }

    // Writes the slopes of the cross-entropy and what `others` add to them.
    template <class Others> __device__ __forceinline__ void write(Others others) const {
        if (!slopes) return;
        for (int first = threadIdx.x * PACK; first < vocabulary; first += blockDim.x * PACK) {
            float x[PACK], to[PACK] = {};
            load_logits(x, logits, first, vocabulary);
            if (accumulate) load(to, slopes, first, vocabulary);
            if (labelled) {
                for (int i = 0; i < PACK; i++) {
                    to[i] += label_factor * exponential<T>(plain.log_probability(x[i]));
                    if (first + i == label) to[i] -= label_factor;
                }
            }
            others(first, x, to);
            store(slopes, first, vocabulary, to);
        }
    }

    __device__ double diverge(int kind) const {
        switch (kind) {
#define CASE(number, name)                                                                                             \
    case number: return diverge<typename Rules<T>::name>();
            FOR_EVERY_RULE(CASE)
#undef CASE
        }
        return 0.0;
    }
};

// A block has a row of logits `[R, vocabulary]`. Terms go to `terms[row, column ..]`, slopes to `slopes` where that is
// not null.
template <class T>
__device__ void head_terms(const T *logits, T *slopes, int accumulate, const unsigned *labels, double label_coefficient,
                           const T *target, int kind, float a, float b, double coefficient, double temperature,
                           const float *weights, double *terms, int columns, int column, int vocabulary) {
    long long start = static_cast<long long>(blockIdx.x) * vocabulary;
    double *to = terms + static_cast<long long>(blockIdx.x) * columns + column;
    double weight = weights[blockIdx.x];
    Row<T> row = {};
    row.logits = logits + start;
    row.slopes = slopes ? slopes + start : nullptr;
    row.accumulate = accumulate;
    row.vocabulary = vocabulary;
    if (weight == 0.0) {
        if (threadIdx.x == 0) {
            if (labels) *to++ = 0.0;
            if (target) *to = 0.0;
        }
        row.write([](int, const float(&)[PACK], float(&)[PACK]) {});
        return;
    }
    normalise(row.logits, vocabulary, static_cast<float>(1.0 / temperature), row.plain, row.of_logits);
    if (labels) {
        row.labelled = true;
        row.label = labels[blockIdx.x];
        row.label_factor = static_cast<float>(weight * label_coefficient);
        // Before slopes are written over the logits: that is behind the next barrier, or by this thread.
        if (threadIdx.x == 0) *to++ = -static_cast<double>(row.plain.log_probability(to_float(row.logits[row.label])));
        __syncthreads();
    }
    if (target) {
        row.target = target + start;
        row.a = a, row.b = b;
        row.target_factor = static_cast<float>(weight * coefficient / temperature);
        Normaliser unused;
        normalise(row.target, vocabulary, static_cast<float>(1.0 / temperature), unused, row.of_target);
        double divergence = row.diverge(kind);
        if (threadIdx.x == 0) *to = divergence;
    } else {
        row.write([](int, const float(&)[PACK], float(&)[PACK]) {});
    }
}
extern "C" __global__ void __launch_bounds__(512)
    head_terms_f32(const float *logits, float *slopes, int accumulate, const unsigned *labels, double label_coefficient,
                   const float *target, int kind, float a, float b, double coefficient, double temperature,
                   const float *weights, double *terms, int columns, int column, int vocabulary) {
    head_terms(logits, slopes, accumulate, labels, label_coefficient, target, kind, a, b, coefficient, temperature,
               weights, terms, columns, column, vocabulary);
}
extern "C" __global__ void __launch_bounds__(512)
    head_terms_bf16(const bf16 *logits, bf16 *slopes, int accumulate, const unsigned *labels, double label_coefficient,
                    const bf16 *target, int kind, float a, float b, double coefficient, double temperature,
                    const float *weights, double *terms, int columns, int column, int vocabulary) {
    head_terms(logits, slopes, accumulate, labels, label_coefficient, target, kind, a, b, coefficient, temperature,
               weights, terms, columns, column, vocabulary);
}
