// Runs every CPU kernel of one instruction set, without torch or Python, on heap buffers of exactly
// the size it may touch: made for AddressSanitizer and UndefinedBehaviorSanitizer. Prints how many
// values it compared. With the argument `plant`, reads one element too many instead: a run that
// does not end there was not sanitized.
#include "check.h"

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "plant") {
    Array<float> x(15), scale(16), shift(16), out(16);
    x.fill();
    scale.fill();
    shift.fill();
    const fused_resnet::BnActArgs args{DType::f32, Act::none,  x.data(), scale.data(), shift.data(),
                                       nullptr,    out.data(), 1,        16,           1};
    kernels::bn_act(args, pool(1));
    return 0;
  }
  check_conv_bn_act();
  check_conv_dgrad();
  check_conv_int8();
  check_conv_wgrad();
  check_conv_winograd();
  check_bn_act();
  check_bn_scale_shift();
  check_bn_act_maxpool();
  check_eltwise_act();
  check_gram();
  check_training();
  printf("%lld values\n", static_cast<long long>(checks));
  return 0;
}
