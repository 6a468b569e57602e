// What Python hands over. The structures are mirrored in library.py.
#pragma once

#include <cstdint>

namespace mmvssm {

enum Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// A tensor of up to four axes; strides in elements. Null data: there is none.
struct Array {
  void* data;
  int64_t dtype;
  int64_t stride[4];
};

// The selective scan along one route, and its gradients. Plain pointers are
// contiguous float32; what a call does not have is null. A route is an order of
// the positions of a map with rows of `width`, which lie in memory in the order of
// the image: 0 row by row (so is a plain sequence), 1 column by column, 2 and 3
// the same from the end.
struct ScanProblem {
  int32_t device;                     // its number
  int32_t batch, groups, group_size;  // channels are groups * group_size
  int32_t length, width, route;
  int32_t states, rank;               // rank 0: delta is given, else features are
  int32_t stretches, stretch_length;  // whole chunks, walked side by side
  int32_t softplus, add;              // add: to what is in out or grad_u
  int32_t tile;                       // channels of a block, by mmvssm_tile
  Array u, delta, z;                  // (batch, channel, position)
  Array features;                     // (batch, rank, position)
  Array B, C;                         // (batch, group, state, position)
  const float* weight;                // of the features, (channel, rank)
  const float *A, *D, *bias;          // (channel, state), (channel), (channel)
  Array out;                          // like u
  float* last_state;                  // (batch, channel, state)
  float* saved;                       // (chunks - 1, batch, channel, state)
  float *edges, *steps;               // (stretches, batch, channel, state), without it
  Array grad_out;                     // like u
  const float* grad_last_state;       // like last_state
  Array grad_u, grad_delta, grad_z;
  float *grad_B, *grad_C;     // (tiles, batch, group, length, state)
  float* grad_A;              // (stretches, batch, channel, state)
  float *grad_D, *grad_bias;  // (stretches, batch, channel)
};

// Positions from one saved state to the next.
constexpr int kChunk = 16;

}  // namespace mmvssm
