#include "../math.h"
#include "pool.h"

FR_NAMESPACE_BEGIN

namespace {

// All positions of one output pixel, `lanes` channels at once; NaN wins, and the first of equals.
template <class T, class Load>
FR_VEC Vec<Acc<T>> pool_pixel(const BnActMaxpoolArgs& args, const T* image, Window rows,
                              Window cols, int64_t pixel_stride, Vec<Acc<T>> scale,
                              Vec<Acc<T>> shift, Load load_at) {
  const PoolShape& s = args.shape;
  Vec<Acc<T>> best = splat(static_cast<Acc<T>>(-__builtin_inf()));
  for (int64_t kh = rows.first; kh < rows.last; ++kh)
    for (int64_t kw = cols.first; kw < cols.last; ++kw) {
      const int64_t h = rows.begin + kh * s.dilation[0], w = cols.begin + kw * s.dilation[1];
      auto x = load_at(image + (h * s.width + w) * pixel_stride);
      best = math::maximum(best, math::activate(math::scale_shift(x, scale, shift), args.act));
    }
  return best;
}

}  // namespace

Status bn_act_maxpool(const BnActMaxpoolArgs& args, const Pool& pool) {
  const PoolShape& s = args.shape;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const T* x = static_cast<const T*>(args.x);
    const A* scale = static_cast<const A*>(args.scale);
    const A* shift = static_cast<const A*>(args.shift);
    T* out = static_cast<T*>(args.out);
    const int64_t channels = s.channels;
    const int64_t image = s.height * s.width, out_image = s.out_height * s.out_width;
    // A job is one output row of an image (channels_last) or of a channel (contiguous).
    const int64_t planes = args.channels_last ? s.batch : s.batch * channels;
    parallel(pool, planes * s.out_height, 4, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        const int64_t plane = job / s.out_height, oh = job % s.out_height;
        const Window rows = window(s, 0, oh);
        for (int64_t ow = 0; ow < s.out_width; ++ow) {
          const Window cols = window(s, 1, ow);
          const int64_t to = plane * out_image + oh * s.out_width + ow;
          if (!args.channels_last) {
            const int64_t c = plane % channels;
            auto best = pool_pixel(args, x + plane * image, rows, cols, 1, splat(scale[c]),
                                   splat(shift[c]), [](const T* p) { return load(p, 1); });
            store(out + to, best, 1);
            continue;
          }
          const T* from = x + plane * image * channels;
          int64_t c = 0;
          for (; c + kLanes<A> <= channels; c += kLanes<A>)
            store(out + to * channels + c,
                  pool_pixel(args, from + c, rows, cols, channels, load(scale + c), load(shift + c),
                             [](const T* p) { return load(p); }));
          if (int64_t rest = channels - c)
            store(out + to * channels + c,
                  pool_pixel(args, from + c, rows, cols, channels, load(scale + c, rest),
                             load(shift + c, rest), [&](const T* p) { return load(p, rest); }),
                  rest);
        }
      }
    });
    return Status::ok;
  });
}

FR_NAMESPACE_END
