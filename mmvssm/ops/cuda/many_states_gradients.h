// What a thread of the backward kernel of several states works on: its channels, states
// and positions, what shared memory holds, and where its numbers are.
#pragma once

#include "many_states_splits.h"
#include "many_states_staging.h"

namespace mmvssm {

// Four lanes share four channels: sums over the channels and over the states are about
// as long as each other, and a thread reads four numbers at once of any kind.
constexpr int kLanes = 4;
constexpr int kOwn = kStates / kLanes;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSub = 4, kSubs = kPositions / kSub;  // positions of a sub-chunk
static_assert(kSub == kLanes, "a lane has a position of a sub-chunk");
constexpr bool kOnTensorCores = B_DTYPE != kFloat32 && kOwn > 1;
constexpr int kPairs = kOwn > 1 ? kOwn / 2 : 1;
constexpr float kOfWeights = kOnTensorCores ? 0.5f : 1.0f;  // factor of B and C
// Of four states the inner two change places: what is next to each other is then what a
// lane needs of b in two products.
constexpr bool kSwapped = kOnTensorCores && kOwn == 4;
// Of the gate: there is one; its gradient is wanted, which takes the output before the
// gate; that one was kept, or is found once more.
constexpr bool kGate = GATE > 0, kGradZ = GATE > 1;
constexpr bool kReadsTotal = GATE == 2, kFindsTotal = GATE == 3;

struct Args {
  Inputs in;
  Rows grad_out, total;
  Rows grad_u, grad_delta, grad_z;
  const float *kept, *grad_last_state;
  // Sums of a CTA: (split, batch, channel, STATES), (split, batch, channel), likewise;
  // (block, batch, group, place, STATES), likewise.
  float *grad_A, *grad_D, *grad_bias, *grad_B, *grad_C;
  float inverse;  // of the gate's factor
};

using URows = RowsOfWarp<U_DTYPE>;
using DeltaRows = RowsOfWarp<DELTA_DTYPE>;
using GradOutRows = RowsOfWarp<GRAD_OUT_DTYPE>;
using TotalRows = RowsOfWarp<kFloat32>;
using GradURows = RowsOfWarp<GRAD_U_DTYPE>;
using GradDeltaRows = RowsOfWarp<GRAD_DELTA_DTYPE>;

// Results are put in place of what is read no more, if it is as large; that of the gate
// always is.
constexpr bool kGradUInU = !ADD && kSize<GRAD_U_DTYPE> == kSize<U_DTYPE>;
constexpr bool kGradDeltaInOut = kSize<GRAD_DELTA_DTYPE> == kSize<GRAD_OUT_DTYPE>;

// The states before sub-chunks, in slots of which a thread reads its own alone. Those
// before the last one are kept in registers, if they are not read from memory.
static_assert(kKept % kSub == 0, "whole sub-chunks");
constexpr int kSlots = kKept == kSub ? kSubs : kSubs - 1;
constexpr int kSlotBytes = kStates * kThreads * 4;
// What the threads of a warp have for the gradients of B and C of a sub-chunk. Their
// sums take the place of dt, which is then read no more.
constexpr int kProducts = kSub * (kWarp / kLanes) * 2 * kStates;  // numbers
static_assert(2 * kStates <= kWarp, "a warp has as many sums as columns of dt");
// Then what they have for sums over the states: two sums of a position and channel, and
// besides the output if it is found. The pitch of positions keeps lanes that read from
// different banks.
constexpr int kPartsPitch = kWarp * kLanes + 4;
constexpr int kParts = kSub * kPartsPitch;
constexpr int kOutput = 2;  // its number
static_assert(kProducts <= kOutput * kParts, "the output is found before the products");
constexpr int kExchangeBytes = (kFindsTotal ? 3 : 2) * kParts * 4;  // of a warp

struct Shared {
  static constexpr int kU = 0;
  static constexpr int kGradOut = kU + kWarps * URows::kBytes;
  static constexpr int kZ = kGradOut + kWarps * GradOutRows::kBytes;
  static constexpr int kTotal = kZ + (kGate ? kWarps * URows::kBytes : 0);
  static constexpr int kGradU = kTotal + (kReadsTotal ? kWarps * TotalRows::kBytes : 0);
  static constexpr int kGradDelta = kGradU + (kGradUInU ? 0 : kWarps * GradURows::kBytes);
  static constexpr int kDelta =
      kGradDelta + (kGradDeltaInOut ? 0 : kWarps * GradDeltaRows::kBytes);
  static constexpr int kGradUTile = kGradUInU ? kU : kGradU;
  static constexpr int kGradDeltaTile = kGradDeltaInOut ? kGradOut : kGradDelta;
  static constexpr int kDt = kDelta + (kRank ? 0 : 2 * kWarps * DeltaRows::kBytes);
  static constexpr int kSlope = kDt + kDtBytes;
  static constexpr int kInput = kSlope + kPositions * kThreads * 4;
  // dy is where dt u of the sub-chunk behind was, so there are rows for one more.
  static constexpr int kInputBytes = (kPositions + kSub) * kDtPitch * 4;
  static constexpr int kDy = kInput + kSub * kDtPitch * 4;
  static constexpr int kSlot = kInput + kInputBytes * (kOnTensorCores ? 2 : 1);
  static constexpr int kExchange = kSlot + kSlots * kSlotBytes;
  // What the output before the gate is times, of the thread's position of a sub-chunk.
  static constexpr int kOfOutput = kExchange + kWarps * kExchangeBytes;
  static constexpr int kWeights = kOfOutput + (kFindsTotal ? kThreads * kLanes * 4 : 0);
  static constexpr int kSkip = kWeights + kWeightsBytes;  // D, then the shift of delta
  static constexpr int kLowRank = kSkip + 2 * kThreads * 4;
  static constexpr int kFragment = kLowRank + 2 * kLowRankBytes;
  static constexpr int kPlaces = kFragment + kFragmentsBytes;
  static constexpr int kBytes = kPlaces + Places::kBytes;
};
static_assert(Shared::kBytes == SHARED, "as Python has it");

// The gradients of a split. Those of D and bias are sums over the lane's positions.
struct Sums {
  States<kLanes> A = {};
  float D[kLanes] = {}, bias[kLanes] = {};
};

// Where the numbers of a lane are, of the positions of a sub-chunk. Arrays with rows of
// one kind share a pointer, which moves on from sub-chunk to sub-chunk.
struct Cursor {
  static constexpr int kNarrowPitch = RowsOfWarp<kBfloat16>::kPitch;
  static constexpr int kWidePitch = RowsOfWarp<kFloat32>::kPitch;
  char *steps, *own;    // rows of all channels: those of the lane, and its position
  char* weights;        // the lane's states
  char *narrow, *wide;  // rows of a warp, of 16 bits and of float32: its position
  char* slope;          // of the thread alone
  // Of products on tensor cores: b, and a: rows like those of steps, or low parts.
  char *fragment, *factor;

  MMVSSM_DEVICE Cursor(char* smem, const Work& work) {
    const int group = work.lane / kLanes, i = work.lane % kLanes;
    steps = smem + (work.warp * kWarp + group * kLanes) * 4;
    own = steps + i * (kDtPitch * 4);
    weights = smem + i * (kOwn * 4);
    narrow = smem + work.warp * (kPositions * kNarrowPitch) + i * kNarrowPitch +
             group * (kLanes * 2);
    wide = smem + work.warp * (kPositions * kWidePitch) + i * kWidePitch +
           group * (kLanes * 4);
    slope = smem + Shared::kSlope + threadIdx.x * (kLanes * 4);
    fragment = smem + group * (kPairs * 4);
    factor = steps + (i % 2 ? Shared::kInputBytes : 0);
  }

  MMVSSM_DEVICE void move(int positions) {
    steps += positions * (kDtPitch * 4);
    own += positions * (kDtPitch * 4);
    weights += positions * (kWeightsPitch * 4);
    narrow += positions * kNarrowPitch;
    wide += positions * kWidePitch;
    slope += positions * (kThreads * 4);
    fragment += positions * (kWeightsPitch * 4);
    factor += positions * (kDtPitch * 4);
  }

  // Row `i` of the array at an offset.
  MMVSSM_DEVICE float* row(int offset, int i) const {
    return reinterpret_cast<float*>(steps + offset + i * (kDtPitch * 4));
  }
  MMVSSM_DEVICE float* own_row(int offset, int i = 0) const {
    return reinterpret_cast<float*>(own + offset + i * (kDtPitch * 4));
  }
  template <typename Array>
  MMVSSM_DEVICE char* tile(int offset) const {
    return (Array::kPitch == kWidePitch ? wide : narrow) + offset;
  }
};

}  // namespace mmvssm
