// One token per row of logits: the greedy argmax, or temperature, top-k, top-p, min-p and a draw; one block a row.
//
// The rules are SamplingBatch's and targets/reference/sampler.py's: a filter is a threshold on a row's scaled values
// s = (logit - largest) / temperature. top-k keeps what is at least the k-th largest; top-p keeps a token when those
// strictly more likely hold less than p of the mass that top-k left; min-p keeps s >= log(min_p). The draw is the first
// token, in id order, at which the running sum of the kept mass exceeds u * total, u = philox(seed, position).
//
// Mass is counted in integers, exp(s) in units of 2^-40 of the largest: sums are then exact, the same in any order, and
// thresholds can be found by histograms in shared memory; what is below 1e-12 of the most likely token is never drawn.
//
// Shapes: logits T [rows, vocab] (rows `stride` elements apart); allowed u32 [rows, ceil(vocab / 32)] or null, bit set
// = may be sampled; temperature f32 [rows], 0 = greedy, the lowest id among the largest; top_k i32, top_p f32, min_p
// f32 [rows], each or null (0, 1, 0 = off); seeds u64, positions i64 [rows]; tokens i32 [rows]. A row whose every token
// is forbidden gets token 0. vocab <= 2^23. Grid: rows blocks of 1024 threads.
// feed_tokens: ids[i] = tokens[source[i]] where source[i] >= 0: a step takes the tokens that the one before it sampled
// without the host having seen them. ids i64, source i32 [rows]; tokens i32 [count]. Grid: ceil(rows / 256) of 256.
//
// Numbers, sm_90: 62 or 63 registers, one block of 1024 threads an SM. A vocabulary of 128256 in fp32 is 513 KB a row:
// a block alone draws about 60 GB/s: greedy 9 us at 1 to 132 rows, a draw 27 us, with top-p 70 us.
// Bound: greedy reads the row once; a draw reads it twice more, and five times more for each of top-k and top-p (from
// L2).
#include "device.cuh"
#include "philox.cuh"

namespace llmctl {
namespace sampling {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBins = 256;
constexpr int kBinsPerLane = kBins / kWarp;
constexpr float kUnit = 1099511627776.0f;  // 2^40

// A u32 that orders as the float does; -0 counts as 0.
LLMCTL_DEVICE u32 ordered(float v) {
    const u32 bits = float_to_bits(v + 0.0f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

LLMCTL_DEVICE float minus_infinity() { return bits_to_float(0xff800000u); }

// A row as the filters see it.
template <typename T>
struct RowValues {
    const T* logits;
    const u32* allowed;
    int vocab;
    float peak, temperature;

    LLMCTL_METHOD float logit(int i) const {
        if (allowed && !(allowed[i / 32] >> (i % 32) & 1u)) return minus_infinity();
        return to_float(logits[i]);
    }
    LLMCTL_METHOD float scaled(int i) const { return (logit(i) - peak) / temperature; }
};

LLMCTL_DEVICE u64 mass_of(float scaled) { return static_cast<u64>(expf(scaled) * kUnit + 0.5f); }

struct Shared {
    u64 histogram[kBins];
    u64 sums[kWarps];
    u64 before;  // mass or count of the bins before the chosen one
    int bin;
    int token;
};

// Largest value over the block, in every thread.
LLMCTL_DEVICE u64 block_max(u64 v, Shared& shared) {
    v = warp_max(v);
    if (lane_index() == 0) shared.sums[warp_index()] = v;
    block_sync();
    v = warp_max(shared.sums[lane_index()]);
    block_sync();
    return v;
}

LLMCTL_DEVICE void clear_histogram(Shared& shared) {
    if (thread_index() < kBins) shared.histogram[thread_index()] = 0;
    block_sync();
}

// The bin in which the running sum, from `before` on, reaches `wanted`; leaves it and the sum before it in `shared`.
LLMCTL_DEVICE void choose_bin(u64 before, double wanted, Shared& shared) {
    block_sync();
    if (warp_index() == 0) {
        const u64* bins = shared.histogram + lane_index() * kBinsPerLane;
        u64 own = 0;
        for (int i = 0; i < kBinsPerLane; ++i) own += bins[i];
        u64 sum = before + warp_running_sum(own) - own;
        if (static_cast<double>(sum) < wanted && static_cast<double>(sum + own) >= wanted) {
            int i = 0;
            while (i < kBinsPerLane - 1 && static_cast<double>(sum + bins[i]) < wanted) sum += bins[i++];
            shared.bin = lane_index() * kBinsPerLane + i;
            shared.before = sum;
        }
    }
    block_sync();
}

// Spreads values by their size: bin 0 holds the largest; the last all that have next to no mass.
LLMCTL_DEVICE int coarse_bin(float scaled) {
    return scaled > -31.875f ? static_cast<int>(scaled * -8.0f) : kBins - 1;
}

// The smallest value, as ordered(), before which less than `wanted` lies, counted from the largest down: of mass
// (kMass; `wanted` is then a share of the whole) or of tokens. Only values of at least `least` count.
template <bool kMass, typename T>
LLMCTL_DEVICE u32 threshold(const RowValues<T>& row, u32 least, double wanted, Shared& shared) {
    clear_histogram(shared);
    for (int i = thread_index(); i < row.vocab; i += kThreads) {
        const float s = row.scaled(i);
        const u64 amount = ordered(s) < least ? 0 : kMass ? mass_of(s) : 1;
        if (amount) atomic_add(&shared.histogram[coarse_bin(s)], amount);
    }
    if (kMass) {
        block_sync();
        u64 total = 0;
        for (int i = lane_index(); i < kBins; i += kWarp) total += shared.histogram[i];
        wanted *= static_cast<double>(warp_sum(total));
        wanted = wanted < 1.0 ? 1.0 : wanted;
    }
    choose_bin(0, wanted, shared);
    const int coarse = shared.bin;
    u32 prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        const u64 before = shared.before;
        clear_histogram(shared);
        for (int i = thread_index(); i < row.vocab; i += kThreads) {
            const float s = row.scaled(i);
            if (coarse_bin(s) != coarse) continue;
            const u32 key = ordered(s);
            if (key < least || static_cast<u64>(key ^ prefix) >> (shift + 8)) continue;
            const u64 amount = kMass ? mass_of(s) : 1;
            if (amount) atomic_add(&shared.histogram[kBins - 1 - (key >> shift & 255u)], amount);
        }
        choose_bin(before, wanted, shared);
        prefix |= static_cast<u32>(kBins - 1 - shared.bin) << shift;
    }
    return prefix;
}

template <typename T>
LLMCTL_DEVICE u64 kept_mass(const RowValues<T>& row, u32 least, int i) {
    const float s = row.scaled(i);
    return ordered(s) < least ? 0 : mass_of(s);
}

// The first token at which the running sum of the kept mass exceeds its share `bits` / 2^64. Each warp sums one range
// of ids; the warp in whose range the sum crosses walks it again.
template <typename T>
LLMCTL_DEVICE int draw(const RowValues<T>& row, u32 least, u64 bits, Shared& shared) {
    const int range = (row.vocab + kThreads - 1) / kThreads * kWarp;
    const int begin = warp_index() * range < row.vocab ? warp_index() * range : row.vocab;
    const int end = begin + range < row.vocab ? begin + range : row.vocab;
    u64 own = 0;
    for (int i = begin + lane_index(); i < end; i += kWarp) own += kept_mass(row, least, i);
    own = warp_sum(own);
    if (lane_index() == 0) shared.sums[warp_index()] = own;
    block_sync();
    u64 before = 0, total = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
        if (warp < warp_index()) before += shared.sums[warp];
        total += shared.sums[warp];
    }
    const u64 target = multiply_high(bits, total);
    if (before <= target && before + own > target) {
        for (int first = begin; before <= target; first += kWarp) {
            const int i = first + lane_index();
            const u64 running = before + warp_running_sum(i < end ? kept_mass(row, least, i) : 0);
            const u32 crossed = vote_ballot(running > target);
            if (crossed && lane_index() == population_count((crossed & (0u - crossed)) - 1)) shared.token = i;
            before = warp_max(running);
        }
    }
    block_sync();
    return shared.token;
}

// Parameters of all rows; absent pointers are null.
template <typename T>
struct Batch {
    const T* logits;
    const u32* allowed;
    const float* temperature;
    const int* top_k;
    const float *top_p, *min_p;
    const u64* seeds;
    const long long* positions;
    int* tokens;
    int vocab, stride;
};

template <typename T>
LLMCTL_DEVICE void sample_row(const Batch<T>& batch, Shared& shared) {
    const long long r = block_index();
    const u32* allowed = batch.allowed ? batch.allowed + r * ((batch.vocab + 31) / 32) : nullptr;
    RowValues<T> row{batch.logits + r * batch.stride, allowed, batch.vocab, 0.0f, 1.0f};
    // The largest value in the upper half, the complement of its id below: ties go to the lowest id.
    u64 best = 0;
    for (int i = thread_index(); i < row.vocab; i += kThreads) {
        const u64 key = static_cast<u64>(ordered(row.logit(i))) << 32 | (0xffffffffu - static_cast<u32>(i));
        best = best > key ? best : key;
    }
    best = block_max(best, shared);
    const int argmax = static_cast<int>(0xffffffffu - static_cast<u32>(best));
    row.temperature = batch.temperature[r];
    row.peak = row.logit(argmax);
    int token = argmax;
    if (row.temperature > 0.0f && row.peak > minus_infinity()) {
        u32 least = 0;
        const int k = batch.top_k ? batch.top_k[r] : 0;
        const float p = batch.top_p ? batch.top_p[r] : 1.0f;
        const float m = batch.min_p ? batch.min_p[r] : 0.0f;
        if (k > 0 && k < row.vocab) least = threshold<false>(row, least, k, shared);
        if (p < 1.0f) {
            const u32 nucleus = threshold<true>(row, least, p, shared);
            least = nucleus > least ? nucleus : least;
        }
        if (m > 0.0f) {
            const u32 floor = ordered(logf(m));
            least = floor > least ? floor : least;
        }
        token = draw(row, least, philox_bits(batch.seeds[r], static_cast<u64>(batch.positions[r])), shared);
    }
    if (thread_index() == 0) batch.tokens[r] = token;
}

}  // namespace sampling

}  // namespace llmctl

#define LLMCTL_SAMPLE(NAME, T)                                                                                     \
    LLMCTL_KERNEL(llmctl::sampling::kThreads, 1)                                                                   \
    sample_##NAME(const T* logits, const u32* allowed, const float* temperature, const int* top_k,                 \
                  const float* top_p, const float* min_p, const u64* seeds, const long long* positions,            \
                  int* tokens, int vocab, int stride) {                                                            \
        __shared__ llmctl::sampling::Shared shared;                                                                \
        llmctl::sampling::sample_row(llmctl::sampling::Batch<T>{logits, allowed, temperature, top_k, top_p, min_p, \
                                                                seeds, positions, tokens, vocab, stride},          \
                                     shared);                                                                      \
    }

LLMCTL_SAMPLE(f16, llmctl::f16)
LLMCTL_SAMPLE(bf16, llmctl::bf16)
LLMCTL_SAMPLE(f32, float)

LLMCTL_KERNEL(256, 4)
feed_tokens(long long* ids, const int* source, const int* tokens, int rows) {
    const int i = llmctl::block_index() * 256 + llmctl::thread_index();
    if (i < rows && source[i] >= 0) ids[i] = tokens[source[i]];
}
