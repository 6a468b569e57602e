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

// Takes the place of torch's parallel_for where torch has none.
static int32_t run_serially(int64_t begin, int64_t end, int64_t, RangeFunction function,
                            void* context) {
  function(begin, end, context);
  return 0;
}

}  // namespace mmvssm

// Lanes of the instruction set (0 baseline, 1 AVX2, 2 AVX-512), or 0 if this machine
// does not have it.
MMVSSM_EXPORT int32_t mmvssm_lanes(int32_t isa) {
  const mmvssm::Kernels* kernels = mmvssm::find(isa);
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
  return mmvssm::find(isa)->channel_blocks(channels);
}

#define MMVSSM_ENTRY(function, Args)                                             \
  MMVSSM_EXPORT int32_t mmvssm_##function(int32_t isa, const mmvssm::Args* args, \
                                          mmvssm::ParallelFor parallel_for) {    \
    if (parallel_for == nullptr) parallel_for = mmvssm::run_serially;            \
    return mmvssm::find(isa)->function(*args, parallel_for);                     \
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
