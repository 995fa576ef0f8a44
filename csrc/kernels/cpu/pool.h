// What the poolings share.
#pragma once

#include "../windows.h"
#include "channels.h"

FR_NAMESPACE_BEGIN

// Positions in a window are held as bytes and compared as numbers of the accumulation type.
template <class A>
FR_VEC Vec<A> load_index(const uint8_t* p, int64_t n) {
  Vec<A> v{};
  A lanes[kLanes<A>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  __builtin_memcpy(&v, lanes, sizeof(v));
  return v;
}
template <class A>
FR_VEC void store_index(uint8_t* p, Vec<A> v, int64_t n) {
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(lanes[i]);
}

template <class A>
FR_VEC int64_t length(Whole) {
  return kLanes<A>;
}
template <class A>
FR_VEC int64_t length(Part lanes) {
  return lanes.n;
}

FR_NAMESPACE_END
