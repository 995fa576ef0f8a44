// The gradient of a convolution's input is a convolution of `grad`, with the weight transposed over
// channels and read backwards over kernel positions; with a stride, one for each phase, which
// writes the phase's pixels of dx.
#pragma once

#include "../conv_phase.h"
#include "conv.cuh"

namespace fused_resnet::cuda {

struct DgradJob {
  const ConvDgradArgs& args;
  const ConvShape& s;
  Conv whole;  // with the kernel as it lies in memory
  bool fits, packs;

  explicit DgradJob(const ConvDgradArgs& args) : args(args), s(args.shape) {
    const ConvShape transposed{s.batch,
                               s.out_height,
                               s.out_width,
                               s.out_channels,
                               s.height,
                               s.width,
                               s.in_channels,
                               {s.kernel[0], s.kernel[1]},
                               {1, 1},
                               {0, 0},
                               {s.dilation[0], s.dilation[1]},
                               s.groups};
    fits = describe(args.dtype, args.tf32, transposed, &whole);
    if (!fits) return;
    whole.x = args.grad;
    whole.weight = args.weight;
    for (int d : {2, 3}) whole.weight_stride[d] = args.weight_stride[d];
    whole.weight_stride[0] = args.weight_stride[1];
    whole.weight_stride[1] = args.weight_stride[0];
    whole.group_stride = args.weight_stride[0] * (s.out_channels / s.groups);
    packs = !reads_wide(whole) && packs_wide(whole);
  }

  int64_t element_bytes() const { return conv_element_bytes(args.dtype); }
  int64_t pack_bytes() const { return packs ? packed_bytes(whole) : 0; }
  bool dense() const { return s.stride[0] == 1 && s.stride[1] == 1; }

  // Where the phase's first pixel lies in dx, in bytes.
  int64_t begin(const Phase& h, const Phase& w) const {
    return (h.first * s.width + w.first) * s.in_channels * element_bytes();
  }
  Conv phase(const Phase& h, const Phase& w) const {
    Conv c = whole;
    const Phase* const axes[2] = {&h, &w};
    const bool reached = h.taps > 0 && w.taps > 0;
    int64_t first = 0;
    for (int i = 0; i < 2; ++i) {
      c.kernel[i] = reached ? static_cast<int>(axes[i]->taps) : i;  // no row of one column
      c.padding[i] = static_cast<int>(axes[i]->padding);
      c.dilation[i] = static_cast<int>(axes[i]->dilation);
      if (reached) first += axes[i]->last * whole.weight_stride[2 + i];
      c.weight_stride[2 + i] = -axes[i]->step * whole.weight_stride[2 + i];
    }
    c.weight = static_cast<const char*>(whole.weight) + first * element_bytes();
    c.out_height = static_cast<int>(h.size);
    c.out_width = static_cast<int>(w.size);
    c.out_stride[0] = s.height * s.width * s.in_channels;
    c.out_stride[1] = s.stride[0] * s.width * s.in_channels;
    c.out_stride[2] = s.stride[1] * s.in_channels;
    const int64_t at = begin(h, w);
    c.out = static_cast<char*>(args.dx) + at;
    if (args.added) c.residual = static_cast<const char*>(args.added) + at;
    return c;
  }

  // f(Phase of rows, Phase of columns) of each, while it returns Status::ok.
  template <class F>
  Status each_phase(const F& f) const {
    for (int64_t h = 0; h < s.stride[0] && h < s.height; ++h)
      for (int64_t w = 0; w < s.stride[1] && w < s.width; ++w) {
        const Status status = f(phase_of(s, 0, h), phase_of(s, 1, w));
        if (status != Status::ok) return status;
      }
    return Status::ok;
  }
};

}  // namespace fused_resnet::cuda
