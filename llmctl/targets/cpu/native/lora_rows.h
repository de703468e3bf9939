// The rows of a step by the adapters that they have.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace llmctl {

constexpr int kLoraRows = 4;
constexpr int64_t kWindow = 32;  // rows whose adapters are grouped: those that meet a tile of weights at once

// Rows that have one adapter: indices [begin, begin + count) of AdapterRows::rows.
struct AdapterTile {
  int32_t slot, begin, count;
};

// The rows of a step that have adapters, grouped.
struct AdapterRows {
  std::vector<int32_t> rows;
  std::vector<AdapterTile> tiles;
  std::vector<size_t> windows;  // the first tile of each window, and their end

  // slots: of every row of the step, -1 for none.
  void group(const int32_t* slots, int64_t count) {
    rows.clear();
    tiles.clear();
    windows.clear();
    for (int64_t first = 0; first < count; first += kWindow) {
      const size_t begin = rows.size();
      windows.push_back(tiles.size());
      for (int64_t row = first; row < std::min(first + kWindow, count); row++)
        if (slots[row] >= 0) rows.push_back(int32_t(row));
      std::stable_sort(rows.begin() + int64_t(begin), rows.end(), [&](int32_t a, int32_t b) { return slots[a] < slots[b]; });
      for (size_t i = begin; i < rows.size(); i++) {
        const int32_t slot = slots[rows[i]];
        if (tiles.size() == windows.back() || tiles.back().slot != slot || tiles.back().count == kLoraRows)
          tiles.push_back({slot, int32_t(i), 0});
        tiles.back().count++;
      }
    }
    windows.push_back(tiles.size());
  }
};

}  // namespace llmctl
