// How a tile is shared by the threads of a team: the constants that its parts agree on.
#pragma once

#include <type_traits>

#include "cuda/storage.cuh"
#include "cuda/tuning.h"

namespace ema_ext::cuda {

template <class Storage_, int kTeam_, bool kAligned_, bool kGradient_, int kChunks_>
struct Tile {
  using Storage = Storage_;
  using Sample = typename Storage::Sample;
  using Acc = typename Storage::Acc;
  static constexpr int kTeam = kTeam_;           // threads
  static constexpr bool kAligned = kAligned_;    // samples move 16 bytes at a time
  static constexpr bool kGradient = kGradient_;  // to alpha, and so the forward's x is read as well

  static constexpr int kSamples = Chunk<Storage>::kSamples;  // of a chunk
  static constexpr int kChunks = kChunks_;                   // of a thread
  static constexpr int kItems = kChunks * kSamples;
  static constexpr int kGroup = 4;  // samples that are scanned by c itself
  static constexpr int kGroups = kItems / kGroup;
  static_assert(kItems % kGroup == 0);

  // What a stretch's share of alpha's gradient and its drop are kept in: samples of 2 bytes have
  // few enough digits for float32. And samples of which kappa is scanned by c itself.
  using Wide = std::conditional_t<sizeof(Sample) == 2, float, double>;
  static constexpr int kWeighed = sizeof(Sample) == 2 ? 16 : kGroup;

  static constexpr int kLanes = kTeam < kWarp ? kTeam : kWarp;
  static constexpr int kWarps = kTeam / kLanes;
  static constexpr bool kBlock = kWarps > 1;
  static constexpr int kSteps = kLanes == 32 ? 5 : 3;  // of a shuffled scan over the lanes
  static_assert(kLanes == 1 << kSteps && (kWarps == 1 || kWarps == kBlockWarps));
  // Whether a tile is fetched while the one before is scanned. Where a block has two tensors in
  // float64 there are no registers for that.
  static constexpr bool kAhead = !(kBlock && kGradient && sizeof(Acc) == 8);
  static constexpr int kWarpChunks = kLanes * kChunks;
  static constexpr int kTileChunks = kTeam * kChunks;
  static constexpr int kTile = kTeam * kItems;
};

// The tiles of a row that a team takes from end to end, and of one that is split over blocks.
template <class Storage, int kTeam, bool kAligned, bool kGradient>
struct Tiling : Tile<Storage, kTeam, kAligned, kGradient,
                     thread_chunks(sizeof(typename Storage::Sample), kAligned, false)> {
  using Split = Tile<Storage, kTeam, kAligned, kGradient,
                     thread_chunks(sizeof(typename Storage::Sample), kAligned, true)>;
};

}  // namespace ema_ext::cuda
