// Choosing the next token of every row, with the semantics of `sample.rs`.
//
// Weights of tokens are whole numbers, steps of 2^-40 of the largest one: their sums are exact in any order, so that
// atomic additions are deterministic, and a draw always falls on a token.

#include "common.cuh"

#include <float.h>

using Weight = unsigned long long;

constexpr float UNIT = 1099511627776.0f; // 2^40
// Bins of a digit when keys are narrowed down, and tokens whose weights are summed together. Both stand in `sample.rs`
// too.
constexpr int BINS = 2048;
constexpr int BLOCK = 512;
constexpr int CHUNK = 128; // bins of a warp

// First of `count` places up to which the amounts exceed `target`, and their sum before it; `count` where there is
// none. By a warp.
template <class Amount> __device__ int place(int count, Weight target, Weight &before, Amount amount) {
    int lane = threadIdx.x % WARP;
    before = 0;
    for (int start = 0; start < count; start += WARP) {
        Weight own = start + lane < count ? amount(start + lane) : 0, sum = own;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            Weight other = __shfl_up_sync(ALL_LANES, sum, step);
            if (lane >= step) sum += other;
        }
        unsigned over = __ballot_sync(ALL_LANES, before + sum > target);
        if (over) {
            int first = __ffs(over) - 1;
            before += __shfl_sync(ALL_LANES, sum - own, first);
            return start + first;
        }
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    return count;
}

// A number that orders logits as their values do.
__device__ __forceinline__ unsigned key_of(float logit) {
    // Adding 0 makes the negative zero equal to the positive one.
    unsigned bits = __float_as_uint(logit + 0.0f);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float logit_of(unsigned key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Logits of a row as they are drawn from: with the repetition penalty, and without tokens that n-grams forbid.
struct Logits {
    const float *own;
    int vocabulary;
    float penalty;
    unsigned *seen, *forbidden; // a bit a token
    __device__ __forceinline__ float operator[](int token) const {
        float logit = own[token];
        if (penalty != 1.0f && seen[token / 32] >> token % 32 & 1)
            logit = logit < 0.0f ? logit * penalty : logit / penalty;
        return forbidden[token / 32] >> token % 32 & 1 ? -INFINITY : logit;
    }
};

// The bits of a word of tokens that are padding: those from `tokens` on.
__device__ __forceinline__ unsigned padding(int word, int tokens) {
    int left = tokens - word * 32;
    return left >= 32 ? 0u : left <= 0 ? ~0u : ~0u << left;
}

// The tokens that filters have left so far, and their weights.
struct Kept {
    Logits logits;
    float largest, scale;
    unsigned least; // key of the worst one
    int limit;      // of tokens with that key, those below this
    float share;    // of the best one's probability, which the others have at least
    __device__ __forceinline__ Weight weight(float logit) const {
        float own = expf((logit - largest) * scale);
        return own > 0.0f && own >= share ? static_cast<Weight>(own * UNIT) : 0;
    }
    __device__ __forceinline__ bool holds(unsigned key, int token) const {
        return key > least || (key == least && token < limit);
    }
    __device__ __forceinline__ Weight operator[](int token) const {
        float logit = logits[token];
        return holds(key_of(logit), token) ? weight(logit) : 0;
    }
};

// The greatest key such that the amounts of kept tokens with it and above exceed `target`, and the sum of those above.
// By the block.
template <class Amount>
__device__ unsigned narrow(const Kept &kept, Weight *bins, Weight target, Weight &above, Amount amount) {
    __shared__ Weight of_warps[BINS / CHUNK];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned prefix = 0, known = 0;
    above = 0;
    for (int digit = 0; digit < 3; digit++) {
        int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0;
        int size = digit == 2 ? BINS / 2 : BINS;
        __syncthreads();
        for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) bins[bin] = 0;
        __syncthreads();
        for (int token = threadIdx.x; token < kept.logits.vocabulary; token += blockDim.x) {
            float logit = kept.logits[token];
            unsigned key = key_of(logit);
            if (!kept.holds(key, token) || (key ^ prefix) & known) continue;
            Weight more = amount(logit);
            // From the top: bin 0 has the greatest keys.
            if (more) atomicAdd(&bins[size - 1 - (key >> shift & (size - 1))], more);
        }
        __syncthreads();
        for (int chunk = warp; chunk < BINS / CHUNK; chunk += blockDim.x / WARP) {
            Weight sum = 0;
            for (int i = lane; i < CHUNK; i += WARP) sum += bins[chunk * CHUNK + i];
            sum = over_warp<Sum>(sum);
            if (lane == 0) of_warps[chunk] = sum;
        }
        __syncthreads();
        // Every warp finds the same.
        Weight before;
        int chunk = place(BINS / CHUNK, target - above, before, [&](int i) { return of_warps[i]; });
        above += before;
        int bin = place(CHUNK, target - above, before, [&](int i) { return bins[chunk * CHUNK + i]; });
        above += before;
        prefix |= static_cast<unsigned>(size - 1 - (chunk * CHUNK + bin)) << shift;
        known |= static_cast<unsigned>(size - 1) << shift;
    }
    return prefix;
}

// Weights of kept tokens, summed over BLOCK at a time and over all. By the block.
__device__ Weight weigh(const Kept &kept, Weight *blocks) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int vocabulary = kept.logits.vocabulary;
    Weight total = 0;
    __syncthreads();
    for (int block = warp; block * BLOCK < vocabulary; block += warps) {
        Weight sum = 0;
        for (int token = block * BLOCK + lane; token < min(vocabulary, (block + 1) * BLOCK); token += WARP)
            sum += kept[token];
        sum = over_warp<Sum>(sum);
        if (lane == 0) blocks[block] = sum, total += sum;
    }
    return over_block<Sum>(total);
}

// A block has a row of logits, `[rows, vocabulary]`.
extern "C" __global__ void __launch_bounds__(512)
    sample(const float *all_logits, int vocabulary, int tokens, const unsigned *ids, const unsigned *prompts,
           const unsigned *limits, unsigned *counts, unsigned *positions, int *next, unsigned *finished,
           unsigned *histories, int room, float *log_probs, int most, float temperature, int top_k, float top_p, float min_p,
           float penalty, int ngram, unsigned long long seed, unsigned time, unsigned purpose, const unsigned *ends,
           int end_count) {
    extern __shared__ __align__(16) unsigned char memory[];
    int row = blockIdx.x, words = (vocabulary + 31) / 32, blocks = (vocabulary + BLOCK - 1) / BLOCK;
    if (finished[row]) return;
    Weight *bins = reinterpret_cast<Weight *>(memory), *weights = bins + BINS;
    unsigned *seen = reinterpret_cast<unsigned *>(weights + blocks), *forbidden = seen + words;
    unsigned *history = histories + static_cast<long long>(row) * room;
    int count = counts[row];
    Logits logits = {all_logits + static_cast<long long>(row) * vocabulary, vocabulary, penalty, seen, forbidden};

    for (int word = threadIdx.x; word < words; word += blockDim.x) seen[word] = 0, forbidden[word] = padding(word, tokens);
    __syncthreads();
    if (penalty != 1.0f)
        for (int i = threadIdx.x; i < count; i += blockDim.x) atomicOr(&seen[history[i] / 32], 1u << history[i] % 32);
    if (ngram > 0) {
        // Where the last n - 1 tokens stood before, what followed them.
        for (int i = threadIdx.x; i + ngram <= count; i += blockDim.x) {
            bool same = true;
            for (int j = 0; j < ngram - 1 && same; j++) same = history[i + j] == history[count + 1 - ngram + j];
            unsigned token = history[i + ngram - 1];
            if (same) atomicOr(&forbidden[token / 32], 1u << token % 32);
        }
    }
    __syncthreads();

    // The model's own distribution, and the best token: above its key, below what is greater for lower ids.
    float largest = -FLT_MAX, sum = 0.0f;
    unsigned long long best = 0;
    for (int token = threadIdx.x; token < vocabulary; token += blockDim.x) {
        float own = logits.own[token];
        if (own > largest) {
            sum *= expf(largest - own);
            largest = own;
        }
        sum += expf(own - largest);
        best =
            Max::of(best, static_cast<unsigned long long>(key_of(logits[token])) << 32 | ~static_cast<unsigned>(token));
    }
    float own_largest = over_block<Max>(largest);
    double own_sum = over_block<Sum>(static_cast<double>(sum * expf(largest - own_largest)));
    best = over_block<Max>(best);
    if (logit_of(best >> 32) == -INFINITY) {
        // Every token is forbidden: then none is but padding.
        for (int word = threadIdx.x; word < words; word += blockDim.x) forbidden[word] = padding(word, tokens);
        __syncthreads();
        best = 0;
        for (int token = threadIdx.x; token < vocabulary; token += blockDim.x)
            best = Max::of(best, static_cast<unsigned long long>(key_of(logits[token])) << 32 |
                                     ~static_cast<unsigned>(token));
        best = over_block<Max>(best);
    }

    int token = static_cast<int>(~static_cast<unsigned>(best));
    int written = count - prompts[row];
    if (temperature > 0.0f) {
        Kept kept = {logits, logit_of(best >> 32), fminf(1.0f / temperature, FLT_MAX), 0, vocabulary, 0.0f};
        Weight above, before;
        if (top_k > 0 && top_k < vocabulary)
            kept.least = narrow(kept, bins, top_k - 1, above, [](float) -> Weight { return 1; });
        if (top_p < 1.0f) {
            Weight needed =
                static_cast<Weight>(ceil(static_cast<double>(top_p) * static_cast<double>(weigh(kept, weights))));
            if (needed > 0) {
                auto weight = [&](float logit) { return kept.weight(logit); };
                unsigned least = narrow(kept, bins, needed - 1, above, weight);
                kept.least = least;
                // Of the worst tokens as many as are needed, those with lower ids.
                Weight each = kept.weight(logit_of(least)), wanted = (needed - above + each - 1) / each, worst = 0;
                auto is_worst = [&](int token) -> Weight { return key_of(kept.logits[token]) == least; };
                for (int token = threadIdx.x; token < vocabulary; token += blockDim.x) worst += is_worst(token);
                if (over_block<Sum>(worst) > wanted) kept.limit = place(vocabulary, wanted - 1, before, is_worst) + 1;
            }
        }
        kept.share = min_p;
        Weight total = weigh(kept, weights);
        if (total > 0) {
            Words words = philox(seed, written, ids[row], time, purpose);
            double draw = (words.word[0] >> 8) * (1.0 / 16777216.0);
            Weight target = static_cast<Weight>(draw * static_cast<double>(total));
            int block = place(blocks, target, before, [&](int i) { return weights[i]; });
            int start = block * BLOCK;
            token = start + place(min(BLOCK, vocabulary - start), target - before, before,
                                  [&](int i) { return kept[start + i]; });
        }
    }
    if (threadIdx.x > 0) return;
    if (written < most)
        log_probs[static_cast<long long>(row) * most + written] =
            logits.own[token] - own_largest - static_cast<float>(log(own_sum));
    if (count < room) history[count] = token;
    counts[row] = count + 1;
    positions[row] += 1;
    next[row] = token;
    bool ended = written + 1 >= static_cast<int>(limits[row]);
    for (int i = 0; i < end_count; i++) ended |= ends[i] == static_cast<unsigned>(token);
    finished[row] = ended;
}
