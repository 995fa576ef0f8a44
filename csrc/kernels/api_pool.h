// Ops that pool what they convolve.
#pragma once

#include "api.h"

namespace fused_resnet {

// out = max over each window of conv_bn_act, of one group; conv.out is not read.
struct ConvBnActMaxpoolArgs {
  ConvBnActArgs conv;
  PoolShape pool;
  void* out;
};

// out[n][c] = the mean over image n's channel c of conv_bn_act as it would be stored; conv.out is
// not read.
struct ConvBnActAvgpoolArgs {
  ConvBnActArgs conv;
  void* out;
};

// CPUs have no kernels for them.
#define FUSED_RESNET_POOL_OPS(X)               \
  X(conv_bn_act_maxpool, ConvBnActMaxpoolArgs) \
  X(conv_bn_act_avgpool, ConvBnActAvgpoolArgs)

namespace cuda {
FUSED_RESNET_POOL_OPS(FUSED_RESNET_ON_PLACE)
}

}  // namespace fused_resnet
