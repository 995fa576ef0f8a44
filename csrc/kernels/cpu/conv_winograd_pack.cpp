#include "../api_winograd.h"
#include "conv_panels.h"
#include "winograd.h"

FR_NAMESPACE_BEGIN

namespace {

// G g G^T of a panel: [product][input channel][output channel].
template <int kOut>
void pack(const ConvPackArgs& args, int64_t panel) {
  constexpr int kIn = kOut + 2;
  constexpr int64_t kWidth = kMaxVecs * kLanes<float>;
  const ConvShape& s = args.shape;
  const int64_t* stride = args.weight_stride;
  float* to = static_cast<float*>(args.packed) + panel * kIn * kIn * s.in_channels * kWidth;
  for (int64_t c = 0; c < s.in_channels; ++c)
    for (int64_t k = 0; k < kWidth; ++k, ++to) {
      const int64_t out = panel * kWidth + k;
      double rows[kIn][3] = {};
      for (int j = 0; j < 3 && out < s.out_channels; ++j) {
        const float* from = static_cast<const float*>(args.weight) + out * stride[0] +
                            c * stride[1] + j * stride[3];
        double column[kIn];
        Winograd<kOut>::weight({from[0], from[stride[2]], from[2 * stride[2]]}, column);
        for (int i = 0; i < kIn; ++i) rows[i][j] = column[i];
      }
      for (int i = 0; i < kIn; ++i) {
        double row[kIn];
        Winograd<kOut>::weight(rows[i], row);
        for (int j = 0; j < kIn; ++j)
          to[(i * kIn + j) * s.in_channels * kWidth] = static_cast<float>(row[j]);
      }
    }
}

}  // namespace

Status conv_winograd_pack(const ConvWinogradPackArgs& args, const Pool& pool) {
  const ConvPackArgs& p = args.pack;
  if (p.dtype != DType::f32 || (args.tile != 2 && args.tile != 4)) return Status::unsupported;
  parallel(pool, panels_of<float>(p.shape).count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) args.tile == 2 ? pack<2>(p, i) : pack<4>(p, i);
  });
  return Status::ok;
}

FR_NAMESPACE_END
