// From a Plan to the kernel's template arguments, for one dtype.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/row_tiles.cuh"
#include "cuda/split_rows.cuh"

namespace ema_ext::cuda {

inline bool wants_gradient(const Scan& scan) { return scan.grad_coefficient.data != nullptr; }

// Where in the workspace of a split row things lie.
template <class Storage>
struct SplitWorkspace {
  int64_t messages, sums, end;

  SplitWorkspace(const Scan& scan, const Plan& plan)
      : messages(sizeof(Message)),
        sums(messages + scan.rows * plan.tiles * static_cast<int64_t>(sizeof(Message))),
        end(sums + (wants_gradient(scan) ? plan.blocks * sizeof(AlphaSums) : 0)) {}
};

template <class Storage>
struct Dispatch {
  static Workspace workspace(const Scan& scan, const Plan& plan) {
    if (plan.strategy != Strategy::kSplitRows) return {};
    const SplitWorkspace<Storage> parts(scan, plan);
    return {parts.end, parts.sums};
  }

  static cudaError_t scan(const Scan& scan, const Plan& plan, void* workspace,
                          cudaStream_t stream) {
    return plan.aligned ? scan_as<true>(scan, plan, workspace, stream)
                        : scan_as<false>(scan, plan, workspace, stream);
  }

 private:
  template <bool kAligned>
  static cudaError_t scan_as(const Scan& scan, const Plan& plan, void* workspace,
                             cudaStream_t stream) {
    return wants_gradient(scan) ? scan_as<kAligned, true>(scan, plan, workspace, stream)
                                : scan_as<kAligned, false>(scan, plan, workspace, stream);
  }

  template <bool kAligned, bool kGradient>
  static cudaError_t scan_as(const Scan& scan, const Plan& plan, void* workspace,
                             cudaStream_t stream) {
    const Grid grid{plan.blocks, stream};
    if (plan.strategy == Strategy::kSplitRows)
      return split<kAligned, kGradient>(scan, plan, static_cast<char*>(workspace), stream);
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
  static cudaError_t split(const Scan& scan, const Plan& plan, char* workspace,
                           cudaStream_t stream) {
    const SplitWorkspace<Storage> parts(scan, plan);
    const typename SplitRows<Storage, kAligned, kGradient>::Arguments arguments{
        scan, plan.tiles, reinterpret_cast<unsigned long long*>(workspace),
        reinterpret_cast<Message*>(workspace + parts.messages),
        reinterpret_cast<AlphaSums*>(workspace + parts.sums)};
    const cudaError_t error =
        launch<SplitRows<Storage, kAligned, kGradient>>({plan.blocks, stream}, arguments);
    if constexpr (kGradient) {
      if (error == cudaSuccess)
        return launch<SplitSums<Storage, kAligned>>({scan.rows, stream}, arguments);
    }
    return error;
  }
};

template <class Storage>
constexpr Kernels kKernelsOf = {Dispatch<Storage>::workspace, Dispatch<Storage>::scan};

}  // namespace ema_ext::cuda
