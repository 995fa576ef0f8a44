// Pooling, forward. A thread computes n adjacent channels of a pooled pixel (channels_last) or one
// pooled pixel of a channel (contiguous, n = 1).
#pragma once

#include <limits>

#include "../windows.h"
#include "pool.cuh"

namespace fused_resnet::cuda {

constexpr int kColumnsAtOnce = 3;  // positions of a window whose loads are in flight together

// f(values, position) for each position of a window, in order; `pixel` elements lie between two
// neighbours of a row.
template <int n, class T, class F>
__device__ __forceinline__ void for_window(const PoolShape& s, const Window& rows,
                                           const Window& columns, const T* image, int64_t pixel,
                                           const F& f) {
  const int last_row = static_cast<int>(rows.last), last = static_cast<int>(columns.last);
#pragma unroll 1
  for (int kh = static_cast<int>(rows.first); kh < last_row; ++kh) {
    const int64_t row = (rows.begin + kh * s.dilation[0]) * s.width + columns.begin;
#pragma unroll 1
    for (int kw = static_cast<int>(columns.first); kw < last; kw += kColumnsAtOnce) {
      const T* at = image + (row + kw * s.dilation[1]) * pixel;
      Vector<T, n> loaded[kColumnsAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kColumnsAtOnce; ++i) {
        if (kw + i < last) loaded[i] = load<n>(at + i * s.dilation[1] * pixel);
      }
      const int position = static_cast<int>(kh * s.kernel[1] + kw);
#pragma unroll
      for (int i = 0; i < kColumnsAtOnce; ++i) {
        if (kw + i < last) f(widen(loaded[i]), position + i);
      }
    }
  }
}

// out, and in training where each maximum was. relu comes after the maximum: it changes no order.
template <class T, int n, bool kTraining>
__global__ void __launch_bounds__(Streaming::kThreads, kTraining ? 2 : 3)
    maxpool_kernel(Act act, bool channels_last, const __grid_constant__ PoolShape s, const T* x,
                   const Acc<T>* scale, const Acc<T>* shift, T* out, uint8_t* argmax) {
  using A = Acc<T>;
  const int64_t vectors = channels_last ? s.channels / n : 1;  // of a pixel
  const int64_t planes = channels_last ? s.batch : s.batch * s.channels;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= planes * s.out_height * s.out_width * vectors) return;
  const int64_t vector = i % vectors, pixel = i / vectors, line = pixel / s.out_width;
  const int64_t plane = line / s.out_height;
  const Window rows = window(s, 0, line % s.out_height);
  const Window columns = window(s, 1, pixel % s.out_width);
  const int64_t c = channels_last ? vector * n : plane % s.channels;
  const Wide<A, n> a = scale ? load_channels<n>(scale + c) : each<n>([](int) { return A(1); });
  const Wide<A, n> b = shift ? load_channels<n>(shift + c) : each<n>([](int) { return A(0); });
  auto best = each<n>([](int) { return static_cast<A>(-INFINITY); });
  const int start = static_cast<int>(rows.first * s.kernel[1] + columns.first);
  auto place = each<n>([&](int) { return start; });
  const T* image = x + plane * s.height * s.width * vectors * n + vector * n;
  for_window<n>(s, rows, columns, image, vectors * n, [&](const Wide<A, n>& v, int position) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const A y = math::scale_shift(v.at[j], a.at[j], b.at[j]);
      if constexpr (kTraining) {
        const bool wins = y > best.at[j] || y != y;  // the first of the largest, the last NaN
        best.at[j] = wins ? y : best.at[j];
        place.at[j] = wins ? position : place.at[j];
      } else {
        best.at[j] = math::maximum(best.at[j], y);
      }
    }
  });
  // A window that lies in the padding altogether has no relu's result in it.
  const bool empty = rows.first >= rows.last || columns.first >= columns.last;
  if (act == Act::relu && !empty) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (best.at[j] <= 0) place.at[j] = start;  // after relu, all are equal
      best.at[j] = math::relu(best.at[j]);
    }
  }
  store_narrow(out + i * n, best);
  if constexpr (kTraining) {
    Vector<uint8_t, n> bytes;
#pragma unroll
    for (int j = 0; j < n; ++j) bytes.at[j] = static_cast<uint8_t>(place.at[j]);
    store<n>(argmax + i * n, bytes);
  }
}

template <class T, bool kTraining, class Args>
Status launch_maxpool(const Args& args, bool channels_last, uint8_t* argmax, const Place& place) {
  using A = Acc<T>;
  const PoolShape& s = args.shape;
  const View view = pooled_view(s);
  const int64_t count = view.outer * view.channels;
  if (count == 0) return Status::ok;
  if (std::max(s.kernel[0], s.kernel[1]) > std::numeric_limits<int>::max())
    return Status::unsupported;
  const auto places = {args.x, args.scale, args.shift, static_cast<const void*>(args.out),
                       static_cast<const void*>(argmax)};
  const int n = channels_last ? choose_layout(args.dtype, view, places).n : 1;
  const auto kernel = n > 1 ? maxpool_kernel<T, kVectorBytes / sizeof(T), kTraining>
                            : maxpool_kernel<T, 1, kTraining>;
  return launch(kernel, ceil_div(count / n, Streaming::kThreads), Streaming::kThreads, 0,
                place.stream, args.act, channels_last, s, static_cast<const T*>(args.x),
                static_cast<const A*>(args.scale), static_cast<const A*>(args.shift),
                static_cast<T*>(args.out), argmax);
}

}  // namespace fused_resnet::cuda
