#include "maxpool.cuh"

namespace fused_resnet::cuda {

Status bn_act_maxpool_train(const BnActMaxpoolTrainArgs& args, const Place& place) {
  return dispatch(args.dtype, [&](auto type) {
    return launch_maxpool<decltype(type), true>(args, true, args.argmax, place);
  });
}

}  // namespace fused_resnet::cuda
