// driver ORDER SEED CHECK [ARGUMENT...]: runs one check of CUDA kernels on the CPU, with its
// threads scheduled in the given order. Exits 0 when it holds. Asynchronous copies land at once;
// as late as may be where ORDER ends in "+lazy".
#include <map>

#include "check.h"

int main(int argc, char** argv) {
  const std::map<std::string, void (*)(int, char**)> checks = {
      {"shim", check_shim},           {"mma", check_mma},         {"traversal", check_traversal},
      {"conv_plan", check_conv_plan}, {"conv", check_conv},       {"chain", check_chain},
      {"wgmma", check_wgmma},         {"avgpool", check_avgpool},
  };
  if (argc < 4 || !simt::set_schedule(argv[1], std::stoul(argv[2])) || !checks.count(argv[3])) {
    fprintf(stderr, "usage: %s ORDER[+lazy] SEED CHECK [ARGUMENT...]\n", argv[0]);
    return 2;
  }
  try {
    checks.at(argv[3])(argc - 4, argv + 4);
  } catch (const simt::Failure& failure) {
    fprintf(stderr, "%s\n", failure.what());
    _Exit(3);  // abandoned fibers hold what they hold
  }
  return 0;
}
