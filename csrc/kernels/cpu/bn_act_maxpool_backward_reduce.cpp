// Over the pooled positions, a quarter as many as the input's in a ResNet: each has one x.
#include "../math.h"
#include "pool.h"

FR_NAMESPACE_BEGIN

Status bn_act_maxpool_backward_reduce(const BnActMaxpoolBackwardReduceArgs& args,
                                      const Pool& pool) {
  const PoolShape& s = args.shape;
  return dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const T* grad = static_cast<const T*>(args.grad);
    const T* out = static_cast<const T*>(args.out);
    const A* mean = static_cast<const A*>(args.mean);
    const A* invstd = static_cast<const A*>(args.invstd);
    // Where a position in the window lies, from its first one on.
    int64_t offset[256] = {};
    for (int64_t k = 0; k < s.kernel[0] * s.kernel[1] && k < 256; ++k)
      offset[k] = (k / s.kernel[1] * s.dilation[0] * s.width + k % s.kernel[1] * s.dilation[1]) *
                  s.channels;
    const int64_t rows = s.batch * s.out_height;
    const int64_t elements = s.batch * s.height * s.width * s.channels;
    Workspace<double> table(rows * 2 * s.channels);
    if (!table.data) return Status::out_of_memory;
    int failed = 0;
    parallel(pool, rows, 4, [&](int64_t begin, int64_t end) {
      Workspace<A> sums(2 * s.channels);
      if (!sums.data) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = 0; i < 2 * s.channels; ++i) sums.data[i] = 0;
        const int64_t image = row / s.out_height, oh = row % s.out_height;
        for (int64_t ow = 0; ow < s.out_width; ++ow) {
          const int64_t at = (row * s.out_width + ow) * s.channels;
          // The window's first position may lie in the padding, what its maximum is at does not.
          const int64_t h = image * s.height + oh * s.stride[0] - s.padding[0];
          const int64_t origin = (h * s.width + ow * s.stride[1] - s.padding[1]) * s.channels;
          for_vectors<A>(s.channels, [&](int64_t c, auto lanes) FR_LAMBDA {
            T found[kLanes<A>] = {};
            for (int64_t i = 0; i < length<A>(lanes); ++i) {
              // An argmax that is not of this pooling must not lead out of x.
              const int64_t from = origin + offset[args.argmax[at + c + i]] + c + i;
              if (from >= 0 && from < elements) found[i] = static_cast<const T*>(args.x)[from];
            }
            Vec<A> g = load(grad + at + c, lanes);
            if (args.act == Act::relu) g = math::relu_backward(load(out + at + c, lanes), g);
            A* to = sums.data + c;
            store(to, load(to, lanes) + g, lanes);
            to += s.channels;
            store(to, load(to, lanes) + g * (load(found) - load(mean + c, lanes)), lanes);
          });
        }
        for (int64_t i = 0; i < 2 * s.channels; ++i)
          table.data[row * 2 * s.channels + i] = sums.data[i];
      }
    });
    if (failed) return Status::out_of_memory;
    return add_up<2>(table.data, rows, s.channels, [&](int64_t c, const double* sums) {
      static_cast<A*>(args.sum_g)[c] = static_cast<A>(sums[0]);
      static_cast<A*>(args.sum_gx)[c] = static_cast<A>(sums[1] * invstd[c]);
    });
  });
}

FR_NAMESPACE_END
