#include "../math.h"
#include "pool.h"

FR_NAMESPACE_BEGIN

Status bn_act_maxpool_train(const BnActMaxpoolTrainArgs& args, const Pool& pool) {
  const PoolShape& s = args.shape;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const A* scale = static_cast<const A*>(args.scale);
    const A* shift = static_cast<const A*>(args.shift);
    // All positions of one output pixel: the first of the largest, or the last NaN.
    auto pixel = [&](const T* image, int64_t to, const Window& rows, const Window& cols) FR_LAMBDA {
      for_vectors<A>(s.channels, [&](int64_t c, auto lanes) FR_LAMBDA {
        const Vec<A> a = load(scale + c, lanes), b = load(shift + c, lanes);
        Vec<A> best = splat(static_cast<A>(-__builtin_inf()));
        Vec<A> index = splat(static_cast<A>(rows.first * s.kernel[1] + cols.first));
        for (int64_t kh = rows.first; kh < rows.last; ++kh) {
          for (int64_t kw = cols.first; kw < cols.last; ++kw) {
            const int64_t h = rows.begin + kh * s.dilation[0], w = cols.begin + kw * s.dilation[1];
            const Vec<A> x = load(image + (h * s.width + w) * s.channels + c, lanes);
            const Vec<A> y = math::activate(math::scale_shift(x, a, b), args.act);
            const Vec<A> here = splat(static_cast<A>(kh * s.kernel[1] + kw));
            index = y > best ? here : index;
            best = y > best ? y : best;
            index = y != y ? here : index;
            best = y != y ? y : best;
          }
        }
        store(static_cast<T*>(args.out) + to + c, best, lanes);
        store_index<A>(args.argmax + to + c, index, length<A>(lanes));
      });
    };
    parallel(pool, s.batch * s.out_height, 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t oh = row % s.out_height;
        const T* image =
            static_cast<const T*>(args.x) + row / s.out_height * s.height * s.width * s.channels;
        const Window rows = window(s, 0, oh);
        for (int64_t ow = 0; ow < s.out_width; ++ow)
          pixel(image, (row * s.out_width + ow) * s.channels, rows, window(s, 1, ow));
      }
    });
    return Status::ok;
  });
}

FR_NAMESPACE_END
