// Convolution of bytes: the walk of conv_bn_act over tiles of exact sums, which are scaled,
// shifted, added to and rounded to bytes again before they are stored.
#include "conv_walk.h"
#include "round.h"

FR_NAMESPACE_BEGIN

namespace {

enum class Added { nothing, bytes, floats };

FR_VEC VecF as_float(VecI v) { return __builtin_convertvector(v, VecF); }

// What is made of one vector of sums, all of it or its first n lanes. What is the same for all is
// held here: a byte that is stored might be any of the arguments.
template <bool kBytes, Added kAdded>
struct Result {
  const bool relu;
  const VecF residual_scale;
  const ToBytes to_bytes;

  FR_LAMBDA explicit Result(const ConvInt8Args& a)
      : relu(a.act == Act::relu),
        residual_scale(splat(a.residual_scale)),
        to_bytes(a.out_zero, relu) {}

  template <bool kWhole>
  FR_LAMBDA void put(VecI sum, VecF scale, VecF shift, const char* residual, char* out,
                     int64_t n) const {
    auto get = [&](const auto* p) FR_LAMBDA {
      if constexpr (kWhole)
        return load(p);
      else
        return load(p, n);
    };
    auto put = [&](auto* p, auto v) FR_LAMBDA {
      if constexpr (kWhole)
        store(p, v);
      else
        store(p, v, n);
    };
    VecF y = rounded(as_float(sum) * scale) + shift;
    if constexpr (kAdded == Added::bytes)
      y += rounded(as_float(get(reinterpret_cast<const uint8_t*>(residual))) * residual_scale);
    if constexpr (kAdded == Added::floats)
      y += rounded(get(reinterpret_cast<const float*>(residual)) * residual_scale);
    if constexpr (kBytes)
      put(reinterpret_cast<uint8_t*>(out), to_bytes(y));
    else
      put(reinterpret_cast<float*>(out), relu ? math::relu(y) : y);
  }
};

constexpr int64_t kByteLanes = kLanes<int32_t>;

template <int kR, int kV, bool kBytes, Added kAdded>
__attribute__((noinline)) void finish_whole(const int32_t* sum, const TileArgs<uint8_t>& t) {
  const Result<kBytes, kAdded> result(*t.args);
  constexpr int64_t kOut = kBytes ? 1 : 4, kResidual = kAdded == Added::floats ? 4 : 1;
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    const VecF scale = load(t.scale + v * kByteLanes), shift = load(t.shift + v * kByteLanes);
    const char* residual = t.residual + v * kByteLanes * kResidual;
    char* out = t.out + v * kByteLanes * kOut;
    const int64_t residual_pixel = t.residual_pixel, pixel = t.pixel;
    for (int r = 0; r < kR; ++r, residual += residual_pixel, out += pixel)
      result.template put<true>(load(sum + (r * kV + v) * kByteLanes), scale, shift, residual, out,
                                kByteLanes);
  }
}

// The same for a tile that ends before its last pixel or channel.
template <int kV, bool kBytes, Added kAdded>
__attribute__((noinline)) void finish_rest(const int32_t* sum, const TileArgs<uint8_t>& t) {
  const Result<kBytes, kAdded> result(*t.args);
  constexpr int64_t kOut = kBytes ? 1 : 4, kResidual = kAdded == Added::floats ? 4 : 1;
  for (int64_t c = 0; c < kV * kByteLanes && c < t.columns; c += kByteLanes) {
    const int64_t n = t.columns - c < kByteLanes ? t.columns - c : kByteLanes;
    const VecF scale = load(t.scale + c, n), shift = load(t.shift + c, n);
    for (int64_t r = 0; r < t.count; ++r)
      result.template put<false>(load(sum + r * kV * kByteLanes + c), scale, shift,
                                 t.residual + r * t.residual_pixel + c * kResidual,
                                 t.out + r * t.pixel + c * kOut, n);
  }
}

}  // namespace

template <>
struct Finish<uint8_t> {
  template <int kR, int kV, bool kBytes, Added kAdded>
  FR_LAMBDA static void finish(const int32_t* sum, const TileArgs<uint8_t>& t) {
    if (t.count < kR || t.columns < kV * kByteLanes)
      finish_rest<kV, kBytes, kAdded>(sum, t);
    else
      finish_whole<kR, kV, kBytes, kAdded>(sum, t);
  }

  template <int kR, int kV, bool kBytes>
  FR_LAMBDA static void finish(const int32_t* sum, const TileArgs<uint8_t>& t) {
    if (!t.residual)
      finish<kR, kV, kBytes, Added::nothing>(sum, t);
    else if (t.args->residual_is_float)
      finish<kR, kV, kBytes, Added::floats>(sum, t);
    else
      finish<kR, kV, kBytes, Added::bytes>(sum, t);
  }

  template <int kR, int kV>
  FR_LAMBDA static void run(const int32_t* sum, const TileArgs<uint8_t>& t) {
    t.args->out_is_float ? finish<kR, kV, false>(sum, t) : finish<kR, kV, true>(sum, t);
  }
};

Status conv_int8(const ConvInt8Args& args, const Pool& pool) {
  const int64_t residual_size = args.residual_is_float ? 4 : 1,
                out_size = args.out_is_float ? 4 : 1;
  return convolve<uint8_t>(args, args.x_zero, residual_size, out_size, pool);
}

Status conv_int8_pack(const ConvInt8PackArgs& args, const Pool& pool) {
  pack_panels<uint8_t>(panels_of<uint8_t>(args.shape), args.shape, args.weight, args.weight_stride,
                       static_cast<Element<uint8_t>*>(args.packed), pool);
  return Status::ok;
}

int64_t conv_int8_packed_size(const ConvShape& shape) {
  const Panels panels = panels_of<uint8_t>(shape);
  return panels.count * panels.elements() * static_cast<int64_t>(sizeof(Element<uint8_t>));
}

FR_NAMESPACE_END
