// Changes to logits before sampling.cu, and log-probabilities after it. Logits are f32 [rows, vocab], changed in place.
//
// Numbers, sm_90: 16, 30 and 39 registers. All three are launches of 2 to 3 us but logprobs, whose row of 513 KB takes
// one SM 9 us a read (27 us at 1 to 132 rows).
//
// add_bias: logits[bias_rows[i], bias_ids[i]] += bias_values[i]; i32, i32, f32 [n]; no pair may come twice.
//   Grid: ceil(n / 256) blocks of 256 threads.
//
// penalise: per row a list of the distinct tokens seen in prompt and output, row r's at starts[r] .. starts[r + 1] - 1:
//   ids i32 [n], counts i32 [n] (occurrences in the output; 0 = in the prompt only). repetition (Keskar et al. 2019)
//   divides a positive logit and multiplies another one; then frequency * count + presence is taken off where count > 0
//   (OpenAI's definition). starts i32 [rows + 1]; repetition, presence, frequency f32 [rows]. Grid: rows blocks of 256.
//
// logprobs: log-softmax of a row at tokens[row] and the token's rank (1 = most likely; ties rank alike). tokens i32,
//   logprob f32, rank i32 [rows]. Grid: rows blocks of 1024 threads. Bound: three reads of the row, two of them from
// L2.
#include "device.cuh"

namespace llmctl {
namespace logits {

constexpr int kThreads = 256;
constexpr int kWide = 1024;

LLMCTL_DEVICE void penalise_row(float* row, const int* ids, const int* counts, int n, float repetition, float presence,
                                float frequency) {
    for (int i = thread_index(); i < n; i += kThreads) {
        float v = row[ids[i]];
        if (repetition != 1.0f) v = v > 0.0f ? v / repetition : v * repetition;
        if (counts[i] > 0) v -= static_cast<float>(counts[i]) * frequency + presence;
        row[ids[i]] = v;
    }
}

struct Shared {
    float most[kWide / kWarp], sum[kWide / kWarp], above[kWide / kWarp];
};

LLMCTL_DEVICE void describe_token(const float* row, int vocab, int token, float* logprob, int* rank, Shared& shared) {
    float most = row[0];
    for (int i = thread_index(); i < vocab; i += kWide) most = fmaxf(most, row[i]);
    most = block_max<kWide>(most, shared.most);
    const float own = row[token];
    float sum = 0.0f, above = 0.0f;
    for (int i = thread_index(); i < vocab; i += kWide) {
        sum += expf(row[i] - most);
        above += row[i] > own ? 1.0f : 0.0f;
    }
    sum = block_sum<kWide>(sum, shared.sum);
    above = block_sum<kWide>(above, shared.above);  // exact: vocabularies are far below 2^24
    if (thread_index() == 0) {
        *logprob = own - most - logf(sum);
        *rank = static_cast<int>(above) + 1;
    }
}

}  // namespace logits
}  // namespace llmctl

LLMCTL_KERNEL(llmctl::logits::kThreads, 4)
add_bias(float* logits, const int* bias_rows, const int* bias_ids, const float* bias_values, int n, int vocab) {
    const int i = llmctl::block_index() * llmctl::logits::kThreads + llmctl::thread_index();
    if (i < n) logits[static_cast<long long>(bias_rows[i]) * vocab + bias_ids[i]] += bias_values[i];
}

LLMCTL_KERNEL(llmctl::logits::kThreads, 4)
penalise(float* logits, const int* starts, const int* ids, const int* counts, const float* repetition,
         const float* presence, const float* frequency, int vocab) {
    const long long r = llmctl::block_index();
    const int begin = starts[r];
    llmctl::logits::penalise_row(logits + r * vocab, ids + begin, counts + begin, starts[r + 1] - begin, repetition[r],
                                 presence[r], frequency[r]);
}

LLMCTL_KERNEL(llmctl::logits::kWide, 1)
logprobs(const float* logits, const int* tokens, float* logprob, int* rank, int vocab) {
    __shared__ llmctl::logits::Shared shared;
    const long long r = llmctl::block_index();
    llmctl::logits::describe_token(logits + r * vocab, vocab, tokens[r], logprob + r, rank + r, shared);
}
