// How the operands of a convolution come into shared memory: rows of a tile are output pixels, or
// output channels of the weight, and along a row goes the depth, (kernel row, column, channel).
// Each thread brings the same chunk of several rows.
#pragma once

#include "conv.cuh"
#include "conv_tile.cuh"

namespace fused_resnet::cuda {

// Where an output pixel reads, from the first kernel position on, and where it is written.
struct Pixel {
  int64_t in, out;  // offsets in elements; `in` may lie in the padding
  int h, w;         // of the input
};

constexpr int kNowhere = -(1 << 30);  // a row of the input that no kernel position gets out of

// Of the pixel `first` + i; one division of 64 bits finds the image of `first`.
__device__ __forceinline__ Pixel pixel_at(const Conv& c, int64_t first, int i) {
  if (first + i >= c.pixels()) return {0, 0, kNowhere, 0};
  const unsigned image_pixels = c.out_height * c.out_width;
  const unsigned within = static_cast<unsigned>(first % image_pixels) + i;
  const int64_t image = first / image_pixels + within / image_pixels;
  const unsigned pixel = within % image_pixels;
  const int oh = pixel / c.out_width, ow = pixel % c.out_width;
  const int h = oh * c.stride[0] - c.padding[0], w = ow * c.stride[1] - c.padding[1];
  return {((image * c.height + h) * c.width + w) * c.channels,
          image * c.out_stride[0] + oh * c.out_stride[1] + ow * c.out_stride[2], h, w};
}

// The part of a Pixel that reading takes.
struct alignas(16) Source {
  int64_t in;
  int h, w;
};

__device__ __forceinline__ Source source_of(const Pixel& p) { return {p.in, p.h, p.w}; }

// Goes on by a number of pixels at a time: what a division would tell of the next is known.
class SourceSteps {
 public:
  __device__ __forceinline__ SourceSteps(const Conv& c, unsigned pixels) {
    const unsigned image_pixels = c.out_height * c.out_width, rest = pixels % image_pixels;
    images_ = pixels / image_pixels;
    down_ = rest / c.out_width * c.stride[0];
    across_ = rest % c.out_width * c.stride[1];
  }

  __device__ __forceinline__ Source after(const Conv& c, const Source& s) const {
    const int height = c.out_height * c.stride[0], width = c.out_width * c.stride[1];
    int64_t images = images_;
    int down = down_, across = across_;
    if (s.w + across + c.padding[1] >= width) {
      across -= width;
      down += c.stride[0];
    }
    if (s.h + down + c.padding[0] >= height) {
      down -= height;
      ++images;
    }
    return {s.in + ((images * c.height + down) * c.width + across) * c.channels, s.h + down,
            s.w + across};
  }

 private:
  int images_, down_, across_;
};

// A position along the depth.
struct Depth {
  int row, column, channel;

  __device__ __forceinline__ Depth(const Conv& c, int64_t at) {
    const int tap = static_cast<int>(at / c.group_channels());
    channel = static_cast<int>(at % c.group_channels());
    row = tap / c.kernel[1];
    column = tap % c.kernel[1];
  }
  __device__ __forceinline__ bool ended(const Conv& c) const { return row >= c.kernel[0]; }
  __device__ __forceinline__ void advance(const Conv& c, int by) {
    channel += by;
    while (channel >= c.group_channels()) {
      channel -= c.group_channels();
      if (++column < c.kernel[1]) continue;
      column = 0;
      ++row;
    }
  }
};

// The input that a pixel reads at a position of the depth, or null in the padding; `x` is that of
// the group.
template <class T>
__device__ __forceinline__ const T* input_at(const Conv& c, const T* x, int64_t in, int h, int w,
                                             const Depth& k) {
  const int down = k.row * c.dilation[0], across = k.column * c.dilation[1];
  const bool inside = !k.ended(c) && unsigned(h + down) < unsigned(c.height) &&
                      unsigned(w + across) < unsigned(c.width);
  return inside ? x + (in + (int64_t{down} * c.width + across) * c.channels + k.channel) : nullptr;
}

// An element as it is.
struct AsRead {
  template <class T>
  __device__ __forceinline__ T operator()(const T* from, const Depth&) const {
    return *from;
  }
};

// Brings the chunks of `rows` rows at one position of the depth: `element(i, at)` points to that of
// the i-th row that the thread has, or is null where there are zeros. Elements that are loaded one
// by one are read(pointer, at).
template <class T, int rows, int threads, bool wide, class Element, class Read = AsRead>
__device__ __forceinline__ void load_chunks(const Conv& c, Depth at, unsigned char* stage,
                                            const Element& element, const Read& read = {}) {
  constexpr int kCount = rows * kRowChunks / threads, n = 16 / sizeof(T);
  const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
  auto place = [&](int i) { return stage + chunk_at(row + i * (threads / kRowChunks), chunk); };
  if constexpr (wide) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const T* from = element(i, at);
      cp_async16(place(i), from ? from : c.x, from ? 16 : 0);
    }
  } else {
    Vector<T, n> values[kCount] = {};
#pragma unroll
    for (int k = 0; k < n; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (const T* from = element(i, at)) values[i].at[k] = read(from, at);
      }
      at.advance(c, 1);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) store<n>(reinterpret_cast<T*>(place(i)), values[i]);
  }
}

// Rows that are pixels.
template <class T, int rows, int threads, bool wide>
struct PixelRows {
  static constexpr int kCount = rows * kRowChunks / threads;
  const T* x;
  int64_t in[kCount];
  int h[kCount], w[kCount];

  __device__ __forceinline__ PixelRows(const Conv& c, const Pixel* pixels, int group)
      : x(static_cast<const T*>(c.x) + group * c.group_channels()) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Pixel& pixel = pixels[threadIdx.x / kRowChunks + i * (threads / kRowChunks)];
      in[i] = pixel.in;
      h[i] = pixel.h;
      w[i] = pixel.w;
    }
  }

  // That of the thread's i-th row.
  __device__ __forceinline__ const T* element(const Conv& c, int i, const Depth& k) const {
    return input_at(c, x, in[i], h[i], w[i], k);
  }
  __device__ __forceinline__ void load(const Conv& c, const Depth& at, unsigned char* stage) const {
    load_chunks<T, rows, threads, wide>(c, at, stage,
                                        [&](int i, const Depth& k) { return element(c, i, k); });
  }
};

// Rows that are output channels of a group, from `first` on.
template <class T, int rows, int threads, bool wide>
struct WeightRows {
  const T* weight;
  int left;  // rows that there are, from the thread's first on

  __device__ __forceinline__ WeightRows(const Conv& c, int group, int first) {
    const int row = first + threadIdx.x / kRowChunks;
    weight = static_cast<const T*>(c.weight) + group * c.group_stride + row * c.weight_stride[0];
    left = c.group_out_channels() - row;
  }

  __device__ __forceinline__ void load(const Conv& c, const Depth& at, unsigned char* stage) const {
    load_chunks<T, rows, threads, wide>(c, at, stage, [&](int i, const Depth& k) -> const T* {
      const int row = i * (threads / kRowChunks);
      const int64_t tap = k.row * c.weight_stride[2] + k.column * c.weight_stride[3] +
                          k.channel * (wide ? 1 : c.weight_stride[1]);
      return row < left && !k.ended(c) ? weight + (row * c.weight_stride[0] + tap) : nullptr;
    });
  }
};

}  // namespace fused_resnet::cuda
