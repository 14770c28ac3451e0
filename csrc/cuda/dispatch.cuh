// From a Plan to the kernel's template arguments, for one dtype.
#pragma once

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/lanes.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_tiles.cuh"
#include "cuda/split_rows.cuh"
#include "cuda/sum_terms.cuh"
#include "cuda/varying.cuh"

namespace ema_ext::cuda {

inline bool wants_gradient(const Scan& scan) { return scan.grad_coefficient.data != nullptr; }

// The workspace of a split scan: a ticket, messages, what is known of each row and, where alpha's
// gradient is wanted, the sums of each tile of each row.
class SplitWorkspace {
 public:
  SplitWorkspace(const Scan& scan, int64_t tiles, int64_t messages, int64_t team_bytes,
                 int64_t sum_bytes = sizeof(AlphaSums))
      : teams_at_(kMessages + messages * static_cast<int64_t>(sizeof(Message))),
        sums_at_(teams_at_ + scan.rows * team_bytes),
        ends_at_(sums_at_ + (wants_gradient(scan) ? tiles * sum_bytes : 0)),
        end_(ends_at_ +
             (wants_gradient(scan) && team_bytes > 0 ? scan.rows * sizeof(AlphaSums) : 0)) {}

  Workspace size() const { return {end_, sums_at_}; }
  static unsigned long long* ticket(void* at) { return static_cast<unsigned long long*>(at); }
  static Message* messages(void* at) {
    return reinterpret_cast<Message*>(static_cast<char*>(at) + kMessages);
  }
  template <class T>
  T* teams(void* at) const {
    return reinterpret_cast<T*>(static_cast<char*>(at) + teams_at_);
  }
  template <class T = AlphaSums>
  T* sums(void* at) const {
    return reinterpret_cast<T*>(static_cast<char*>(at) + sums_at_);
  }
  AlphaSums* ends(void* at) const {
    return reinterpret_cast<AlphaSums*>(static_cast<char*>(at) + ends_at_);
  }

 private:
  static constexpr int64_t kMessages = sizeof(Message);
  int64_t teams_at_, sums_at_, ends_at_, end_;
};

inline bool is_split_varying(const Plan& plan) {
  return plan.strategy == Strategy::kSplitVaryingRows ||
         plan.strategy == Strategy::kSplitVaryingColumns;
}
inline bool is_varying(const Plan& plan) {
  return is_split_varying(plan) || plan.strategy == Strategy::kVaryingRows ||
         plan.strategy == Strategy::kVaryingColumns;
}

// The same of a split varying scan: where its gradient is a sum over time, one float64 per tile.
class VaryingWorkspace {
 public:
  VaryingWorkspace(const Scan& scan, const Plan& plan)
      : sums_at_(kMessages +
                 plan.blocks * rows_per_block(plan) * static_cast<int64_t>(sizeof(TileMessage))),
        end_(sums_at_ + (sums_over_time(scan) ? scan.rows * plan.tiles * 8 : 0)) {}

  Workspace size() const { return {end_, sums_at_, sums_over_time_at()}; }
  static unsigned long long* ticket(void* at) { return static_cast<unsigned long long*>(at); }
  static TileMessage* messages(void* at) {
    return reinterpret_cast<TileMessage*>(static_cast<char*>(at) + kMessages);
  }
  double* sums(void* at) const {
    return reinterpret_cast<double*>(static_cast<char*>(at) + sums_at_);
  }

 private:
  static bool sums_over_time(const Scan& scan) {
    return wants_gradient(scan) && !scan.varying && is_adjoint(scan.op);
  }
  static int64_t rows_per_block(const Plan& plan) {
    return plan.strategy == Strategy::kSplitVaryingColumns ? kWarp : 1;
  }
  int64_t sums_over_time_at() const { return end_ > sums_at_ ? sums_at_ : 0; }

  static constexpr int64_t kMessages = sizeof(Message);
  int64_t sums_at_, end_;
};

template <class Storage>
struct Dispatch {
  static Workspace workspace(const Scan& scan, const Plan& plan) {
    switch (plan.strategy) {
      case Strategy::kSplitRows:
        return split_rows_workspace(scan, plan).size();
      case Strategy::kSplitLanes:
        return split_lanes_workspace(scan, plan).size();
      case Strategy::kSplitVaryingRows:
      case Strategy::kSplitVaryingColumns:
        return VaryingWorkspace(scan, plan).size();
      default:
        return {};
    }
  }

  static cudaError_t scan(const Scan& scan, const Plan& plan, void* workspace,
                          cudaStream_t stream) {
    if (is_varying(plan))
      return is_adjoint(scan.op) ? varying<true>(scan, plan, workspace, stream)
                                 : varying<false>(scan, plan, workspace, stream);
    return plan.aligned ? scan_as<true>(scan, plan, workspace, stream)
                        : scan_as<false>(scan, plan, workspace, stream);
  }

  static cudaError_t sum(const Sum& sum, int64_t chunks, bool along_terms, cudaStream_t stream) {
    return along_terms ? sum_by<SumAlongTerms<Storage>>(sum, chunks, 1, stream)
                       : sum_by<SumAlongResults<Storage>>(sum, chunks, kWarp, stream);
  }

 private:
  // What is known of a split row, where most is.
  template <bool kAligned, bool kGradient>
  static constexpr int64_t kTeamOf =
      sizeof(typename SplitRows<Tiling<Storage, kBlockThreads, kAligned, kGradient>>::Team);
  static constexpr int64_t kTeamBytes = std::max(
      {kTeamOf<true, true>, kTeamOf<true, false>, kTeamOf<false, true>, kTeamOf<false, false>});
  static SplitWorkspace split_rows_workspace(const Scan& scan, const Plan& plan) {
    return {scan, plan.blocks, plan.blocks + scan.rows, kTeamBytes, sizeof(TileSums)};
  }
  static SplitWorkspace split_lanes_workspace(const Scan& scan, const Plan& plan) {
    const int64_t rows = plan.columns * (plan.aligned ? Chunk<Storage>::kSamples : 1);
    const int64_t tiles = plan.blocks * rows;
    return {scan, tiles, tiles * Lanes<Storage, true, true, true>::kMessages, 0};
  }

  template <bool kAligned>
  static cudaError_t scan_as(const Scan& scan, const Plan& plan, void* workspace,
                             cudaStream_t stream) {
    return wants_gradient(scan) ? scan_as<kAligned, true>(scan, plan, workspace, stream)
                                : scan_as<kAligned, false>(scan, plan, workspace, stream);
  }

  template <bool kAligned, bool kGradient>
  static cudaError_t scan_as(const Scan& scan, const Plan& plan, void* workspace,
                             cudaStream_t stream) {
    switch (plan.strategy) {
      case Strategy::kRows:
        return rows<kAligned, kGradient>(scan, plan, stream);
      case Strategy::kSplitRows:
        return split_rows<kAligned, kGradient>(scan, plan, workspace, stream);
      case Strategy::kLanes:
      case Strategy::kSplitLanes:
        return lanes<kAligned, kGradient>(scan, plan, workspace, stream);
      default:
        return cudaErrorInvalidValue;
    }
  }

  template <bool kAligned, bool kGradient>
  static cudaError_t rows(const Scan& scan, const Plan& plan, cudaStream_t stream) {
    const Grid grid{plan.blocks, stream};
    switch (plan.team) {
      case 8:
        return launch<RowTiles<Tiling<Storage, 8, kAligned, kGradient>>>(grid, {scan});
      case 32:
        return launch<RowTiles<Tiling<Storage, 32, kAligned, kGradient>>>(grid, {scan});
      default:
        return launch<RowTiles<Tiling<Storage, kBlockThreads, kAligned, kGradient>>>(grid, {scan});
    }
  }

  template <bool kAligned, bool kGradient>
  static cudaError_t split_rows(const Scan& scan, const Plan& plan, void* workspace,
                                cudaStream_t stream) {
    using T = Tiling<Storage, kBlockThreads, kAligned, kGradient>;
    using Kernel = SplitRows<T>;
    static_assert(sizeof(typename Kernel::Team) <= kTeamBytes);
    const SplitWorkspace parts = split_rows_workspace(scan, plan);
    const typename Kernel::Arguments arguments{
        scan,
        plan.tiles,
        parts.ticket(workspace),
        parts.messages(workspace),
        parts.template teams<Uninitialized<typename Kernel::Team>>(workspace),
        parts.template sums<TileSums>(workspace),
        parts.ends(workspace)};
    cudaError_t error = launch<SplitHeads<T>>({(scan.rows + kWarp - 1) / kWarp, stream}, arguments);
    if (error == cudaSuccess)
      error = launch<Kernel>({std::min(plan.blocks, kSplitBlocks), stream}, arguments);
    if constexpr (kGradient)
      if (error == cudaSuccess) error = launch<SplitSums<T>>({scan.rows, stream}, arguments);
    return error;
  }

  template <bool kAligned, bool kGradient>
  static cudaError_t lanes(const Scan& scan, const Plan& plan, void* workspace,
                           cudaStream_t stream) {
    const int slots = kBlockThreads / plan.columns;
    if (plan.strategy == Strategy::kLanes)
      return launch<Lanes<Storage, kAligned, kGradient, false>>(
          {plan.blocks, stream},
          {scan, plan.columns, slots, plan.tiles, nullptr, nullptr, nullptr});
    using Kernel = Lanes<Storage, kAligned, kGradient, true>;
    const SplitWorkspace parts = split_lanes_workspace(scan, plan);
    const typename Kernel::Arguments arguments{scan,
                                               plan.columns,
                                               slots,
                                               plan.tiles,
                                               parts.ticket(workspace),
                                               parts.messages(workspace),
                                               parts.sums(workspace)};
    const cudaError_t error = launch<Kernel>({plan.blocks, stream}, arguments);
    if constexpr (kGradient)
      if (error == cudaSuccess)
        return launch<LaneSums<Storage, kAligned>>(
            {(scan.rows + kBlockThreads - 1) / kBlockThreads, stream}, arguments);
    return error;
  }

  template <class S, int kTeam, int kItems>
  using Forward = AlignedRows<S, kTeam, kItems, false>;
  template <class S, int kTeam, int kItems>
  using Backward = AlignedRows<S, kTeam, kItems, true>;

  template <bool kAdjoint>
  static cudaError_t varying(const Scan& scan, const Plan& plan, void* workspace,
                             cudaStream_t stream) {
    using Side =
        Columns<Storage, varying_items(sizeof(typename Storage::Sample), false, kAdjoint, false)>;
    switch (plan.strategy) {
      case Strategy::kVaryingColumns:
        return varying_by<Side, kAdjoint, false>(scan, plan, workspace, stream);
      case Strategy::kSplitVaryingColumns:
        return varying_by<Side, kAdjoint, true>(scan, plan, workspace, stream);
      default:
        if (!plan.aligned)
          return varying_rows<AnyRows, false, kAdjoint>(scan, plan, workspace, stream);
        return scan.x.time_stride < 0
                   ? varying_rows<Backward, true, kAdjoint>(scan, plan, workspace, stream)
                   : varying_rows<Forward, true, kAdjoint>(scan, plan, workspace, stream);
    }
  }

  template <template <class, int, int> class Rows, bool kAligned, bool kAdjoint>
  static cudaError_t varying_rows(const Scan& scan, const Plan& plan, void* workspace,
                                  cudaStream_t stream) {
    constexpr int64_t kBytes = sizeof(typename Storage::Sample);
    constexpr int kItems = varying_items(kBytes, kAligned, kAdjoint, false);
    constexpr int kSplitItems = varying_items(kBytes, kAligned, kAdjoint, true);
    if (is_split_varying(plan))
      return varying_by<Rows<Storage, kBlockThreads, kSplitItems>, kAdjoint, true>(
          scan, plan, workspace, stream);
    switch (plan.team) {
      case 8:
        return varying_by<Rows<Storage, 8, kItems>, kAdjoint, false>(scan, plan, workspace, stream);
      case 32:
        return varying_by<Rows<Storage, 32, kItems>, kAdjoint, false>(scan, plan, workspace,
                                                                      stream);
      default:
        return varying_by<Rows<Storage, kBlockThreads, kItems>, kAdjoint, false>(scan, plan,
                                                                                 workspace, stream);
    }
  }

  template <class Moves, bool kAdjoint, bool kSplit>
  static cudaError_t varying_by(const Scan& scan, const Plan& plan, void* workspace,
                                cudaStream_t stream) {
    using Kernel = Varying<Storage, Moves, kAdjoint, kSplit>;
    typename Kernel::Arguments arguments{scan, plan.tiles, nullptr, nullptr, nullptr};
    if constexpr (kSplit) {
      const VaryingWorkspace parts(scan, plan);
      arguments.ticket = parts.ticket(workspace);
      arguments.messages = parts.messages(workspace);
      arguments.sums = parts.sums(workspace);
    }
    const int64_t blocks = kSplit ? std::min(plan.blocks, kSplitBlocks) : plan.blocks;
    return launch<Kernel>({blocks, stream}, arguments);
  }

  template <class Kernel>
  static cudaError_t sum_by(const Sum& sum, int64_t chunks, int64_t results_per_item,
                            cudaStream_t stream) {
    const int64_t items = (sum.kept.elements + results_per_item - 1) / results_per_item * chunks;
    const int64_t blocks = (items + Kernel::kItems - 1) / Kernel::kItems;
    return launch<Kernel>({blocks < kSumBlocks ? blocks : kSumBlocks, stream}, {sum, chunks});
  }
};

template <class Storage>
constexpr Kernels kKernelsOf = {Dispatch<Storage>::workspace, Dispatch<Storage>::scan,
                                Dispatch<Storage>::sum};

}  // namespace ema_ext::cuda
