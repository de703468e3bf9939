// AMX: eight tile registers of up to 16 rows of 64 bytes, and products of int8 tiles summed in 32 bits. The instructions
// are written as asm: compilers differ in what their intrinsics tell the optimiser about memory.
//
// LLMCTL_EMULATE_AMX with avx512vnni's flags takes the branches of the variant amx with software in place of its
// instructions: for tests, slow.
#pragma once
#include <cerrno>
#include <cstdio>
#include <type_traits>

#include "simd.h"

#if defined(LLMCTL_AVX512_BF16) && (defined(__AMX_INT8__) || defined(LLMCTL_EMULATE_AMX))
#define LLMCTL_AMX 1
#endif
#if defined(LLMCTL_AMX) && !defined(LLMCTL_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llmctl {

constexpr int64_t kTileRows = 16, kTileBytes = 64;  // of a row

#if defined(LLMCTL_AMX)
constexpr bool kTilesCompiled = true;
#else
constexpr bool kTilesCompiled = false;
#endif

// Whether this process may use tiles, and why not. The system must be asked: a thread's tiles take 8 KiB of its signal
// frames. What it grants holds for all threads and for forks, not beyond an exec.
struct TilePermission {
  bool granted;
  char refusal[160];
};

static inline TilePermission ask_for_tiles() {
  TilePermission answer{kTilesCompiled, ""};
#if defined(LLMCTL_AMX) && !defined(LLMCTL_EMULATE_AMX)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    const char* why = errno == ENOSPC ? "a thread's alternative signal stack is below AT_MINSIGSTKSZ" : std::strerror(errno);
    answer.granted = false;
    std::snprintf(answer.refusal, sizeof answer.refusal, "AMX: the system refused the use of tiles: %s", why);
  }
#endif
  return answer;
}

// Asked once, when the library is loaded.
static const TilePermission tile_permission = ask_for_tiles();
static inline bool have_tiles() { return kTilesCompiled && tile_permission.granted; }

#if defined(LLMCTL_AMX)
// The operand of ldtilecfg: shapes of the eight tiles.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = uint8_t(tile_rows);
    row_bytes[tile] = uint16_t(bytes);
  }
};

#if defined(LLMCTL_EMULATE_AMX)
// As Intel's manual describes the instructions (SDM vol. 2, LDTILECFG to TILEZERO); where they would fault, a trap.
struct EmulatedTiles {
  TileShapes shapes;
  uint8_t data[8][kTileRows][kTileBytes];
  bool configured = false;
};
static thread_local EmulatedTiles emulated_tiles;

static inline EmulatedTiles& tiles_in_use() {
  if (!emulated_tiles.configured) __builtin_trap();
  return emulated_tiles;
}
static inline void configure_tiles(const TileShapes& shapes) {
  EmulatedTiles& state = emulated_tiles;
  if (shapes.palette > 1 || shapes.start_row) __builtin_trap();
  for (const uint8_t byte : shapes.reserved)
    if (byte) __builtin_trap();
  for (int t = 0; t < 16; t++) {
    const bool unused = shapes.rows[t] == 0 && shapes.row_bytes[t] == 0;
    if (t < 8 ? shapes.rows[t] > kTileRows || shapes.row_bytes[t] > kTileBytes || (!shapes.rows[t]) != (!shapes.row_bytes[t])
              : !unused)
      __builtin_trap();
  }
  state.shapes = shapes;
  state.configured = shapes.palette == 1;
  std::memset(state.data, 0, sizeof state.data);
}
static inline void release_tiles() {
  emulated_tiles.configured = false;
  emulated_tiles.shapes = {};
  std::memset(emulated_tiles.data, 0, sizeof emulated_tiles.data);
}
template <int T>
static inline void tile_zero() {
  std::memset(tiles_in_use().data[T], 0, sizeof emulated_tiles.data[T]);
}
template <int T>
static inline void tile_load(const void* from, int64_t stride) {
  tile_zero<T>();
  EmulatedTiles& state = tiles_in_use();
  for (int r = 0; r < state.shapes.rows[T]; r++)
    std::memcpy(state.data[T][r], (const char*)from + r * stride, state.shapes.row_bytes[T]);
}
template <int T>
static inline void tile_store(void* to, int64_t stride) {
  const EmulatedTiles& state = tiles_in_use();
  for (int r = 0; r < state.shapes.rows[T]; r++)
    std::memcpy((char*)to + r * stride, state.data[T][r], state.shapes.row_bytes[T]);
}
template <class Left, class Right, int C, int A, int B>
static inline void emulate_dot() {
  EmulatedTiles& state = tiles_in_use();
  const TileShapes& shapes = state.shapes;
  if (shapes.rows[A] != shapes.rows[C] || shapes.row_bytes[B] != shapes.row_bytes[C] ||
      shapes.row_bytes[A] != 4 * shapes.rows[B] || shapes.row_bytes[C] % 4)
    __builtin_trap();
  // All n at once: columns beyond the shapes are 0 in B and C.
  for (int m = 0; m < shapes.rows[C]; m++) {
    u32x16 sum = load<u32x16>(state.data[C][m]);  // it wraps
    for (int k = 0; k < shapes.rows[B]; k++)
      for (int j = 0; j < 4; j++) {
        const u32x16 top = load<u32x16>(state.data[B][k]) << (24 - 8 * j);
        const u32x16 right = std::is_signed_v<Right> ? (u32x16)((i32x16)top >> 24) : top >> 24;
        sum += right * uint32_t(int32_t(Left(state.data[A][m][4 * k + j])));
      }
    store(state.data[C][m], sum);
  }
  for (int m = shapes.rows[C]; m < kTileRows; m++) std::memset(state.data[C][m], 0, kTileBytes);
}
#define LLMCTL_TILE_DOT(name, Left, Right, mnemonic) \
  template <int C, int A, int B>                     \
  static inline void name() {                        \
    emulate_dot<Left, Right, C, A, B>();             \
  }
#else
static inline void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }
static inline void release_tiles() { asm volatile("tilerelease" : : : "memory"); }
template <int T>
static inline __attribute__((always_inline)) void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows `stride` bytes apart.
template <int T>
static inline __attribute__((always_inline)) void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
static inline __attribute__((always_inline)) void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(stride) : "memory");
}
#define LLMCTL_TILE_DOT(name, Left, Right, mnemonic)                                                  \
  template <int C, int A, int B>                                                                      \
  static inline __attribute__((always_inline)) void name() {                                          \
    asm volatile(mnemonic " %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));                \
  }
#endif
// Tile C [m][n] of int32 += sum over k and j < 4 of tile A's byte [m][4 * k + j] * tile B's byte [k][4 * n + j].
LLMCTL_TILE_DOT(dot_signed, int8_t, int8_t, "tdpbssd")
LLMCTL_TILE_DOT(dot_with_unsigned, int8_t, uint8_t, "tdpbsud")
LLMCTL_TILE_DOT(dot_of_unsigned, uint8_t, int8_t, "tdpbusd")
#undef LLMCTL_TILE_DOT
#endif

}  // namespace llmctl
