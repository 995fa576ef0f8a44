// Winograd's form of a convolution, for CPUs.
#pragma once

#include "api.h"

namespace fused_resnet {

// conv_bn_act of f32, of one group, a 3x3 kernel, stride and dilation 1, in tiles of `tile` x
// `tile` outputs, 2 or 4: (tile + 2)^2 products for each pair of channels where it has 9 tile^2.
// What a tile reads that is not finite reaches all of it; otherwise the same but for rounding.
// `packed` is from conv_winograd_pack.
struct ConvBnActWinogradArgs {
  ConvBnActArgs conv;
  int64_t tile;
};

// Transforms such a weight for tiles of that size, in fp64, into the panels that the convolution
// reads, of winograd_packed_size floats.
struct ConvWinogradPackArgs {
  ConvPackArgs pack;
  int64_t tile;
};

#define FUSED_RESNET_WINOGRAD_OPS(X)             \
  X(conv_bn_act_winograd, ConvBnActWinogradArgs) \
  X(conv_winograd_pack, ConvWinogradPackArgs)

namespace cpu {
FUSED_RESNET_WINOGRAD_OPS(FUSED_RESNET_ON_POOL)
}

}  // namespace fused_resnet
