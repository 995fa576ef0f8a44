// The gradient of a convolution's input is a convolution of `grad`, with the weight transposed over
// channels and read backwards over kernel positions; with a stride, one for each phase.
#include "../conv_phase.h"
#include "buffer.h"
#include "conv_panels.h"

FR_NAMESPACE_BEGIN

namespace {

// So many bytes of a phase are computed at a time: they stay in the last cache until they are
// spread.
constexpr int64_t kPhaseBytes = 4 << 20;

template <class T>
struct Dgrad {
  const ConvDgradArgs& args;
  const ConvShape& s;
  const T* weight;
  int64_t stride[4];  // of [in_channels, out_channels / groups, kernel[0], kernel[1]]
  const Pool& pool;

  ConvBnActArgs convolution(const Phase& h, const Phase& w) const {
    ConvBnActArgs a{};
    a.dtype = args.dtype;
    a.act = Act::none;
    a.shape = {s.batch,
               s.out_height,
               s.out_width,
               s.out_channels,
               h.size,
               w.size,
               s.in_channels,
               {h.taps, w.taps},
               {1, 1},
               {h.padding, w.padding},
               {h.dilation, w.dilation},
               s.groups};
    a.x = args.grad;
    a.weight = weight + h.last * stride[2] + w.last * stride[3];
    a.weight_stride[0] = stride[0];
    a.weight_stride[1] = stride[1];
    a.weight_stride[2] = -h.step * stride[2];
    a.weight_stride[3] = -w.step * stride[3];
    return a;
  }

  // Calls body(pixel of dx, pixel of the phase), as offsets, for all pixels of some images.
  template <class F>
  void each(const Phase& h, const Phase& w, int64_t image, int64_t images, F body) const {
    parallel(pool, images * h.size, 1, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        const int64_t row = line % h.size * s.stride[0] + h.first;
        const int64_t at = ((image + line / h.size) * s.height + row) * s.width + w.first;
        for (int64_t i = 0; i < w.size; ++i)
          body((at + i * s.stride[1]) * s.in_channels, (line * w.size + i) * s.in_channels);
      }
    });
  }

  Status phase(const Phase& h, const Phase& w) const {
    const T* const added = static_cast<const T*>(args.added);
    T* const dx = static_cast<T*>(args.dx);
    const int64_t bytes = s.in_channels * sizeof(T);
    if (h.taps == 0 || w.taps == 0) {
      if (added != dx)
        each(h, w, 0, s.batch, [&](int64_t to, int64_t) {
          added ? __builtin_memcpy(dx + to, added + to, bytes)
                : __builtin_memset(dx + to, 0, bytes);
        });
      return Status::ok;
    }
    ConvBnActArgs a = convolution(h, w);
    if (s.stride[0] == 1 && s.stride[1] == 1) {
      a.residual = added;
      a.out = dx;
      return FUSED_RESNET_ISA::conv_bn_act(a, pool);
    }
    const int64_t image_bytes = h.size * w.size * bytes;
    int64_t images = kPhaseBytes / image_bytes;
    images = images < 1 ? 1 : images < s.batch ? images : s.batch;
    Workspace<T> part(images * h.size * w.size * s.in_channels);
    Workspace<Element<T>> packed(FUSED_RESNET_ISA::conv_packed_size(args.dtype, a.shape));
    if (!part.data || !packed.data) return Status::out_of_memory;
    ConvPackArgs pack{args.dtype, a.shape, a.weight, {}, packed.data};
    for (int d = 0; d < 4; ++d) pack.weight_stride[d] = a.weight_stride[d];
    FUSED_RESNET_ISA::conv_pack(pack, pool);
    a.weight = nullptr;
    a.packed = packed.data;
    a.residual = added ? part.data : nullptr;
    a.out = part.data;
    for (int64_t image = 0; image < s.batch; image += images) {
      a.shape.batch = s.batch - image < images ? s.batch - image : images;
      a.x = static_cast<const T*>(args.grad) + image * s.out_height * s.out_width * s.out_channels;
      // Added before it is rounded, so gathered first.
      if (added)
        each(h, w, image, a.shape.batch, [&](int64_t from, int64_t to) {
          __builtin_memcpy(part.data + to, added + from, bytes);
        });
      const Status status = FUSED_RESNET_ISA::conv_bn_act(a, pool);
      if (status != Status::ok) return status;
      each(h, w, image, a.shape.batch,
           [&](int64_t to, int64_t from) { __builtin_memcpy(dx + to, part.data + from, bytes); });
    }
    return Status::ok;
  }

  Status run() const {
    for (int64_t h = 0; h < s.stride[0] && h < s.height; ++h)
      for (int64_t w = 0; w < s.stride[1] && w < s.width; ++w) {
        const Status status = phase(phase_of(s, 0, h), phase_of(s, 1, w));
        if (status != Status::ok) return status;
      }
    return Status::ok;
  }
};

// Of several groups, the transposed weight is no view: [in_channels][out_channels / groups][taps].
template <class T>
void transpose_groups(const ConvDgradArgs& args, T* to) {
  const ConvShape& s = args.shape;
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  const int64_t* const stride = args.weight_stride;
  for (int64_t c = 0; c < s.in_channels; ++c)
    for (int64_t k = 0; k < group_out; ++k) {
      const T* const from = static_cast<const T*>(args.weight) +
                            (c / group_in * group_out + k) * stride[0] + c % group_in * stride[1];
      for (int64_t h = 0; h < s.kernel[0]; ++h)
        for (int64_t w = 0; w < s.kernel[1]; ++w) *to++ = from[h * stride[2] + w * stride[3]];
    }
}

template <class T>
Status dgrad(const ConvDgradArgs& args, const Pool& pool) {
  const ConvShape& s = args.shape;
  const int64_t* const stride = args.weight_stride;
  if (s.batch == 0) return Status::ok;
  const T* const weight = static_cast<const T*>(args.weight);
  if (s.groups == 1)
    return Dgrad<T>{args, s, weight, {stride[1], stride[0], stride[2], stride[3]}, pool}.run();
  const int64_t group_out = s.out_channels / s.groups, taps = s.kernel[0] * s.kernel[1];
  Workspace<T> own(s.in_channels * group_out * taps);
  if (!own.data) return Status::out_of_memory;
  transpose_groups(args, own.data);
  return Dgrad<T>{args, s, own.data, {group_out * taps, taps, s.kernel[1], 1}, pool}.run();
}

}  // namespace

Status conv_dgrad(const ConvDgradArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) { return dgrad<decltype(type)>(args, pool); });
}

FR_NAMESPACE_END
