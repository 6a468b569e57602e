// The C interface that library.py loads. Each call names the instruction set.
#include "kernel_args.h"

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

const Kernels* find_kernels(int32_t isa) {
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

// Threads on which torch computes: `pool` is where its ParallelFor is, which is null
// where torch has none.
static void run_on_torch(void* pool, int64_t items, RangeFunction function,
                         void* context) {
  const ParallelFor parallel_for = *(const ParallelFor*)pool;
  if (parallel_for == nullptr)
    function(0, items, context);
  else
    parallel_for(0, items, 1, function, context);
}

}  // namespace mmvssm

// Lanes of the instruction set (0 baseline, 1 AVX2, 2 AVX-512), or 0 if this machine
// does not have it.
MMVSSM_EXPORT int32_t mmvssm_lanes(int32_t isa) {
  const mmvssm::Kernels* kernels = mmvssm::find_kernels(isa);
  return kernels == nullptr ? 0 : kernels->lanes;
}

// Sizes of the kernel args. library.py compares them with its own.
MMVSSM_EXPORT int64_t mmvssm_scan_args_size() { return sizeof(mmvssm::ScanArgs); }
MMVSSM_EXPORT int64_t mmvssm_ss2d_args_size() { return sizeof(mmvssm::Ss2dArgs); }

MMVSSM_EXPORT int64_t mmvssm_pair_args_size() { return sizeof(mmvssm::PairArgs); }
MMVSSM_EXPORT int64_t mmvssm_conv_args_size() { return sizeof(mmvssm::ConvArgs); }
MMVSSM_EXPORT int64_t mmvssm_gate_args_size() { return sizeof(mmvssm::GateArgs); }
MMVSSM_EXPORT int64_t mmvssm_norm_args_size() { return sizeof(mmvssm::NormArgs); }
MMVSSM_EXPORT int64_t mmvssm_attention_args_size() {
  return sizeof(mmvssm::AttentionArgs);
}

MMVSSM_EXPORT int64_t mmvssm_norm_rows() { return mmvssm::kNormRows; }
MMVSSM_EXPORT int64_t mmvssm_panel_columns() { return mmvssm::kPanel; }
MMVSSM_EXPORT int64_t mmvssm_chunk_length() { return mmvssm::kChunk; }

MMVSSM_EXPORT int64_t mmvssm_channel_blocks(int32_t isa, int64_t channels) {
  return mmvssm::find_kernels(isa)->channel_blocks(channels);
}

#define MMVSSM_ENTRY(function, Args)                                             \
  MMVSSM_EXPORT int32_t mmvssm_##function(int32_t isa, const mmvssm::Args* args, \
                                          mmvssm::ParallelFor parallel_for) {    \
    return mmvssm::find_kernels(isa)->function(                                  \
        *args, {mmvssm::run_on_torch, &parallel_for});                           \
  }

MMVSSM_ENTRY(scan_forward, ScanArgs)
MMVSSM_ENTRY(scan_backward, ScanArgs)
MMVSSM_ENTRY(ss2d_forward, Ss2dArgs)
MMVSSM_ENTRY(ss2d_backward, Ss2dArgs)
MMVSSM_ENTRY(pair_forward, PairArgs)
MMVSSM_ENTRY(pair_backward, PairArgs)
MMVSSM_ENTRY(conv_forward, ConvArgs)
MMVSSM_ENTRY(conv_backward, ConvArgs)
MMVSSM_ENTRY(gate_forward, GateArgs)
MMVSSM_ENTRY(gate_backward, GateArgs)
MMVSSM_ENTRY(norm_forward, NormArgs)
MMVSSM_ENTRY(norm_backward, NormArgs)
MMVSSM_ENTRY(attention_forward, AttentionArgs)
MMVSSM_ENTRY(attention_backward, AttentionArgs)
