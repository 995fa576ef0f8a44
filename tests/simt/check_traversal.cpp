// Checks how launches divide a view of [outer, channels, inner]: every element belongs to exactly
// one thread, whatever the GPU, and walks and grids keep to their bounds.
#include <map>
#include <vector>

#include "../../csrc/kernels/cuda/channels.cuh"
#include "check.h"

using namespace fused_resnet;
using namespace fused_resnet::cuda;

namespace {

std::string text(const Traversal& t, int n) {
  const int64_t numbers[] = {t.view.outer, t.view.channels, t.view.inner,  n, t.lanes, t.slots,
                             t.tiles,      t.outer_splits,  t.inner_splits};
  std::string s;
  for (int64_t number : numbers) s += " " + std::to_string(number);
  return s;
}

// Returns the longest way of a thread.
template <class L>
int64_t check_covers(const Traversal& t, bool whole_channels) {
  const View& v = t.view;
  std::vector<int> visits(v.outer * v.channels * v.inner);
  std::map<int64_t, int64_t> splits_of;  // that reach a channel
  int64_t longest = 0;
  for (int64_t block = 0; block < t.blocks(); ++block) {
    for (int thread = 0; thread < t.threads(); ++thread) {
      const Walk w = t.walk<L>(block, thread);
      if (w.channel >= v.channels) continue;
      if (t.lane_of<L>(thread) == 0) ++splits_of[w.channel];
      longest = std::max(longest, w.count * w.repeats);
      for (int64_t r = 0; r < w.repeats; ++r)
        for (int64_t k = 0; k < w.count; ++k)
          for (int j = 0; j < L::n; ++j) {
            const int64_t at = w.at + r * w.repeat_step + k * w.step + j;
            check(at >= 0 && at < int64_t(visits.size()), "inside the view");
            check(at / v.inner % v.channels == w.channel + (L::kPlanes ? 0 : j), "its channel");
            ++visits[at];
          }
    }
  }
  for (int count : visits)
    if (count != 1) check_failed("every element once:" + text(t, L::n));
  if (whole_channels)
    for (auto [channel, splits] : splits_of) check(splits == t.splits(), "splits of a channel");
  return longest;
}

template <class L>
void check_view(const View& view) {
  const LayoutChoice layout{L::n, L::kPlanes};
  for (int multiprocessors : {1, 2, 132}) {
    const Gpu gpu{multiprocessors, 80};
    const Traversal map = map_traversal(view, layout, gpu);
    const Traversal reduce = reduce_traversal(view, layout, gpu);
    for (const Traversal& t : {map, reduce})
      check(t.threads() <= Channels::kThreads && t.blocks() > 0, "a launch that can be made");
    check_covers<L>(map, false);
    const int64_t longest = check_covers<L>(reduce, true);
    if (longest > Channels::kLongestWalk) check_failed("a long way:" + text(reduce, L::n));
  }
}

}  // namespace

void check_traversal(int, char**) {
  int views = 0;
  for (int64_t outer : {1, 2, 7, 65, 300, 2100})
    for (int64_t channels : {1, 3, 8, 17, 64, 96})
      for (int64_t inner : {1, 2, 9, 16, 49, 784, 1032, 2500}) {
        if (outer * channels * inner > 1 << 18) continue;
        const View view{outer, channels, inner};
        ++views;
        if (inner != 1) {
          check_view<Layout<1, true>>(view);
          if (inner % 8 == 0) check_view<Layout<8, true>>(view);
        } else {
          check_view<Layout<1, false>>(view);
          if (channels % 8 == 0) check_view<Layout<8, false>>(view);
        }
      }
  check_view<Layout<1, true>>({1, 2, 70000});
  check_view<Layout<8, false>>({5000, 64, 1});
  check(views > 100, "views");

  // Alignment and divisibility decide on vectors; what is not there does not count.
  const char* place = reinterpret_cast<const char*>(64);
  auto n = [&](DType dtype, const View& view, int offset) {
    return choose_layout(dtype, view, {place, place + offset, nullptr}).n;
  };
  check(n(DType::f16, {5, 24, 1}, 0) == 8 && n(DType::f32, {5, 24, 1}, 0) == 4, "rows");
  check(n(DType::f64, {5, 3, 24}, 0) == 2 && n(DType::bf16, {5, 3, 24}, 0) == 8, "planes");
  check(n(DType::f16, {5, 12, 1}, 0) == 1 && n(DType::f16, {5, 8, 12}, 0) == 1, "ragged");
  check(n(DType::f16, {5, 24, 1}, 2) == 1, "misaligned");
}
