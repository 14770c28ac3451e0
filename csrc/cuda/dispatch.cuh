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

// The workspace of a split scan: a ticket, then a message and, where alpha's gradient is wanted,
// the sums of each tile of each row.
class SplitWorkspace {
 public:
  SplitWorkspace(const Scan& scan, const Plan& plan, int64_t rows_per_block)
      : sums_at_(kMessages + plan.blocks * rows_per_block * sizeof(Message)),
        end_(sums_at_ +
             (wants_gradient(scan) ? plan.blocks * rows_per_block * sizeof(AlphaSums) : 0)) {}

  Workspace size() const { return {end_, sums_at_}; }
  static unsigned long long* ticket(void* at) { return static_cast<unsigned long long*>(at); }
  static Message* messages(void* at) {
    return reinterpret_cast<Message*>(static_cast<char*>(at) + kMessages);
  }
  AlphaSums* sums(void* at) const {
    return reinterpret_cast<AlphaSums*>(static_cast<char*>(at) + sums_at_);
  }

 private:
  static constexpr int64_t kMessages = sizeof(Message);
  int64_t sums_at_, end_;
};

template <class Storage>
struct Dispatch {
  static Workspace workspace(const Scan& scan, const Plan& plan) {
    return is_split(plan) ? SplitWorkspace(scan, plan, rows_per_block(plan)).size() : Workspace{};
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
  static bool is_split(const Plan& plan) {
    return plan.strategy == Strategy::kSplitRows || plan.strategy == Strategy::kSplitLanes;
  }
  static int64_t rows_per_block(const Plan& plan) {
    if (plan.strategy == Strategy::kSplitRows) return 1;
    return plan.columns * (plan.aligned ? Chunk<Storage>::kSamples : 1);
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
        return launch<RowTiles<Storage, 8, kAligned, kGradient>>(grid, {scan});
      case 32:
        return launch<RowTiles<Storage, 32, kAligned, kGradient>>(grid, {scan});
      default:
        return launch<RowTiles<Storage, kBlockThreads, kAligned, kGradient>>(grid, {scan});
    }
  }

  template <bool kAligned, bool kGradient>
  static cudaError_t split_rows(const Scan& scan, const Plan& plan, void* workspace,
                                cudaStream_t stream) {
    using Kernel = SplitRows<Storage, kAligned, kGradient>;
    const SplitWorkspace parts(scan, plan, rows_per_block(plan));
    const typename Kernel::Arguments arguments{scan, plan.tiles, parts.ticket(workspace),
                                               parts.messages(workspace), parts.sums(workspace)};
    const cudaError_t error = launch<Kernel>({plan.blocks, stream}, arguments);
    if constexpr (kGradient)
      if (error == cudaSuccess)
        return launch<SplitSums<Storage, kAligned>>({scan.rows, stream}, arguments);
    return error;
  }

  template <bool kAligned, bool kGradient>
  static cudaError_t lanes(const Scan& scan, const Plan& plan, void* workspace,
                           cudaStream_t stream) {
    using Kernel = Lanes<Storage, kAligned, kGradient>;
    const bool split = is_split(plan);
    const SplitWorkspace parts(scan, plan, rows_per_block(plan));
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
