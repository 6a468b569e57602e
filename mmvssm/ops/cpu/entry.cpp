// The C interface that library.py loads: choice of the instruction set.
#include "problem.h"

#if defined(_WIN32)
#define MMVSSM_EXPORT extern "C" __declspec(dllexport)
#else
#define MMVSSM_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace mmvssm {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

static const Kernels* find(int32_t isa) {
  switch (isa) {
    case 0:
      return &baseline::kernels;
#if defined(__x86_64__)
    case 1:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                 ? &avx2::kernels
                 : nullptr;
    case 2:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl")
                 ? &avx512::kernels
                 : nullptr;
#endif
    default:
      return nullptr;
  }
}

// Stands in for torch's parallel_for where torch has none to offer.
static int32_t run_serially(int64_t begin, int64_t end, int64_t, RangeFunction function,
                            void* context) {
  function(begin, end, context);
  return 0;
}

}  // namespace mmvssm

// Lanes of the instruction set (0 baseline, 1 AVX2, 2 AVX-512), 0 if this
// machine lacks it.
MMVSSM_EXPORT int32_t mmvssm_lanes(int32_t isa) {
  const mmvssm::Kernels* kernels = mmvssm::find(isa);
  return kernels == nullptr ? 0 : kernels->lanes;
}

// Sizes of the structures, for library.py to compare with its own.
MMVSSM_EXPORT int64_t mmvssm_scan_problem_size() { return sizeof(mmvssm::ScanProblem); }
MMVSSM_EXPORT int64_t mmvssm_ss2d_problem_size() { return sizeof(mmvssm::Ss2dProblem); }

MMVSSM_EXPORT int64_t mmvssm_pair_problem_size() { return sizeof(mmvssm::ScanPair); }
MMVSSM_EXPORT int64_t mmvssm_conv_problem_size() { return sizeof(mmvssm::ConvProblem); }
MMVSSM_EXPORT int64_t mmvssm_gate_problem_size() { return sizeof(mmvssm::GateProblem); }
MMVSSM_EXPORT int64_t mmvssm_norm_problem_size() { return sizeof(mmvssm::NormProblem); }

MMVSSM_EXPORT int64_t mmvssm_norm_rows() { return mmvssm::kNormRows; }
MMVSSM_EXPORT int64_t mmvssm_tile() { return mmvssm::kTile; }

MMVSSM_EXPORT int64_t mmvssm_strips(int32_t isa, int64_t channels) {
  return mmvssm::find(isa)->strips(channels);
}

#define MMVSSM_ENTRY(function, Problem)                                                \
  MMVSSM_EXPORT int32_t mmvssm_##function(int32_t isa, const mmvssm::Problem* problem, \
                                          mmvssm::ParallelFor parallel_for) {          \
    if (parallel_for == nullptr) parallel_for = mmvssm::run_serially;                  \
    return mmvssm::find(isa)->function(*problem, parallel_for);                        \
  }

MMVSSM_ENTRY(scan_forward, ScanProblem)
MMVSSM_ENTRY(scan_backward, ScanProblem)
MMVSSM_ENTRY(ss2d_forward, Ss2dProblem)
MMVSSM_ENTRY(ss2d_backward, Ss2dProblem)
MMVSSM_ENTRY(pair_forward, ScanPair)
MMVSSM_ENTRY(pair_backward, ScanPair)
MMVSSM_ENTRY(conv_forward, ConvProblem)
MMVSSM_ENTRY(conv_backward, ConvProblem)
MMVSSM_ENTRY(gate_forward, GateProblem)
MMVSSM_ENTRY(gate_backward, GateProblem)
MMVSSM_ENTRY(norm_forward, NormProblem)
MMVSSM_ENTRY(norm_backward, NormProblem)
