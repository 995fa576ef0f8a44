// Reductions inside a block, always in the same order.
#pragma once

#include "launch.h"

namespace fused_resnet::cuda {

// Joins what the `lanes` threads of each slot hold, halves of them at a time, into that of lane 0:
// combine(mine, theirs) puts theirs, of a higher lane, to mine, for each of `groups` arrays of
// `scalars` numbers. All threads of the block call it. lanes is a power of two, and
// lanes * slots at most `threads`.
template <int threads, int groups, int scalars, class Combine>
__device__ void combine_lanes(double (&state)[groups][scalars], int lane, int lanes, int slot,
                              int slots, const Combine& combine) {
  using Room = double[groups * scalars][threads / 2];  // threads beside each other in memory too
  FR_SHARED(Room, room);
  for (int half = lanes / 2; half > 0; half /= 2) {
    __syncthreads();  // what was there has been read
    if (lane >= half && lane < 2 * half) {
#pragma unroll
      for (int i = 0; i < groups * scalars; ++i)
        room[i][(lane - half) * slots + slot] = state[i / scalars][i % scalars];
    }
    __syncthreads();
    if (lane < half) {
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        double theirs[scalars];
#pragma unroll
        for (int i = 0; i < scalars; ++i) theirs[i] = room[g * scalars + i][lane * slots + slot];
        combine(state[g], theirs);
      }
    }
  }
}

}  // namespace fused_resnet::cuda
