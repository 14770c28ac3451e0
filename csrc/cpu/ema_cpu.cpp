// The operators of ops.cpp on the CPU: how entries.h runs a Problem and a Sum here.

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/level.h"
#include "cpu/strategy.h"
#include "cpu/sum_blocks.h"
#include "cpu/tuning.h"
#include "entries.h"

namespace ema_ext::cpu {
namespace {

const Kernels& kernels_for(Dtype dtype) {
  static const Kernels* const table = level() == Level::kV4   ? kKernelsX86_64V4
                                      : level() == Level::kV3 ? kKernelsX86_64V3
                                                              : kKernelsX86_64;
  return table[static_cast<int>(dtype)];
}

// Calls f(begin, end) over [0, items) on torch's threads, in this thread alone if there is little.
template <class F>
void parallel(int64_t items, int64_t samples_per_item, const F& f) {
  const int64_t grain = (kGrainSamples + samples_per_item - 1) / samples_per_item;
  if (items <= grain)
    f(0, items);
  else
    torch::stable::parallel_for(0, items, grain, f);
}

// Each of `threads` scans one stretch of segments, begin(0) to begin(1) and so on; but a stretch
// that begins within a row needs the aggregates of what lies before it in that row. The others find
// them, each those of the stretch before its own, while the first one scans the head, whose start
// is known. With a head of q * kAggregateCost segments and stretches of q both phases are even.
void run_cut(const Problem& problem, const Kernels& kernels, const Plan& plan, int threads) {
  const std::unique_ptr<SegmentEnd[]> ends(new SegmentEnd[plan.items]);
  const std::unique_ptr<Carry[]> aggregates(new Carry[plan.items]);
  const int64_t count = plan.items / problem.rows;
  const int64_t stretches = std::min<int64_t>(threads, plan.items);
  const int64_t head =
      problem.rows < stretches
          ? static_cast<int64_t>(plan.items * kAggregateCost / (stretches + kAggregateCost))
          : 0;
  const auto begin = [&](int64_t i) { return head + (plan.items - head) * i / stretches; };
  const auto scan = [&](int64_t from, int64_t to) {
    kernels.scan_segments(problem, from, to, aggregates.get(), ends.get());
  };
  torch::stable::parallel_for(0, stretches, 1, [&](int64_t i, int64_t last) {
    for (; i < last; ++i) {
      if (i == 0) {
        scan(0, head);
        for (int64_t item = 0; item < head; ++item) aggregates[item] = ends[item].aggregate;
      } else {
        const int64_t row = begin(i) / count * count;
        kernels.find_aggregates(problem, std::max(begin(i - 1), row), begin(i), aggregates.get());
      }
    }
  });
  torch::stable::parallel_for(0, stretches, 1, [&](int64_t i, int64_t last) {
    for (; i < last; ++i) scan(begin(i), begin(i + 1));
  });
  kernels.finish_rows(problem, 0, problem.rows, ends.get());
}

void run_varying_cut(const Problem& problem, const Kernels& kernels, const Plan& plan) {
  const std::unique_ptr<Affine[]> maps(new Affine[plan.items]);
  const std::unique_ptr<double[]> before(new double[plan.items]);
  parallel(plan.items, plan.samples_per_item,
           [&](int64_t begin, int64_t end) { kernels.find_maps(problem, begin, end, maps.get()); });
  kernels.fold_maps(problem, 0, problem.rows, maps.get(), before.get());
  parallel(plan.items, plan.samples_per_item, [&](int64_t begin, int64_t end) {
    kernels.scan_varying_segments(problem, begin, end, before.get(), maps.get());
  });
  kernels.finish_varying_rows(problem, 0, problem.rows, before.get(), maps.get());
}

// Asks for huge pages under a large output that has just been mapped and not yet been touched.
void advise_huge_pages(const Problem& problem) {
  const int64_t bytes = problem.rows * problem.length * bytes_of(problem.y.dtype);
  if (bytes < kHugePageBytes) return;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  int64_t low = std::min<int64_t>(0, problem.y.time_stride * (problem.length - 1));
  const auto data = reinterpret_cast<uintptr_t>(problem.y.data) + low * bytes_of(problem.y.dtype);
  const uintptr_t first = (data + kPage - 1) / kPage * kPage, last = (data + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

auto scan_of(const Kernels& kernels, Strategy strategy) {
  switch (strategy) {
    case Strategy::kVaryingRows:
      return kernels.scan_varying_rows;
    case Strategy::kVaryingLanes:
      return kernels.scan_varying_lanes;
    case Strategy::kLanes:
      return kernels.scan_lanes;
    default:
      return kernels.scan_rows;
  }
}

void run(Problem& problem) {
  if (problem.rows == 0 || problem.length == 0) return;
  const Kernels& kernels = kernels_for(problem.x.dtype);
  uint32_t threads = 1;
  if (problem.rows * problem.length > kGrainSamples) {
    threads = torch::stable::get_num_threads();
    advise_huge_pages(problem);
  }
  const Plan plan = make_plan(problem, static_cast<int>(threads));
  if (plan.strategy == Strategy::kCut)
    return run_cut(problem, kernels, plan, static_cast<int>(threads));
  if (plan.strategy == Strategy::kVaryingCut) return run_varying_cut(problem, kernels, plan);
  const auto scan = scan_of(kernels, plan.strategy);
  parallel(plan.items, plan.samples_per_item,
           [&](int64_t begin, int64_t end) { scan(problem, begin, end); });
}

void sum(const Sum& sum) {
  if (sum.kept.elements == 0) return;
  const int64_t chunks = sum_chunks(sum), blocks = sum_blocks(sum);
  const std::unique_ptr<double[]> partials(new double[chunks * sum.kept.elements]);
  const int64_t terms = sum.kept.elements * sum.summed.elements;
  const int64_t items = blocks * chunks;
  parallel(items, items > 0 ? terms / items + 1 : 1, [&](int64_t begin, int64_t end) {
    kernels_for(sum.from_dtype).sum_terms(sum, begin, end, partials.get());
  });
  parallel(sum.kept.elements, chunks + 1, [&](int64_t begin, int64_t end) {
    kernels_for(sum.to_dtype).finish_sums(sum, begin, end, partials.get());
  });
}

}  // namespace

struct Backend {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void run(Problem& problem) { cpu::run(problem); }
  static void sum(const Sum& sum) { cpu::sum(sum); }
};

}  // namespace ema_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(ema_ext, CPU, m) { ema_ext::register_entries<ema_ext::cpu::Backend>(m); }
