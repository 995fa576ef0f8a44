// Each input position looks at the windows that cover it, and takes the gradients of those whose
// maximum it is: one pass, written once, in the same order whatever the number of threads.
#include "../math.h"
#include "bn_gradient.h"
#include "pool.h"

FR_NAMESPACE_BEGIN

namespace {

// The output position whose window has position `i` of the input at its kernel position k, or -1.
FR_VEC int64_t covering(int64_t i, int64_t k, int64_t stride, int64_t padding, int64_t dilation,
                        int64_t out_size) {
  const int64_t begin = i + padding - k * dilation;
  return begin < 0 || begin % stride || begin / stride >= out_size ? -1 : begin / stride;
}

}  // namespace

Status bn_act_maxpool_backward(const BnActMaxpoolBackwardArgs& args, const Pool& pool) {
  const PoolShape& s = args.shape;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const T* grad = static_cast<const T*>(args.grad);
    const T* out = static_cast<const T*>(args.out);
    const T* x = static_cast<const T*>(args.x);
    const BnGradient<A> gradient(args.scale, args.batch, s.channels);
    // Dividing for every pixel would cost as much as the rest.
    Workspace<int64_t> columns(s.width * s.kernel[1]);
    if (!columns.data || !gradient.has_memory()) return Status::out_of_memory;
    for (int64_t w = 0; w < s.width; ++w)
      for (int64_t kw = 0; kw < s.kernel[1]; ++kw)
        columns.data[w * s.kernel[1] + kw] =
            covering(w, kw, s.stride[1], s.padding[1], s.dilation[1], s.out_width);

    auto pixel = [&](int64_t at, int64_t image, int64_t h, const int64_t* column) FR_LAMBDA {
      // The pooled pixels that cover this one, and where in their windows it lies.
      int64_t pooled[256], position[256];
      int count = 0;
      for (int64_t kh = 0; kh < s.kernel[0]; ++kh) {
        const int64_t oh = covering(h, kh, s.stride[0], s.padding[0], s.dilation[0], s.out_height);
        for (int64_t kw = 0; oh >= 0 && kw < s.kernel[1]; ++kw)
          if (column[kw] >= 0) {
            pooled[count] = ((image * s.out_height + oh) * s.out_width + column[kw]) * s.channels;
            position[count++] = kh * s.kernel[1] + kw;
          }
      }
      for_vectors<A>(s.channels, [&](int64_t ch, auto lanes) FR_LAMBDA {
        Vec<A> sum{};
        for (int i = 0; i < count; ++i) {
          const int64_t from = pooled[i] + ch;
          Vec<A> g = load(grad + from, lanes);
          if (args.act == Act::relu) g = math::relu_backward(load(out + from, lanes), g);
          const Vec<A> index = load_index<A>(args.argmax + from, length<A>(lanes));
          sum += index == splat(static_cast<A>(position[i])) ? g : Vec<A>{};
        }
        const auto prepared = gradient.prepare(EachChannel<decltype(lanes)>{ch, lanes});
        const Vec<A> dx = gradient(prepared, sum, x, at + ch, lanes);
        store(static_cast<T*>(args.dx) + at + ch, dx, lanes);
      });
    };
    parallel(pool, s.batch * s.height, 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t w = 0; w < s.width; ++w)
          pixel((row * s.width + w) * s.channels, row / s.height, row % s.height,
                columns.data + w * s.kernel[1]);
    });
    return Status::ok;
  });
}

FR_NAMESPACE_END
