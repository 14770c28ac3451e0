// From a Plan to the kernel's template arguments, for one dtype.
#pragma once

#include "cuda/kernels.h"
#include "cuda/lanes.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_tiles.cuh"
#include "cuda/split_rows.cuh"
#include "cuda/sum_terms.cuh"

namespace ema_ext::cuda {

inline bool wants_gradient(const Scan& scan) { return scan.grad_coefficient.data != nullptr; }

// The workspace of a split scan: a ticket, a message of each tile of each row, what is known of
// each row and, where alpha's gradient is wanted, the sums of each tile of each row.
class SplitWorkspace {
 public:
  SplitWorkspace(const Scan& scan, int64_t messages, int64_t team_bytes)
      : teams_at_(kMessages + messages * sizeof(Message)),
        sums_at_(teams_at_ + scan.rows * team_bytes),
        end_(sums_at_ + (wants_gradient(scan) ? messages * sizeof(AlphaSums) : 0)) {}

  Workspace size() const { return {end_, sums_at_}; }
  static unsigned long long* ticket(void* at) { return static_cast<unsigned long long*>(at); }
  static Message* messages(void* at) {
    return reinterpret_cast<Message*>(static_cast<char*>(at) + kMessages);
  }
  template <class T>
  T* teams(void* at) const {
    return reinterpret_cast<T*>(static_cast<char*>(at) + teams_at_);
  }
  AlphaSums* sums(void* at) const {
    return reinterpret_cast<AlphaSums*>(static_cast<char*>(at) + sums_at_);
  }

 private:
  static constexpr int64_t kMessages = sizeof(Message);
  int64_t teams_at_, sums_at_, end_;
};

template <class Storage>
struct Dispatch {
  static Workspace workspace(const Scan& scan, const Plan& plan) {
    switch (plan.strategy) {
      case Strategy::kSplitRows:
        return split_rows_workspace(scan, plan).size();
      case Strategy::kSplitLanes:
        return split_lanes_workspace(scan, plan).size();
      default:
        return {};
    }
  }

  static cudaError_t scan(const Scan& scan, const Plan& plan, void* workspace,
                          cudaStream_t stream) {
    return plan.aligned ? scan_as<true>(scan, plan, workspace, stream)
                        : scan_as<false>(scan, plan, workspace, stream);
  }

  static cudaError_t sum(const Sum& sum, int64_t chunks, bool along_terms, cudaStream_t stream) {
    return along_terms ? sum_by<SumAlongTerms<Storage>>(sum, chunks, 1, stream)
                       : sum_by<SumAlongResults<Storage>>(sum, chunks, kWarp, stream);
  }

 private:
  // What is known of a row, where most is.
  template <bool kAligned>
  static constexpr int64_t team_bytes() {
    return sizeof(TeamRow<Tiling<Storage, kBlockThreads, kAligned, true>>) >
                   sizeof(TeamRow<Tiling<Storage, kBlockThreads, kAligned, false>>)
               ? sizeof(TeamRow<Tiling<Storage, kBlockThreads, kAligned, true>>)
               : sizeof(TeamRow<Tiling<Storage, kBlockThreads, kAligned, false>>);
  }
  static constexpr int64_t kTeamBytes =
      team_bytes<true>() > team_bytes<false>() ? team_bytes<true>() : team_bytes<false>();
  static SplitWorkspace split_rows_workspace(const Scan& scan, const Plan& plan) {
    return {scan, plan.blocks, kTeamBytes};
  }
  static SplitWorkspace split_lanes_workspace(const Scan& scan, const Plan& plan) {
    return {scan, plan.blocks * plan.columns * (plan.aligned ? Chunk<Storage>::kSamples : 1), 0};
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
    }
    return cudaErrorInvalidValue;
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
        parts.sums(workspace)};
    cudaError_t error = launch<SplitHeads<T>>({(scan.rows + kWarp - 1) / kWarp, stream}, arguments);
    if (error == cudaSuccess) error = launch<Kernel>({plan.blocks, stream}, arguments);
    if constexpr (kGradient)
      if (error == cudaSuccess) error = launch<SplitSums<T>>({scan.rows, stream}, arguments);
    return error;
  }

  template <bool kAligned, bool kGradient>
  static cudaError_t lanes(const Scan& scan, const Plan& plan, void* workspace,
                           cudaStream_t stream) {
    using Kernel = Lanes<Storage, kAligned, kGradient>;
    const bool split = plan.strategy == Strategy::kSplitLanes;
    const SplitWorkspace parts = split_lanes_workspace(scan, plan);
    const typename Kernel::Arguments arguments{scan,
                                               plan.columns,
                                               split,
                                               plan.tiles,
                                               split ? parts.ticket(workspace) : nullptr,
                                               split ? parts.messages(workspace) : nullptr,
                                               split ? parts.sums(workspace) : nullptr};
    const cudaError_t error = launch<Kernel>({plan.blocks, stream}, arguments);
    if constexpr (kGradient)
      if (split && error == cudaSuccess)
        return launch<LaneSums<Storage, kAligned>>(
            {(scan.rows + kBlockThreads - 1) / kBlockThreads, stream}, arguments);
    return error;
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
