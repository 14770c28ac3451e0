// What a thread knows of the others: the order that barriers, __syncwarp and messages behind fences
// make among accesses. Nothing else makes one.
//
// Every thread has a clock, raised at each of these; an access has its thread's clock of the time.
// To know a thread up to a clock is to have all its accesses up to that clock behind oneself.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace cuda_executor {

constexpr int kWarp = 32;

using BlockClocks = std::shared_ptr<const std::vector<uint32_t>>;  // one for each thread

// Immutable, so that all threads of a block share one. Null stands for knowing nothing.
class Known;
using KnownPtr = std::shared_ptr<const Known>;

class Known {
 public:
  bool covers(int64_t block, int thread, uint32_t clock) const {
    const BlockClocks* clocks = find(block);
    return clocks != nullptr && (**clocks)[thread] >= clock;
  }

  // A copy in which `block` has the clocks given.
  static KnownPtr with(const KnownPtr& known, int64_t block, BlockClocks clocks) {
    auto result = known ? std::make_shared<Known>(*known) : std::make_shared<Known>();
    result->set(block, std::move(clocks));
    return result;
  }

  const BlockClocks* find(int64_t block) const {
    auto place = const_cast<Known*>(this)->lower(block);
    return place != blocks_.end() && place->first == block ? &place->second : nullptr;
  }

  static KnownPtr join(const KnownPtr& one, const KnownPtr& other) {
    if (one == other || !other) return one;
    if (!one) return other;
    std::shared_ptr<Known> result;  // made when `one` turns out not to be enough
    for (const auto& [block, clocks] : other->blocks_) {
      const BlockClocks* mine = one->find(block);
      if (mine != nullptr && (*mine == clocks || dominates(**mine, *clocks))) continue;
      if (!result) result = std::make_shared<Known>(*one);
      result->set(block, mine == nullptr ? clocks : maximum(**mine, *clocks));
    }
    return result ? result : one;
  }

 private:
  using Entry = std::pair<int64_t, BlockClocks>;

  std::vector<Entry>::iterator lower(int64_t block) {
    return std::lower_bound(blocks_.begin(), blocks_.end(), block,
                            [](const Entry& entry, int64_t b) { return entry.first < b; });
  }

  void set(int64_t block, BlockClocks clocks) {
    auto place = lower(block);
    if (place != blocks_.end() && place->first == block)
      place->second = std::move(clocks);
    else
      blocks_.insert(place, {block, std::move(clocks)});
  }

  static bool dominates(const std::vector<uint32_t>& one, const std::vector<uint32_t>& other) {
    for (size_t i = 0; i < one.size(); ++i)
      if (one[i] < other[i]) return false;
    return true;
  }

  static BlockClocks maximum(const std::vector<uint32_t>& one, const std::vector<uint32_t>& other) {
    auto result = std::make_shared<std::vector<uint32_t>>(one);
    for (size_t i = 0; i < one.size(); ++i) (*result)[i] = std::max(one[i], other[i]);
    return result;
  }

  std::vector<Entry> blocks_;  // sorted
};

// One thread's view. Lanes of its own warp come first: __syncwarp changes only these.
struct View {
  KnownPtr known;
  std::array<uint32_t, kWarp> warp{};  // its own entry is its own clock

  bool covers(int64_t block, int thread, uint32_t clock) const {
    return known && known->covers(block, thread, clock);
  }

  // All of the view in one, for a message: `first` is lane 0 of the warp.
  KnownPtr all(int64_t block, int first, int threads) const {
    const BlockClocks* before = known ? known->find(block) : nullptr;
    auto clocks = before ? std::make_shared<std::vector<uint32_t>>(**before)
                         : std::make_shared<std::vector<uint32_t>>(threads);
    for (int lane = 0; lane < kWarp && first + lane < threads; ++lane)
      (*clocks)[first + lane] = std::max((*clocks)[first + lane], warp[lane]);
    return Known::with(known, block, std::move(clocks));
  }
};

}  // namespace cuda_executor
