// Runs a grid: blocks one after another, the threads of a block as fibres, forwards or backwards; barriers, warp-wide
// operations, and the errors of threads that do not come to them.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>

#include "runtime.h"

namespace emulator {

Launch launch;
Thread* current = nullptr;

namespace {

constexpr int kMaxThreads = 1024;
Thread threads[kMaxThreads];
Warp warps[kMaxThreads / llmctl::kWarp];
Fibre scheduler;
void (*entry)(void**) = nullptr;
void** arguments = nullptr;

void switch_out() { fibre_switch(current->fibre, scheduler); }

void run_thread() {
    entry(arguments);
    current->state = State::kDone;
    ++launch.done;
    switch_out();
    __builtin_unreachable();
}

void start_block() {
    launch.block_start = ++launch.epoch;
    launch.at_barrier = launch.done = 0;
    memory_start_block();
    for (int i = 0; i < launch.threads; ++i) {
        Thread& t = threads[i];
        if (!t.stack) {
            t.stack = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        }
        t.index = i;
        t.state = State::kReady;
        t.fenced = false;
        t.open_group.clear();
        t.groups.clear();
        fibre_prepare(t.fibre, t.stack, kStackBytes, run_thread);
    }
    for (Warp& warp : warps) warp = Warp{};
}

const char* name_of(WarpOp op) {
    switch (op) {
        case WarpOp::kSync: return "warp_sync";
        case WarpOp::kShuffle: return "shuffle";
        case WarpOp::kVote: return "vote";
        case WarpOp::kLoadMatrix: return "ldmatrix";
        default: return "mma";
    }
}

const char* whereabouts(const Thread& t, char (&text)[96]) {
    if (t.state == State::kDone) {
        snprintf(text, sizeof text, "has returned");
    } else if (t.state == State::kAtBarrier) {
        snprintf(text, sizeof text, "waits at block_sync in line %d", t.line);
    } else {
        snprintf(text, sizeof text, "waits at %s in line %d", name_of(warp_of(t.index).op), t.line);
    }
    return text;
}

// No thread can run and not all are done: some wait for others that will never come.
void report_divergence() {
    Thread* waiting = nullptr;
    for (int i = 0; i < launch.threads && !waiting; ++i) {
        if (threads[i].state == State::kInWarp) waiting = &threads[i];
    }
    for (int i = 0; i < launch.threads && !waiting; ++i) {
        if (threads[i].state == State::kAtBarrier) waiting = &threads[i];
    }
    const bool in_warp = waiting->state == State::kInWarp;
    const Warp& warp = warp_of(waiting->index);
    const int base = in_warp ? waiting->index / llmctl::kWarp * llmctl::kWarp : 0;
    const int end = in_warp ? base + llmctl::kWarp : launch.threads;
    int other = base;
    while (other < end - 1 && (in_warp ? (warp.arrived >> (other - base) & 1) != 0
                                       : threads[other].state == State::kAtBarrier)) {
        ++other;
    }
    char here[96], there[96];
    current = waiting;
    launch.failed = true;  // fail() would switch away from the scheduler, which is where we are
    char text[512];
    snprintf(text, sizeof text, "divergent %s: it %s, but thread %d %s; block (%d, %d, %d), thread %d",
             in_warp ? "warp" : "barrier", whereabouts(*waiting, here), other, whereabouts(threads[other], there),
             launch.block[0], launch.block[1], launch.block[2], waiting->index);
    launch.message = text;
    launch.site = waiting->site;
}

void run_block(bool reversed) {
    start_block();
    while (launch.done < launch.threads && !launch.failed) {
        bool progress = false;
        for (int i = 0; i < launch.threads && !launch.failed; ++i) {
            Thread& t = threads[reversed ? launch.threads - 1 - i : i];
            if (t.state != State::kReady) continue;
            progress = true;
            current = &t;
            fibre_switch(scheduler, t.fibre);
        }
        if (!progress && !launch.failed) report_divergence();
    }
    current = nullptr;
}

}  // namespace

Thread& thread_at(int index) { return threads[index]; }
Warp& warp_of(int thread) { return warps[thread / llmctl::kWarp]; }

void fail(const Thread& thread, const void* site, const char* format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    char where[128];
    snprintf(where, sizeof where, "; block (%d, %d, %d), thread %d", launch.block[0], launch.block[1], launch.block[2],
             thread.index);
    launch.message = std::string(text) + where;
    launch.site = site;
    launch.failed = true;
    switch_out();
    __builtin_unreachable();
}

void warp_operation(WarpOp op, void* operand, WarpWork work, int line, const void* site) {
    Thread& self = *current;
    Warp& warp = warp_of(self.index);
    const int lane = self.index % llmctl::kWarp;
    if (warp.arrived && (warp.op != op || warp.line != line)) {
        fail(self, site, "divergent warp: it comes to %s in line %d while other lanes wait at %s in line %d",
             name_of(op), line, name_of(warp.op), warp.line);
    }
    warp.op = op;
    warp.line = line;
    warp.operands[lane] = operand;
    warp.arrived |= 1u << lane;
    self.line = line;
    self.site = site;
    if (warp.arrived != 0xffffffffu) {
        self.state = State::kInWarp;
        switch_out();
        return;
    }
    const int first = self.index - lane;
    if (work) work(warp.operands, first);
    warp.arrived = 0;
    if (op == WarpOp::kSync) ++warp.syncs;
    for (int i = 0; i < llmctl::kWarp; ++i) threads[first + i].state = State::kReady;
}

void barrier(int line, const void* site) {
    Thread& self = *current;
    self.line = line;
    self.site = site;
    if (launch.at_barrier == 0) launch.first_at_barrier = self.index;
    const Thread& first = threads[launch.first_at_barrier];
    if (first.line != line) {
        fail(self, site, "divergent barrier: it comes to block_sync in line %d while thread %d waits in line %d", line,
             first.index, first.line);
    }
    self.state = State::kAtBarrier;
    if (++launch.at_barrier < launch.threads) {
        switch_out();
        return;
    }
    launch.at_barrier = 0;
    ++launch.epoch;
    for (int i = 0; i < launch.threads; ++i) threads[i].state = State::kReady;
}

}  // namespace emulator

// Runs a kernel; 0, or 1 with the error's text and the return address of the call at fault.
extern "C" int emulator_launch(void (*kernel)(void**), void** args, const int* grid, int block_threads, int reversed,
                               char* message, size_t capacity, const void** site) {
    using namespace emulator;
    launch = Launch{};
    launch.threads = block_threads;
    for (int i = 0; i < 3; ++i) launch.grid[i] = grid[i];
    entry = kernel;
    arguments = args;
    memory_start_launch(kernel);
    const long long blocks = 1ll * grid[0] * grid[1] * grid[2];
    for (long long b = 0; b < blocks && !launch.failed; ++b) {
        const long long at = reversed ? blocks - 1 - b : b;
        launch.block[0] = static_cast<int>(at % grid[0]);
        launch.block[1] = static_cast<int>(at / grid[0] % grid[1]);
        launch.block[2] = static_cast<int>(at / grid[0] / grid[1]);
        run_block(reversed != 0);
    }
    current = nullptr;
    if (launch.failed) snprintf(message, capacity, "%s", launch.message.c_str());
    *site = launch.site;
    return launch.failed;
}
