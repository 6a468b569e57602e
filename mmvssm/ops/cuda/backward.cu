// The C interface of the backward pass, for library.py.
#include "backward.h"
#include "edges.h"

namespace mmvssm {

// Calls a function with the layout for so many states.
template <typename Function>
static int choose(int states, Function function) {
  if (states == 1) return function(Layout<1, 1>());
  if (states <= 8) return function(Layout<4, 2>());
  if (states <= 16) return function(Layout<4, 4>());
  if (states <= 64) return function(Layout<4, 16>());
  return function(Layout<8, 32>());
}

template <int kStates, int kLanes>
static int run(const ScanProblem& p, void* stream) {
  const int64_t blocks = blocks_of(p);
  const int threads = p.tile * kLanes;
  if (p.stretches > 1) {
    int error =
        launch(backward_ends_kernel<kStates, kLanes>, blocks, threads, stream, p);
    if (error == 0) error = launch_join<true>(p, stream);
    if (error != 0) return error;
  }
  return launch(backward_kernel<kStates, kLanes>, blocks, threads, stream, p);
}

}  // namespace mmvssm

// Of up to 256 states. Returns CUDA's error number, 0 for none.
MMVSSM_EXPORT int mmvssm_scan_backward(const mmvssm::ScanProblem* p, void* stream) {
  return mmvssm::choose(p->states, [=](auto layout) {
    return mmvssm::run<layout.kStates, layout.kLanes>(*p, stream);
  });
}

MMVSSM_EXPORT int mmvssm_scan_backward_tile(int states, int group_size) {
  return mmvssm::choose(
      states, [=](auto layout) { return mmvssm::tile_of(layout.kLanes, group_size); });
}
