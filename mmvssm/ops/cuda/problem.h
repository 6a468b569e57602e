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

// The selective scan of a map along one order, and its gradients. Plain pointers are
// contiguous float32; what a call does not have is null. The `places` of the map, with
// rows of `width`, lie in memory in the order of the image. An order says which place
// each of `length` positions is: route 0 row by row (so is a plain sequence), 1 column
// by column, 2 and 3 the same from the end; any other is in the table, (length), in
// which -1 is a padded place: there u, B, C and the features are zero, and nothing is
// stored.
struct ScanProblem {
  int32_t device;                     // its number
  int32_t batch, groups, group_size;  // channels are groups * group_size
  int32_t length, places, width, route;
  int32_t states, rank;               // rank 0: delta is given, else features are
  int32_t stretches, stretch_length;  // whole chunks, walked side by side
  int32_t softplus, add;              // add: to what is in out or grad_u
  int32_t tile;                       // channels of a block, by mmvssm_tile
  const int32_t* table;               // null for a route
  Array u, delta, z;                  // (batch, channel, place)
  Array features;                     // (batch, rank, place)
  Array B, C;                         // (batch, group, state, place)
  const float* weight;                // of the features, (channel, rank)
  const float *A, *D, *bias;          // (channel, state), (channel), (channel)
  Array out;                          // like u
  float* last_state;                  // (batch, channel, state)
  float* saved;                       // (chunks - 1, batch, channel, state)
  float *edges, *steps;               // (stretches, batch, channel, state), without it
  Array grad_out;                     // like u
  const float* grad_last_state;       // like last_state
  Array grad_u, grad_delta, grad_z;
  float *grad_B, *grad_C;     // (tiles, batch, group, place, state)
  float* grad_A;              // (stretches, batch, channel, state)
  float *grad_D, *grad_bias;  // (stretches, batch, channel)
};

// Positions from one saved state to the next.
constexpr int kChunk = 16;

}  // namespace mmvssm
