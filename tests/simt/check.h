// What the checks that run CUDA kernels on the CPU share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

// Ends the process: a check that fails says why and returns 1.
[[noreturn]] inline void check_failed(const std::string& why) {
  fprintf(stderr, "check failed: %s\n", why.c_str());
  exit(1);
}

inline void check(bool good, const char* why) {
  if (!good) check_failed(why);
}

// The checks. Arguments are what follows the check's name on the command line.
void check_shim(int argc, char** argv);
void check_mma(int argc, char** argv);
void check_wgmma(int argc, char** argv);
void check_traversal(int argc, char** argv);
void check_conv_plan(int argc, char** argv);
void check_conv(int argc, char** argv);
void check_avgpool(int argc, char** argv);
void check_chain(int argc, char** argv);
