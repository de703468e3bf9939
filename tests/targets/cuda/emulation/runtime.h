// Inside of the emulator: what the scheduler, the memory checker and the device functions share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device.cuh"

namespace emulator {

// ---- fibres (fibre.cpp) --------------------------------------------------------------------------------------------

constexpr size_t kStackBytes = 256 * 1024;

struct Fibre {
    void* context = nullptr;  // saved stack pointer, or a ucontext_t
};

void fibre_prepare(Fibre& fibre, char* stack, size_t bytes, void (*entry)());
void fibre_switch(Fibre& from, Fibre& to);

// ---- threads, warps, the launch (scheduler.cpp) ---------------------------------------------------------------------

enum class State : u8 { kReady, kAtBarrier, kInWarp, kDone };

struct PendingCopy {
    char* shared;
    const char* global;
    int bytes;  // the rest of the 16 is zeros
};

struct Thread {
    Fibre fibre;
    char* stack = nullptr;
    int index = 0;
    State state = State::kReady;
    int line = 0;                // of the barrier or warp operation it waits at
    const void* site = nullptr;  // return address of that call
    bool fenced = false;
    std::vector<PendingCopy> open_group;
    std::vector<std::vector<PendingCopy>> groups;
};

enum class WarpOp : int { kSync, kShuffle, kVote, kLoadMatrix, kMma };
using WarpWork = void (*)(void* const* operands, int first_thread);

struct Warp {
    u32 arrived = 0;
    u32 syncs = 1;  // warp_sync calls completed: orders memory among the lanes between block barriers
    WarpOp op = WarpOp::kSync;
    int line = 0;
    void* operands[llmctl::kWarp] = {};
};

struct Launch {
    int grid[3] = {1, 1, 1};
    int threads = 0;
    int block[3] = {0, 0, 0};
    u32 epoch = 0;        // grows at every block start and every completed barrier
    u32 block_start = 0;  // epoch at which the running block began
    int at_barrier = 0;
    int first_at_barrier = 0;
    int done = 0;
    bool failed = false;
    std::string message;
    const void* site = nullptr;
};

extern Launch launch;
extern Thread* current;
Thread& thread_at(int index);
Warp& warp_of(int thread);

// Records the error of this launch, names block and thread, and leaves the kernel for good.
[[noreturn]] void fail(const Thread& thread, const void* site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// Waits until every thread of the block is here.
void barrier(int line, const void* site);

// Waits until all 32 lanes bring an operand, then one of them does the work for all.
void warp_operation(WarpOp op, void* operand, WarpWork work, int line, const void* site);

// ---- memory (memory.cpp) -------------------------------------------------------------------------------------------

enum class Access : u8 { kRead, kReadConst, kWrite, kAtomic };

// Checks bounds, alignment (0: any), initialisation and races of one access, and remembers it.
void check_access(Thread& thread, const void* address, size_t size, size_t alignment, Access kind, const void* site);
void start_copy(Thread& thread, const PendingCopy& copy, const void* site);
void finish_copy(Thread& thread, const PendingCopy& copy);
void memory_start_launch(void (*kernel)(void**));
void memory_start_block();
void memory_fence_atomic(const Thread& thread);
void* dynamic_shared_memory(size_t bytes);

}  // namespace emulator
