// How kernels go over a view of [outer, channels, inner]. A thread works on vectors of adjacent
// elements, all in the same channels, so that what it needs of those stays in registers; it strides
// over rows where inner is 1, over the pixels of a plane, and then over images, where it is not.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "launch.h"
#include "vec.cuh"

namespace fused_resnet::cuda {

// Vectors of n adjacent elements: of n channels, in planes of n pixels of one channel.
template <int n_, bool planes>
struct Layout {
  static constexpr int n = n_;
  static constexpr bool kPlanes = planes;
  static constexpr int kChannels = planes ? 1 : n;
};

// One number for each of a vector's elements that depends on its channel.
template <class A, class L>
struct PerChannel {
  A at[L::kChannels];
  __device__ __forceinline__ A operator[](int j) const { return at[L::kPlanes ? 0 : j]; }
};

template <class L, class A>
__device__ __forceinline__ PerChannel<A, L> per_channel(const A* p, int64_t channel) {
  PerChannel<A, L> values;
#pragma unroll
  for (int j = 0; j < L::kChannels; ++j) values.at[j] = p[channel + j];
  return values;
}

struct View {
  int64_t outer, channels, inner;
};

// A thread's way: `count` vectors, `step` elements apart, from `at` on; all of it `repeats` times,
// `repeat_step` apart. No way at all has count 0.
struct Walk {
  int64_t channel, at, step, count, repeat_step, repeats;
};

// The launch: `splits` times `tiles` blocks. A tile is `slots` vectors of channels; each has
// `lanes` threads, which share with those of the other splits what there is in its channels.
struct Traversal {
  View view;
  int lanes, slots;
  int64_t tiles, outer_splits, inner_splits;

  __host__ __device__ int64_t splits() const { return outer_splits * inner_splits; }
  __host__ __device__ int threads() const { return lanes * slots; }
  int64_t blocks() const { return tiles * splits(); }

  // Threads beside each other read what lies beside each other.
  template <class L>
  __host__ __device__ int lane_of(int thread) const {
    return L::kPlanes ? thread % lanes : thread / slots;
  }
  template <class L>
  __host__ __device__ int slot_of(int thread) const {
    return L::kPlanes ? thread / lanes : thread % slots;
  }

  template <class L>
  __host__ __device__ Walk walk(int64_t block, int thread) const {
    const int64_t split = block / tiles;
    const int lane = lane_of<L>(thread);
    Walk w{};
    w.channel = (block % tiles * slots + slot_of<L>(thread)) * L::kChannels;
    if (w.channel >= view.channels) return w;
    const int64_t length = L::kPlanes ? view.inner / L::n : view.outer;
    const int64_t first = (L::kPlanes ? split % inner_splits : split) * lanes + lane;
    const int64_t stride = (L::kPlanes ? inner_splits : outer_splits) * lanes;
    const int64_t image = L::kPlanes ? split / inner_splits : 0;
    w.count = first < length ? (length - first - 1) / stride + 1 : 0;
    if constexpr (L::kPlanes) {
      w.at = (image * view.channels + w.channel) * view.inner + first * L::n;
      w.step = stride * L::n;
      w.repeats = image < view.outer ? (view.outer - image - 1) / outer_splits + 1 : 0;
      w.repeat_step = outer_splits * view.channels * view.inner;
    } else {
      w.at = first * view.channels + w.channel;
      w.step = stride * view.channels;
      w.repeats = 1;
    }
    return w;
  }
};

// The sizes of those launches.
struct Channels {
  static constexpr int kThreads = 256;
  static constexpr int kLineVectors = 8;    // of 16 bytes: a line of the cache
  static constexpr int kLineElements = 32;  // the same where elements are moved one by one
  static constexpr int kMapSteps = 4;       // of a thread that maps, at least, if there are as many
  static constexpr int kMapBlocks = 16;     // for each multiprocessor; beyond that threads go on
  static constexpr int kReduceSteps = 8;    // of a thread that reduces, likewise
  static constexpr int kReduceBlocks = 4;
  static constexpr int kLongestWalk = 64;  // of a thread that reduces: sums stay short, and exact
  static constexpr int kFinishChannels = 32;  // of a block that joins splits
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The power of two that is at least n, but at most `most`, a power of two too.
constexpr int power_of_two(int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

// Which Layout fits.
struct LayoutChoice {
  int n;
  bool planes;
};

// For tensors of `dtype` at these places, null where there is none.
inline LayoutChoice choose_layout(DType dtype, const View& view,
                                  std::initializer_list<const void*> places) {
  const int n = kVectorBytes / element_bytes(dtype);
  const bool planes = view.inner != 1;
  const bool aligned = std::all_of(places.begin(), places.end(), vector_aligned);
  return {aligned && (planes ? view.inner : view.channels) % n == 0 ? n : 1, planes};
}

// Calls f with the Layout that was chosen for tensors of T.
template <class T, class F>
Status with_layout(const LayoutChoice& choice, const F& f) {
  constexpr int n = kVectorBytes / sizeof(T);
  if (choice.planes) return choice.n > 1 ? f(Layout<n, true>{}) : f(Layout<1, true>{});
  return choice.n > 1 ? f(Layout<n, false>{}) : f(Layout<1, false>{});
}

// Of one split: as few blocks as cover the channels.
inline Traversal one_split(const View& view, const LayoutChoice& layout) {
  Traversal t{view, 1, 1, 0, 1, 1};
  if (layout.planes) {
    t.lanes = power_of_two(view.inner / layout.n, Channels::kThreads);
    t.slots = power_of_two(view.channels, Channels::kThreads / t.lanes);
    t.tiles = ceil_div(view.channels, t.slots);
  } else {
    const int64_t vectors = view.channels / layout.n;
    t.slots =
        power_of_two(vectors, layout.n > 1 ? Channels::kLineVectors : Channels::kLineElements);
    t.lanes = power_of_two(view.outer, Channels::kThreads / t.slots);
    t.tiles = ceil_div(vectors, t.slots);
  }
  return t;
}

// For a kernel that maps every element. Images of planes have blocks of their own.
inline Traversal map_traversal(const View& view, const LayoutChoice& layout, const Gpu& gpu) {
  Traversal t = one_split(view, layout);
  const int64_t steps = t.lanes * Channels::kMapSteps;
  if (layout.planes) {
    t.outer_splits = view.outer;
    t.inner_splits = ceil_div(view.inner / layout.n, steps);
  } else {
    const int64_t most = ceil_div(int64_t{gpu.multiprocessors} * Channels::kMapBlocks, t.tiles);
    t.outer_splits = std::min(ceil_div(view.outer, steps), most);
  }
  return t;
}

// For a kernel that reduces each channel.
inline Traversal reduce_traversal(const View& view, const LayoutChoice& layout, const Gpu& gpu) {
  Traversal t = one_split(view, layout);
  const int64_t images = layout.planes ? view.outer : 1;
  const int64_t length = layout.planes ? view.inner / layout.n : view.outer;
  const int64_t walk = images * ceil_div(length, t.lanes);
  if (walk <= Channels::kLongestWalk) return t;
  const int64_t fill = ceil_div(int64_t{gpu.multiprocessors} * Channels::kReduceBlocks, t.tiles);
  const int64_t splits = std::max(ceil_div(walk, Channels::kLongestWalk),
                                  std::min(ceil_div(walk, Channels::kReduceSteps), fill));
  if (layout.planes) {
    t.outer_splits = std::min(images, splits);
    t.inner_splits = std::min(ceil_div(splits, t.outer_splits), ceil_div(length, t.lanes));
  } else {
    t.outer_splits = splits;
  }
  return t;
}

// Vectors a thread loads before it uses the first, `operands` of them at each place.
template <int operands>
constexpr int kUnroll = operands == 1 ? 4 : 2;

// Calls use(loaded, at) for every vector of the walk, in order; loaded is what load(at) returned.
template <int unroll, class Load, class Use>
__device__ __forceinline__ void follow(const Walk& w, const Load& load, const Use& use) {
#pragma unroll 1
  for (int64_t r = 0; r < w.repeats; ++r) {
    const int64_t start = w.at + r * w.repeat_step;
#pragma unroll 1
    for (int64_t k = 0; k < w.count; k += unroll) {
      decltype(load(int64_t{})) loaded[unroll] = {};
#pragma unroll
      for (int u = 0; u < unroll; ++u)
        if (k + u < w.count) loaded[u] = load(start + (k + u) * w.step);
#pragma unroll
      for (int u = 0; u < unroll; ++u)
        if (k + u < w.count) use(loaded[u], start + (k + u) * w.step);
    }
  }
}

// An Op that maps has
//   kOperands, how many vectors load() reads,
//   prepare<L>(channel), what it keeps of the channels from `channel` on,
//   load<n>(at), the vectors at that element, and
//   apply<L>(prepared, loaded, at), which computes and stores.
template <class L, class Op>
__global__ void __launch_bounds__(Channels::kThreads, 2) map_channels_kernel(Traversal t, Op op) {
  const Walk w = t.walk<L>(blockIdx.x, threadIdx.x);
  if (w.count == 0) return;
  const auto prepared = op.template prepare<L>(w.channel);
  follow<kUnroll<Op::kOperands>>(
      w, [&](int64_t at) { return op.template load<L::n>(at); },
      [&](const auto& loaded, int64_t at) { op.template apply<L>(prepared, loaded, at); });
}

// Over tensors at `places`.
template <class T, class Op>
Status map_channels(DType dtype, const View& view, std::initializer_list<const void*> places,
                    const Place& place, const Op& op) {
  if (view.outer * view.channels * view.inner == 0) return Status::ok;
  const LayoutChoice choice = choose_layout(dtype, view, places);
  const Traversal t = map_traversal(view, choice, place.gpu);
  return with_layout<T>(choice, [&](auto layout) {
    return launch(map_channels_kernel<decltype(layout), Op>, t.blocks(), t.threads(), 0,
                  place.stream, t, op);
  });
}

}  // namespace fused_resnet::cuda
