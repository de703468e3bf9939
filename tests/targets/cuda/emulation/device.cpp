// The device functions of emulation.h: indices, warp operations, checked vector accesses, cp.async, ldmatrix, mma,
// conversions. Fragment layouts are those of device.cuh, from the PTX ISA.
#include <cmath>
#include <cstring>

#include "runtime.h"

using namespace emulator;

#define SITE __builtin_return_address(0)

namespace llmctl {

int thread_index() { return current->index; }
int block_index() { return launch.block[0]; }
int block_index_y() { return launch.block[1]; }
int block_index_z() { return launch.block[2]; }
int block_size() { return launch.threads; }
int grid_size() { return launch.grid[0]; }
int grid_size_y() { return launch.grid[1]; }
int grid_size_z() { return launch.grid[2]; }
void* emulated_dynamic_shared() { return dynamic_shared_memory(0); }

void block_sync(int line) { barrier(line, SITE); }
void warp_sync(int line) { warp_operation(WarpOp::kSync, nullptr, nullptr, line, SITE); }
void device_fence() { current->fenced = true; }

// ---- shuffles and votes --------------------------------------------------------------------------------------------

namespace {

struct ShuffleOperand {
    u32 value, result;
    int by;
    Shuffle kind;
};

void shuffle_work(void* const* operands, int) {
    const auto at = [&](int lane) { return static_cast<ShuffleOperand*>(operands[lane]); };
    for (int lane = 0; lane < kWarp; ++lane) {
        ShuffleOperand& own = *at(lane);
        int source = lane;
        if (own.kind == Shuffle::kXor) source = lane ^ own.by;
        if (own.kind == Shuffle::kUp) source = lane - own.by;
        if (own.kind == Shuffle::kDown) source = lane + own.by;
        if (own.kind == Shuffle::kLane) source = own.by & (kWarp - 1);
        own.result = at(source >= 0 && source < kWarp ? source : lane)->value;
    }
}

struct VoteOperand {
    bool value;
    u32 result;
};

void vote_work(void* const* operands, int) {
    u32 ballot = 0;
    const auto at = [&](int lane) { return static_cast<VoteOperand*>(operands[lane]); };
    for (int lane = 0; lane < kWarp; ++lane) ballot |= static_cast<u32>(at(lane)->value) << lane;
    for (int lane = 0; lane < kWarp; ++lane) at(lane)->result = ballot;
}

}  // namespace

u32 emulated_shuffle(u32 v, int by, Shuffle kind, int line) {
    ShuffleOperand operand{v, 0, by, kind};
    warp_operation(WarpOp::kShuffle, &operand, shuffle_work, line, SITE);
    return operand.result;
}

u32 vote_ballot(bool v, int line) {
    VoteOperand operand{v, 0};
    warp_operation(WarpOp::kVote, &operand, vote_work, line, SITE);
    return operand.result;
}

// ---- loads, stores, atomics ----------------------------------------------------------------------------------------

namespace {

template <typename T, typename Combine>
T atomic(T* p, const void* site, Combine combine) {
    memory_fence_atomic(*current);
    check_access(*current, p, sizeof(T), sizeof(T), Access::kAtomic, site);
    const T old = *p;
    *p = combine(old);
    return old;
}

}  // namespace

void emulated_load(void* to, const void* p, int bytes, bool read_only) {
    check_access(*current, p, bytes, bytes, read_only ? Access::kReadConst : Access::kRead, SITE);
    memcpy(to, p, bytes);
}

void emulated_store(void* p, const void* from, int bytes) {
    check_access(*current, p, bytes, bytes, Access::kWrite, SITE);
    memcpy(p, from, bytes);
}

u32 atomic_add(u32* p, u32 v) { return atomic(p, SITE, [v](u32 old) { return old + v; }); }
int atomic_add(int* p, int v) { return atomic(p, SITE, [v](int old) { return old + v; }); }
u64 atomic_add(u64* p, u64 v) { return atomic(p, SITE, [v](u64 old) { return old + v; }); }
float atomic_add(float* p, float v) { return atomic(p, SITE, [v](float old) { return old + v; }); }
u32 atomic_max(u32* p, u32 v) { return atomic(p, SITE, [v](u32 old) { return old > v ? old : v; }); }
u64 atomic_max(u64* p, u64 v) { return atomic(p, SITE, [v](u64 old) { return old > v ? old : v; }); }

// ---- cp.async: the copy happens as late as it may, at the wait -----------------------------------------------------

void cp_async16(void* shared, const void* global) {
    const PendingCopy copy{static_cast<char*>(shared), static_cast<const char*>(global), 16};
    start_copy(*current, copy, SITE);
    current->open_group.push_back(copy);
}

void cp_async16_zero_fill(void* shared, const void* global, int bytes) {
    if (bytes < 0 || bytes > 16) fail(*current, SITE, "cp.async of %d bytes", bytes);
    const PendingCopy copy{static_cast<char*>(shared), static_cast<const char*>(global), bytes};
    start_copy(*current, copy, SITE);
    current->open_group.push_back(copy);
}

void cp_async_commit() {
    current->groups.push_back(std::move(current->open_group));
    current->open_group.clear();
}

void emulated_cp_async_wait(int pending) {
    auto& groups = current->groups;
    while (groups.size() > static_cast<size_t>(pending)) {
        for (const PendingCopy& copy : groups.front()) finish_copy(*current, copy);
        groups.erase(groups.begin());
    }
}

// ---- ldmatrix ------------------------------------------------------------------------------------------------------

namespace {

struct LoadMatrixOperand {
    u32* registers;
    const void* row;
    int matrices;
    bool transposed;
    const void* site;
};

void load_matrix_work(void* const* operands, int first_thread) {
    const auto at = [&](int lane) { return static_cast<const LoadMatrixOperand*>(operands[lane]); };
    const int matrices = at(0)->matrices;
    for (int lane = 0; lane < 8 * matrices; ++lane) {
        check_access(thread_at(first_thread + lane), at(lane)->row, 16, 16, Access::kRead, at(lane)->site);
    }
    for (int m = 0; m < matrices; ++m) {
        u16 element[8][8];
        for (int row = 0; row < 8; ++row) memcpy(element[row], at(8 * m + row)->row, 16);
        for (int lane = 0; lane < kWarp; ++lane) {
            const int major = lane / 4, minor = 2 * (lane % 4);
            const u32 low = at(lane)->transposed ? element[minor][major] : element[major][minor];
            const u32 high = at(lane)->transposed ? element[minor + 1][major] : element[major][minor + 1];
            at(lane)->registers[m] = low | high << 16;
        }
    }
}

}  // namespace

void emulated_ldmatrix(u32* r, int matrices, bool transposed, const void* row, int line) {
    LoadMatrixOperand operand{r, row, matrices, transposed, SITE};
    warp_operation(WarpOp::kLoadMatrix, &operand, load_matrix_work, line, SITE);
}

// ---- mma -----------------------------------------------------------------------------------------------------------

namespace {

template <typename D>
struct MmaOperand {
    D* d;
    const u32* a;
    const u32* b;
};

template <typename T>
float element16(u32 word, int half) {
    return to_float(T{static_cast<u16>(word >> (16 * half))});
}

// d[i][j] += sum over k of a[i][k] b[k][j], all lanes' fragments gathered first.
template <typename T>
void mma16816_work(void* const* operands, int) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const auto& own = *static_cast<const MmaOperand<float>*>(operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = element16<T>(own.a[i], half);
            for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + half][g] = element16<T>(own.b[i], half);
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        float* d = static_cast<const MmaOperand<float>*>(operands[lane])->d;
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            d[i] += sum;
        }
    }
}

void mma16832_work(void* const* operands, int) {
    int a[16][32], b[32][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const auto& own = *static_cast<const MmaOperand<int>*>(operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int byte = 0; byte < 4; ++byte) {
            for (int i = 0; i < 4; ++i) {
                a[g + 8 * (i % 2)][4 * t + 16 * (i / 2) + byte] = static_cast<s8>(own.a[i] >> (8 * byte));
            }
            for (int i = 0; i < 2; ++i) b[4 * t + 16 * i + byte][g] = static_cast<s8>(own.b[i] >> (8 * byte));
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        int* d = static_cast<const MmaOperand<int>*>(operands[lane])->d;
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            for (int k = 0; k < 32; ++k) d[i] += a[g + 8 * (i / 2)][k] * b[k][2 * t + i % 2];
        }
    }
}

}  // namespace

template <>
void mma16816<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], int line) {
    MmaOperand<float> operand{d, a, b};
    warp_operation(WarpOp::kMma, &operand, mma16816_work<f16>, line, SITE);
}
template <>
void mma16816<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], int line) {
    MmaOperand<float> operand{d, a, b};
    warp_operation(WarpOp::kMma, &operand, mma16816_work<bf16>, line, SITE);
}
void mma16832_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], int line) {
    MmaOperand<int> operand{d, a, b};
    warp_operation(WarpOp::kMma, &operand, mma16832_work, line, SITE);
}

// ---- conversions and packed arithmetic: rounded once, to nearest even ----------------------------------------------

float fast_exp2(float v) {
    const float r = std::exp2(v);
    return std::fabs(r) < 1.17549435e-38f ? 0.0f : r;  // the instruction flushes subnormals
}

int round_to_int(float v) {
    if (v != v) return 0;
    if (v >= 2147483648.0f) return 2147483647;
    if (v <= -2147483648.0f) return -2147483647 - 1;
    return static_cast<int>(std::nearbyint(v));
}

namespace {

struct HalfTable {
    float value[1 << 16];
    HalfTable() {
        for (u32 bits = 0; bits < 1 << 16; ++bits) {
            const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
            float magnitude = exponent ? std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25)
                                       : std::ldexp(static_cast<float>(mantissa), -24);
            if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
            value[bits] = bits & 0x8000 ? -magnitude : magnitude;
        }
    }
};
const HalfTable half_table;

}  // namespace

float emulated_from_f16(u16 bits) { return half_table.value[bits]; }

namespace {

// A value in extended precision, where a product and a sum of 16-bit floats are exact, to f16.
u16 round_to_f16(long double v) {
    const u16 sign = std::signbit(v) ? 0x8000 : 0;
    if (v != v) return 0x7fff;
    const long double magnitude = std::fabs(v);
    if (magnitude >= 65520.0L) return sign | 0x7c00;
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int step = magnitude && exponent > -13 ? exponent - 11 : -24;  // 11 significant bits; 2^-24 below 2^-14
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -step)));
    return static_cast<u16>(sign | (step == -24 ? units : units + ((step + 24) << 10)));
}

// bf16's exponents are float's: cut 16 bits from the float at the right side of the exact value.
u16 round_to_bf16(long double v) {
    if (v != v) return 0x7fff;
    float f = static_cast<float>(v);
    u32 bits = float_to_bits(f);
    // A float that is itself rounded onto a tie must remember on which side of it the value lies.
    if ((bits & 0xffffu) == 0x8000u && static_cast<long double>(f) != v) {
        const bool away = std::fabs(v) > std::fabs(static_cast<long double>(f));
        bits = away ? bits + 1 : bits - 1;
    }
    if ((bits & 0x7f800000u) == 0x7f800000u) return static_cast<u16>(bits >> 16);
    return static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// a + b, one unit off towards the exact value when that is not representable: a later rounding then sees no false tie.
long double sum_without_ties(long double a, long double b) {
    const long double sum = a + b, from_b = sum - a;
    const long double lost = (a - (sum - from_b)) + (b - from_b);
    if (!std::isfinite(sum) || lost == 0) return sum;
    return std::nextafter(sum, lost > 0 ? INFINITY : -INFINITY);
}

template <typename T, typename Round>
u32 packed(u32 a, u32 b, u32 c, Round round) {
    u32 r = 0;
    for (int half = 0; half < 2; ++half) {
        const long double product = static_cast<long double>(element16<T>(a, half)) * element16<T>(b, half);
        r |= static_cast<u32>(round(sum_without_ties(product, element16<T>(c, half)))) << (16 * half);
    }
    return r;
}

}  // namespace

u16 emulated_to_f16(float v) {
    const u32 sign = float_to_bits(v) >> 16 & 0x8000u;
    u32 magnitude = float_to_bits(v) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return static_cast<u16>(sign | 0x7c00u);  // 65520 and beyond
    if (magnitude < 0x38800000u) {
        // Below 2^-14 the step is 2^-24, the last bit of a float in [0.5, 1).
        return static_cast<u16>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<u16>(sign | ((magnitude >> 13) - (112u << 10)));
}
u16 emulated_to_bf16(float v) { return round_to_bf16(v); }
template <>
u32 packed_fma<f16>(u32 a, u32 b, u32 c) {
    return packed<f16>(a, b, c, round_to_f16);
}
template <>
u32 packed_fma<bf16>(u32 a, u32 b, u32 c) {
    return packed<bf16>(a, b, c, round_to_bf16);
}
template <>
u32 packed_sub<f16>(u32 a, u32 b) {
    return packed<f16>(b, 0xbc00bc00u, a, round_to_f16);
}
template <>
u32 packed_sub<bf16>(u32 a, u32 b) {
    return packed<bf16>(b, 0xbf80bf80u, a, round_to_bf16);
}

}  // namespace llmctl
