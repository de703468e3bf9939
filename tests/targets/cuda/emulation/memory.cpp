// Checks every memory access of a kernel: bounds, alignment, initialisation, races.
//
// The kernel is compiled with -fsanitize=thread but without its run-time library: the compiler then calls the
// __tsan_* functions below before every load and store, raw pointers included; and with -fsanitize=bounds for the
// indices of arrays of known size, registers included.
//
// Races: for each byte of shared memory and of writable buffers the last write and the reads since are kept with the
// block-barrier epoch and, for the lanes of one warp, the count of warp_syncs. Two accesses by different threads, one
// of them a write, must be ordered by one of those. Accesses from different blocks are never ordered, except that a
// block which has done an atomic may read what a block wrote that did device_fence and then an atomic.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "runtime.h"

namespace emulator {
namespace {

constexpr u16 kMany = 0xffff;
constexpr size_t kMaxDynamicShared = 227 * 1024;

struct ByteState {
    u32 write_epoch, write_sync, read_epoch, read_sync;
    u16 write_thread, read_thread, read_warp;
    u8 write_atomic, copy_pending;
};

struct Region {
    std::string name;
    char* begin;
    size_t size;
    bool shared, writable, initialised;
    std::vector<u8> written;       // per byte, of buffers that start without contents
    std::vector<ByteState> bytes;  // of shared memory and writable buffers

    bool holds(const char* p) const { return p >= begin && p < begin + size; }
};

struct BlockRecord {
    u32 start;
    bool released;
};

struct Range {
    const char *begin, *end;
};

std::vector<std::unique_ptr<Region>> regions;
std::vector<Range> constants;  // read-only segments of the kernel's library
std::vector<BlockRecord> blocks;
bool block_acquired = false;
Region* last_hit = nullptr;

Region* find(const char* p) {
    if (last_hit && last_hit->holds(p)) return last_hit;
    for (auto& region : regions) {
        if (region->holds(p)) return last_hit = region.get();
    }
    return nullptr;
}

const char* verb(Access kind) {
    return kind == Access::kWrite ? "write" : kind == Access::kAtomic ? "atomic update" : "read";
}

bool writes(Access kind) { return kind == Access::kWrite || kind == Access::kAtomic; }

[[noreturn]] void out_of_bounds(const Thread& t, const char* p, size_t size, Access kind, const void* site) {
    const Region* nearest = nullptr;
    size_t gap = ~size_t{0};
    for (const auto& region : regions) {
        const size_t distance =
            p < region->begin ? region->begin - p : p - (region->begin + region->size) + (region->holds(p) ? ~0ul : 0);
        if (region->holds(p)) {
            nearest = region.get();
            break;
        }
        if (distance < gap) gap = distance, nearest = region.get();
    }
    if (!nearest || (!nearest->holds(p) && gap > (1u << 20))) {
        fail(t, site, "out-of-bounds %s of %zu bytes at %p, in no buffer", verb(kind), size,
             static_cast<const void*>(p));
    }
    fail(t, site, "out-of-bounds %s of %zu bytes at byte %td of '%s', which has %zu bytes", verb(kind), size,
         p - nearest->begin, nearest->name.c_str(), nearest->size);
}

// Whether something another thread did (in `epoch`, at `sync` of its warp) is certainly over.
bool is_ordered(const Thread& self, u32 epoch, u32 sync, u16 thread, bool same_warp) {
    if (epoch < launch.block_start) return false;
    if (epoch < launch.epoch || thread == self.index) return true;
    return same_warp && sync < warp_of(self.index).syncs;
}

bool is_released_to_us(u32 epoch) {
    if (!block_acquired) return false;
    for (size_t i = blocks.size(); i-- > 0;) {
        if (blocks[i].start <= epoch) return blocks[i].released;
    }
    return false;
}

[[noreturn]] void race(const Thread& t, const Region& r, size_t at, Access kind, const char* other, u32 epoch,
                       int thread, const void* site) {
    if (epoch < launch.block_start) {
        fail(t, site, "data race: %s of byte %zu of '%s' that another block %s", verb(kind), at, r.name.c_str(), other);
    }
    char who[32] = "several threads";
    if (thread != kMany) snprintf(who, sizeof who, "thread %d", thread);
    fail(t, site, "data race: %s of byte %zu of '%s' that %s %s with no barrier between", verb(kind), at,
         r.name.c_str(), who, other);
}

void check_write_before(const Thread& t, Region& r, size_t at, Access kind, const void* site) {
    const ByteState& s = r.bytes[at];
    if (s.copy_pending) {
        fail(t, site, "%s of byte %zu of '%s' that a cp.async not yet waited for will write", verb(kind), at,
             r.name.c_str());
    }
    if (!s.write_epoch || (kind == Access::kAtomic && s.write_atomic)) return;
    const bool same_warp = s.write_thread / llmctl::kWarp == t.index / llmctl::kWarp;
    if (is_ordered(t, s.write_epoch, s.write_sync, s.write_thread, same_warp)) return;
    if (s.write_epoch < launch.block_start && is_released_to_us(s.write_epoch)) return;
    race(t, r, at, kind, "wrote", s.write_epoch, s.write_thread, site);
}

void check_reads_before(const Thread& t, Region& r, size_t at, Access kind, const void* site) {
    const ByteState& s = r.bytes[at];
    if (!s.read_epoch) return;
    const bool same_warp = s.read_warp == t.index / llmctl::kWarp;
    if (s.read_epoch >= launch.block_start && s.read_epoch == launch.epoch && s.read_warp == kMany) {
        race(t, r, at, kind, "read", s.read_epoch, kMany, site);
    }
    if (is_ordered(t, s.read_epoch, s.read_sync, s.read_thread, same_warp)) return;
    if (s.read_epoch < launch.block_start && is_released_to_us(s.read_epoch)) return;
    race(t, r, at, kind, "read", s.read_epoch, s.read_thread, site);
}

void remember_read(const Thread& t, ByteState& s) {
    const u16 thread = static_cast<u16>(t.index), warp = static_cast<u16>(t.index / llmctl::kWarp);
    const u32 sync = warp_of(t.index).syncs;
    if (s.read_epoch != launch.epoch) {
        s.read_epoch = launch.epoch, s.read_thread = thread, s.read_warp = warp, s.read_sync = sync;
    } else if (s.read_warp != warp) {
        s.read_warp = kMany;
    } else if (s.read_sync != sync) {
        s.read_thread = thread, s.read_sync = sync;
    } else if (s.read_thread != thread) {
        s.read_thread = kMany;
    }
}

void track(Thread& t, Region& r, size_t at, Access kind, const void* site) {
    ByteState& s = r.bytes[at];
    if (kind == Access::kReadConst && s.write_epoch) {
        fail(t, site, "read-only (nc) load of byte %zu of '%s', which this kernel writes", at, r.name.c_str());
    }
    check_write_before(t, r, at, kind, site);
    if (!writes(kind)) return remember_read(t, s);
    check_reads_before(t, r, at, kind, site);
    s.write_epoch = launch.epoch, s.write_sync = warp_of(t.index).syncs;
    s.write_thread = static_cast<u16>(t.index), s.write_atomic = kind == Access::kAtomic;
}

void check_initialised(const Thread& t, const Region& r, size_t at, size_t size, Access kind, const void* site) {
    for (size_t i = at; i < at + size; ++i) {
        const bool known = r.shared ? r.bytes[i].write_epoch != 0 || r.bytes[i].copy_pending
                                    : r.initialised || r.written[i];
        if (!known) fail(t, site, "%s of byte %zu of '%s', which was never written", verb(kind), i, r.name.c_str());
    }
}

}  // namespace

void check_access(Thread& t, const void* address, size_t size, size_t alignment, Access kind, const void* site) {
    const char* p = static_cast<const char*>(address);
    if (p >= t.stack && p < t.stack + kStackBytes) return;
    Region* r = find(p);
    if (!r) {
        for (const Range& range : constants) {
            if (!writes(kind) && p >= range.begin && p + size <= range.end) return;
        }
        out_of_bounds(t, p, size, kind, site);
    }
    const size_t at = p - r->begin;
    if (at + size > r->size) out_of_bounds(t, p, size, kind, site);
    if (alignment && reinterpret_cast<uintptr_t>(p) % alignment) {
        fail(t, site, "misaligned %s of %zu bytes at byte %zu of '%s'", verb(kind), size, at, r->name.c_str());
    }
    if (writes(kind) && !r->writable) {
        fail(t, site, "%s of byte %zu of '%s', which is an input", verb(kind), at, r->name.c_str());
    }
    if (kind == Access::kReadConst && r->shared) {
        fail(t, site, "global load from shared memory '%s'", r->name.c_str());
    }
    if (kind != Access::kWrite) check_initialised(t, *r, at, size, kind, site);
    if (!r->bytes.empty()) {
        for (size_t i = at; i < at + size; ++i) track(t, *r, i, kind, site);
    }
    if (writes(kind) && !r->written.empty()) memset(&r->written[at], 1, size);
}

void start_copy(Thread& t, const PendingCopy& copy, const void* site) {
    Region* r = find(copy.shared);
    if (!r || !r->shared) fail(t, site, "cp.async whose target is not in shared memory");
    if (copy.bytes) check_access(t, copy.global, copy.bytes, 16, Access::kReadConst, site);
    check_access(t, copy.shared, 16, 16, Access::kWrite, site);
    for (int i = 0; i < 16; ++i) r->bytes[copy.shared - r->begin + i].copy_pending = 1;
}

void finish_copy(Thread& t, const PendingCopy& copy) {
    Region* r = find(copy.shared);
    for (int i = 0; i < 16; ++i) {
        ByteState& s = r->bytes[copy.shared - r->begin + i];
        s.copy_pending = 0;
        s.write_epoch = launch.epoch, s.write_sync = warp_of(t.index).syncs;
        s.write_thread = static_cast<u16>(t.index), s.write_atomic = 0;
    }
    memcpy(copy.shared, copy.global, copy.bytes);
    memset(copy.shared + copy.bytes, 0, 16 - copy.bytes);
}

// Adds the read-only segments of the loaded object that holds `wanted`.
int add_constants(dl_phdr_info* object, size_t, void* wanted) {
    std::vector<Range> ranges;
    bool holds = false;
    for (int i = 0; i < object->dlpi_phnum; ++i) {
        const auto& segment = object->dlpi_phdr[i];
        if (segment.p_type != PT_LOAD) continue;
        const char* begin = reinterpret_cast<const char*>(object->dlpi_addr + segment.p_vaddr);
        const Range range{begin, begin + segment.p_memsz};
        holds |= wanted >= range.begin && wanted < range.end;
        if (!(segment.p_flags & PF_W)) ranges.push_back(range);
    }
    if (holds) constants = ranges;
    return holds;
}

void memory_start_launch(void (*kernel)(void**)) {
    constants.clear();
    dl_iterate_phdr(add_constants, reinterpret_cast<void*>(kernel));
    blocks.clear();
    last_hit = nullptr;
    for (auto& r : regions) {
        if (r->shared || r->writable) r->bytes.assign(r->size, ByteState{});
        if (!r->shared && !r->initialised) r->written.assign(r->size, 0);
    }
}

void memory_start_block() {
    blocks.push_back({launch.block_start, false});
    block_acquired = false;
    for (auto& r : regions) {
        if (r->shared) memset(r->bytes.data(), 0, r->bytes.size() * sizeof(ByteState));
    }
}

void memory_fence_atomic(const Thread& t) {
    block_acquired = true;
    if (t.fenced) blocks.back().released = true;
}

void* dynamic_shared_memory(size_t bytes) {
    static void* const memory =
        mmap(nullptr, kMaxDynamicShared, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return bytes <= kMaxDynamicShared ? memory : nullptr;
}

}  // namespace emulator

using emulator::Access;

extern "C" {

void emulator_reset() { emulator::regions.clear(), emulator::last_hit = nullptr; }

// A device buffer or a shared variable. `initialised`: its contents may be read before the kernel writes them.
void emulator_add_region(const char* name, void* begin, size_t size, int shared, int writable, int initialised) {
    emulator::regions.push_back(std::make_unique<emulator::Region>(emulator::Region{
        name, static_cast<char*>(begin), size, shared != 0, writable != 0, initialised != 0, {}, {}}));
}

// The dynamic shared memory of the next launches; 0 when a block cannot have so much.
int emulator_set_dynamic_shared(size_t bytes) {
    void* memory = emulator::dynamic_shared_memory(bytes);
    if (memory && bytes) emulator_add_region("dynamic shared memory", memory, bytes, 1, 1, 0);
    return memory != nullptr;
}

// Where the library that holds a function is loaded.
size_t emulator_base(void* function) {
    Dl_info info;
    return dladdr(function, &info) ? reinterpret_cast<size_t>(info.dli_fbase) : 0;
}

// Bytes of a region that the last launch left unwritten; the first of them.
size_t emulator_unwritten(int region, size_t* first) {
    const auto& written = emulator::regions[region]->written;
    size_t count = 0;
    for (size_t i = written.size(); i-- > 0;) {
        if (!written[i]) ++count, *first = i;
    }
    return count;
}

#define EMULATOR_SITE __builtin_return_address(0)
#define EMULATOR_CHECK(size, alignment, kind) \
    if (emulator::current) emulator::check_access(*emulator::current, p, size, alignment, kind, EMULATOR_SITE)

#define EMULATOR_HOOKS(size)                                                          \
    void __tsan_read##size(void* p) { EMULATOR_CHECK(size, size, Access::kRead); }    \
    void __tsan_write##size(void* p) { EMULATOR_CHECK(size, size, Access::kWrite); }  \
    void __tsan_unaligned_read##size(void* p) { EMULATOR_CHECK(size, 0, Access::kRead); } \
    void __tsan_unaligned_write##size(void* p) { EMULATOR_CHECK(size, 0, Access::kWrite); }
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)

void __tsan_read_range(void* p, size_t size) { EMULATOR_CHECK(size, 0, Access::kRead); }
void __tsan_write_range(void* p, size_t size) { EMULATOR_CHECK(size, 0, Access::kWrite); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void __ubsan_handle_out_of_bounds(void*, void* index) {
    if (emulator::current) {
        emulator::fail(*emulator::current, EMULATOR_SITE, "array index %td out of bounds",
                       reinterpret_cast<ptrdiff_t>(index));
    }
}
void __ubsan_handle_shift_out_of_bounds(void*, void*, void* by) {
    if (emulator::current) {
        emulator::fail(*emulator::current, EMULATOR_SITE, "shift by %td bits", reinterpret_cast<ptrdiff_t>(by));
    }
}
void __ubsan_handle_divrem_overflow(void*, void*, void*) {
    if (emulator::current) emulator::fail(*emulator::current, EMULATOR_SITE, "integer division by zero");
}
}
