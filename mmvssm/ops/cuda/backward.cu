// The C interface of the backward pass, for library.py.
#include "backward.h"
#include "edges.h"

namespace mmvssm {

template <int kStates, int kLanes>
static int run(const ScanProblem& p, void* stream) {
  const int64_t blocks = blocks_of(p);
  const int threads = p.tile * kLanes;
  if (p.stretches > 1) {
    int error = launch(backward_ends_kernel<kStates, kLanes>, blocks, threads, stream, p);
    if (error == 0) error = launch_join<true>(p, stream);
    if (error != 0) return error;
  }
  return launch(backward_kernel<kStates, kLanes>, blocks, threads, stream, p);
}

}  // namespace mmvssm

MMVSSM_EXPORT int mmvssm_scan_backward(const mmvssm::ScanProblem* p, void* stream) {
  using namespace mmvssm;
  if (p->states == 1) return run<1, 1>(*p, stream);
  if (p->states <= 8) return run<4, 2>(*p, stream);
  if (p->states <= 16) return run<4, 4>(*p, stream);
  if (p->states <= 64) return run<4, 16>(*p, stream);
  return run<8, 32>(*p, stream);
}

MMVSSM_EXPORT int mmvssm_scan_backward_tile(int states, int group_size) {
  const int lanes = states == 1 ? 1 : states <= 8 ? 2 : states <= 16 ? 4 : states <= 64 ? 16 : 32;
  return mmvssm::tile_of(lanes, group_size);
}
