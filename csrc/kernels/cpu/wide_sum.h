// Sums in fp64 of what is held in vectors, in an order that depends on nothing but their number.
#pragma once

#include "vec.h"

FR_NAMESPACE_BEGIN

template <class A>
struct WideSum {
  VecD lanes[sizeof(double) / sizeof(A)] = {};

  FR_LAMBDA void add(Vec<A> v) {
    A parts[kLanes<A>];
    store(parts, v);
    for (int half = 0; half < static_cast<int>(sizeof(double) / sizeof(A)); ++half) {
      VecD wide;
      for (int i = 0; i < kLanes<double>; ++i) wide[i] = parts[half * kLanes<double> + i];
      lanes[half] += wide;
    }
  }
  FR_LAMBDA double total() const {
    double sum = 0;
    for (const VecD& v : lanes)
      for (int i = 0; i < kLanes<double>; ++i) sum += v[i];
    return sum;
  }
};

FR_NAMESPACE_END
