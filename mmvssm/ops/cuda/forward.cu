// The C interface of the forward pass, for library.py.
#include "edges.h"
#include "forward.h"

namespace mmvssm {

// Calls a function with the layout for so many states.
template <typename Function>
static int choose(int states, Function function) {
  if (states == 1) return function(Layout<1, 1>());
  if (states <= 8) return function(Layout<8, 1>());
  if (states <= 16) return function(Layout<16, 1>());
  if (states <= 64) return function(Layout<8, 8>());
  return function(Layout<8, 32>());
}

template <int kStates, int kLanes, int kRank>
static int run(const ScanProblem& p, void* stream) {
  const int64_t blocks = blocks_of(p);
  const int threads = p.tile * kLanes;
  if (p.stretches > 1) {
    int error = launch(forward_kernel<kStates, kLanes, kRank, true>, blocks, threads,
                       stream, p);
    if (error == 0) error = launch_join<false>(p, stream);
    if (error != 0) return error;
  }
  return launch(forward_kernel<kStates, kLanes, kRank, false>, blocks, threads, stream,
                p);
}

template <int kStates>
static int run_projected(const ScanProblem& p, void* stream) {
  if (p.rank <= 8) return run<kStates, 1, 8>(p, stream);
  if (p.rank <= 16) return run<kStates, 1, 16>(p, stream);
  return run<kStates, 1, 32>(p, stream);
}

}  // namespace mmvssm

// Of up to 256 states; with features up to 16, and a rank up to 32. Returns CUDA's
// error number, 0 for none.
MMVSSM_EXPORT int mmvssm_scan_forward(const mmvssm::ScanProblem* p, void* stream) {
  using namespace mmvssm;
  if (p->rank > 0)
    return p->states == 1 ? run_projected<1>(*p, stream)
                          : run_projected<16>(*p, stream);
  return choose(p->states, [=](auto layout) {
    return run<layout.kStates, layout.kLanes, 0>(*p, stream);
  });
}

MMVSSM_EXPORT int mmvssm_scan_forward_tile(int states, int group_size) {
  return mmvssm::choose(
      states, [=](auto layout) { return mmvssm::tile_of(layout.kLanes, group_size); });
}

MMVSSM_EXPORT int mmvssm_problem_size() { return sizeof(mmvssm::ScanProblem); }

// Of the sources, see build.py.
#define MMVSSM_TEXT(x) #x
#define MMVSSM_TEXT_OF(x) MMVSSM_TEXT(x)
MMVSSM_EXPORT const char* mmvssm_cuda_digest() { return MMVSSM_TEXT_OF(MMVSSM_DIGEST); }

MMVSSM_EXPORT const char* mmvssm_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
