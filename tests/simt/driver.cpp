// driver ORDER SEED CHECK [ARGUMENT...]: runs one check of CUDA kernels on the CPU, with its
// threads scheduled in the given order. Exits 0 when it holds.
#include <map>

#include "check.h"

int main(int argc, char** argv) {
  const std::map<std::string, simt::Order> orders = {
      {"round_robin", simt::Order::round_robin},
      {"first_ahead", simt::Order::first_ahead},
      {"last_ahead", simt::Order::last_ahead},
      {"random", simt::Order::random},
  };
  const std::map<std::string, void (*)(int, char**)> checks = {
      {"shim", check_shim},
      {"eltwise_act", check_eltwise_act},
  };
  if (argc < 4 || !orders.count(argv[1]) || !checks.count(argv[3])) {
    fprintf(stderr, "usage: %s ORDER SEED CHECK [ARGUMENT...]\n", argv[0]);
    return 2;
  }
  simt::order = orders.at(argv[1]);
  simt::generator.seed(std::stoul(argv[2]));
  checks.at(argv[3])(argc - 4, argv + 4);
  return 0;
}
