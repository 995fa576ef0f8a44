// Memory of one call.
#pragma once

#include <cstdlib>

#include "isa.h"

FR_NAMESPACE_BEGIN

// n elements, not initialised, aligned to a cache line; data is null when there is no memory.
template <class E>
struct Workspace {
  E* data;
  explicit Workspace(int64_t n)
      : data(
            static_cast<E*>(std::aligned_alloc(64, ((n > 0 ? n : 1) * sizeof(E) + 63) / 64 * 64))) {
  }
  ~Workspace() { std::free(data); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
};

FR_NAMESPACE_END
