// A persistent thread pool that runs one function on every thread at once, with a barrier inside it.
//
// A step walks some 300 small ops; handing each to a queue would cost more than many of them. So all threads walk the op
// list together and meet at barriers. Waiting spins first (a barrier is microseconds away while a step runs), then yields
// (the API process may need this core), then, on Linux, sleeps (the thread waited for may itself be waiting for this core); between
// steps workers sleep on a condition variable.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llmctl {

static inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads < 1 ? 1 : threads) {
    try {
      for (int id = 1; id < threads_; id++) workers_.emplace_back([this, id] { work(id); });
    } catch (...) {  // a limit on threads or memory: those that were made must be gone before this object is
      stop();
      throw;
    }
  }
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Calls f(thread id) on every thread, the caller being thread 0; returns when all are done.
  template <class F>
  void run(F& f) {
    if (threads_ == 1) return f(0);
    call_ = [](void* fn, int id) { (*static_cast<F*>(fn))(id); };
    argument_ = &f;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    f(0);
    barrier();
  }

  // All threads inside run() meet here; writes before it are visible after it. While a thread waits it calls meanwhile(),
  // something of well under a microsecond, as long as that returns true.
  template <class F>
  void barrier(F&& meanwhile) {
    if (threads_ == 1) return;
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1);
      if (asleep_.load()) wake_sleepers();
      return;
    }
    bool busy = true;
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; spins++) {
      if (spins < kSpins) {
        busy = busy && meanwhile();
        if (!busy) cpu_relax();
      } else if (spins < kSpins + kYields) {
        std::this_thread::yield();
      } else {
        sleep_while(generation);
      }
    }
  }
  void barrier() {
    barrier([] { return false; });
  }

 private:
  static constexpr int kSpins = 4096, kYields = 256;  // turns of waiting, each way

  // asleep_ rises before the kernel compares the generation, and the generation changes before asleep_ is read: either
  // the sleeper sees the new generation or the last to arrive sees the sleeper.
  void sleep_while(uint32_t generation) {
#if defined(__linux__)
    static_assert(sizeof(generation_) == sizeof(uint32_t), "a futex is 32 bits");
    asleep_.fetch_add(1);
    syscall(SYS_futex, &generation_, FUTEX_WAIT_PRIVATE, generation, nullptr, nullptr, 0);
    asleep_.fetch_sub(1);
#else
    (void)generation;
    std::this_thread::yield();
#endif
  }
  void wake_sleepers() {
#if defined(__linux__)
    syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, threads_, nullptr, nullptr, 0);
#endif
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void work(int id) {
    uint32_t seen = 0;
    for (;;) {
      for (int spins = 0; spins < 2048 && epoch_.load(std::memory_order_acquire) == seen; spins++) cpu_relax();
      if (epoch_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_) return;
      call_(argument_, id);
      barrier();
    }
  }

  const int threads_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  void (*call_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> asleep_{0};
};

// Waits until a counter has reached `count`. Those who are to raise it are at work, at nothing that waits for this thread.
static inline void wait_until(const std::atomic<int64_t>& counter, int64_t count) {
  for (int spins = 0; counter.load(std::memory_order_acquire) < count; spins++) {
    if (spins < 4096) cpu_relax();
    else if (spins < 8192) std::this_thread::yield();
    else std::this_thread::sleep_for(std::chrono::microseconds(20));  // they may be waiting for this core
  }
}

// How far one thread's share of a parallel phase is done; zeroed before the step.
struct alignas(64) WorkCounter {
  std::atomic<int64_t> next{0};
};

// One thread's view of a phase: counters, one a thread.
struct Share {
  WorkCounter* counters;
  int thread, threads;

  int64_t begin(int64_t total, int owner) const { return total * owner / threads; }

  // Calls f(begin, end) on chunks of [0, total) until none is left. Every thread owns a contiguous range, so that its
  // reads form one stream and its rows stay in its cache; whoever is done takes chunks of the others' ranges.
  template <class F>
  void run(int64_t total, int64_t chunk, F&& f) const {
    for (int i = 0; i < threads; i++) {
      const int owner = (thread + i) % threads;
      const int64_t first = begin(total, owner), last = begin(total, owner + 1);
      for (;;) {
        const int64_t at = first + counters[owner].next.fetch_add(chunk, std::memory_order_relaxed);
        if (at >= last) break;
        f(at, at + chunk < last ? at + chunk : last);
      }
    }
  }
};

}  // namespace llmctl
