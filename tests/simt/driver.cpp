// driver ORDER SEED CHECK [ARGUMENT...]: runs one check of CUDA kernels on the CPU, with its
// threads scheduled in the given order. Exits 0 when it holds. Asynchronous copies land at once;
// as late as may be where ORDER ends in "+lazy".
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
      {"mma", check_mma},
      {"eltwise_act", check_eltwise_act},
  };
  const std::string schedule = argc > 1 ? argv[1] : "",
                    order = schedule.substr(0, schedule.find('+'));
  const bool lazy = schedule == order + "+lazy";
  if (argc < 4 || !orders.count(order) || (order != schedule && !lazy) || !checks.count(argv[3])) {
    fprintf(stderr, "usage: %s ORDER[+lazy] SEED CHECK [ARGUMENT...]\n", argv[0]);
    return 2;
  }
  simt::order = orders.at(order);
  simt::landing = lazy ? simt::Landing::lazy : simt::Landing::eager;
  simt::generator.seed(std::stoul(argv[2]));
  checks.at(argv[3])(argc - 4, argv + 4);
  return 0;
}
