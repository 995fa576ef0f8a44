#include "round.h"

FR_NAMESPACE_BEGIN

namespace {

constexpr int64_t kQuantizeGrain = 1 << 15;  // elements a thread is worth starting for

}  // namespace

Status quantize(const QuantizeArgs& args, const Pool& pool) {
  constexpr int64_t lanes = kLanes<float>;
  parallel(pool, args.numel, kQuantizeGrain, [&](int64_t begin, int64_t end) {
    const ToBytes to_bytes(args.zero, false);
    const VecF inverse = splat(args.inverse);
    const float* x = args.x;
    uint8_t* out = args.out;
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) store(out + i, to_bytes(rounded(load(x + i) * inverse)));
    if (i < end) store(out + i, to_bytes(rounded(load(x + i, end - i) * inverse)), end - i);
  });
  return Status::ok;
}

FR_NAMESPACE_END
