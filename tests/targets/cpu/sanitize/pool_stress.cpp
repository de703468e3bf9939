// ThreadSanitizer on the thread pool: plain data shared through run, barrier and Share, at every thread count, with
// pools created and destroyed and the caller changing. Exit 0 when all sums are right; a race makes TSan exit 66.
// With -DPLANTED_RACE a phase reads its neighbours' data before the barrier, which must be reported.
#include "pool.h"

#include <cstdio>
#include <cstdlib>
#include <memory>

using namespace llmctl;

namespace {

constexpr int64_t kItems = 97;
constexpr int kPhases = 6;

struct Job {
  Pool& pool;
  WorkCounter* counters;
  std::vector<int64_t>& values;  // plain: every access must be ordered by the pool
  std::vector<int64_t>& sums;

  void operator()(int thread) {
    for (int phase = 0; phase < kPhases; phase++) {
      const Share share{counters + phase * pool.threads(), thread, pool.threads()};
      share.run(kItems, 1 + phase, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) values[size_t(i)] += i + phase;
      });
#if !defined(PLANTED_RACE)
      pool.barrier();
#endif
      int64_t sum = 0;
      for (int64_t value : values) sum += value;
      sums[size_t(thread)] = sum;
      pool.barrier();
    }
  }
};

bool stress(Pool& pool, int rounds, bool pauses) {
  std::vector<int64_t> values(kItems, 0), sums(size_t(pool.threads()), 0);
  std::unique_ptr<WorkCounter[]> counters(new WorkCounter[size_t(kPhases * pool.threads())]);
  int64_t expected = 0;
  for (int round = 0; round < rounds; round++) {
    for (int i = 0; i < kPhases * pool.threads(); i++) counters[i].next.store(0, std::memory_order_relaxed);
    Job job{pool, counters.get(), values, sums};
    pool.run(job);
    for (int phase = 0; phase < kPhases; phase++)
      for (int64_t i = 0; i < kItems; i++) expected += i + phase;
    for (int64_t sum : sums)
      if (sum != expected) return false;
    // Long enough for the workers to fall asleep.
    if (pauses && round % 8 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

}  // namespace

int main() {
  bool good = true;
  for (int threads = 1; threads <= 4; threads++) {
    Pool pool(threads);
    good &= stress(pool, 60, true);
    std::thread other([&] { good &= stress(pool, 20, false); });  // another caller, after the first is done
    other.join();
  }
  for (int i = 0; i < 20; i++) {
    Pool idle(3);  // destroyed while its workers may still be starting
    if (i % 2) good &= stress(idle, 2, false);
  }
  std::thread threads[2];  // two pools at once
  bool alike[2] = {false, false};
  for (int i = 0; i < 2; i++)
    threads[i] = std::thread([&alike, i] {
      Pool pool(2);
      alike[i] = stress(pool, 40, false);
    });
  for (auto& thread : threads) thread.join();
  good &= alike[0] && alike[1];
  if (!good) std::fprintf(stderr, "pool_stress: wrong sums\n");
  return good ? 0 : 1;
}
