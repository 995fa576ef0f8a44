// The operands of conv_wgrad.cuh's kernels that are both normalised on the way.
#pragma once

#include "conv_wgrad.cuh"
#include "prologue.cuh"

namespace fused_resnet::cuda {

// What changes `width` values of a stage: of grad, which has no center, or of x, beside which there
// is no other image. It lies in shared memory, and registers are left for sums.
template <class T, int width, bool of_grad>
struct alignas(kVectorBytes) Changes {
  using A = Acc<T>;
  static constexpr int n = kVectorBytes / sizeof(A);  // that are changed at a time
  A scale[width], shift[width], third[width];

  // The thread's; where no channel is there, nothing is changed. A barrier has to follow.
  __device__ __forceinline__ void set(const Prologue& in, int channel, bool there) {
    const Change<T, 1> of = change_at<T, 1>(there ? in : Prologue{}, channel);
    scale[threadIdx.x] = of.scale.at[0];
    shift[threadIdx.x] = of.shift.at[0];
    third[threadIdx.x] = of_grad ? of.slope.at[0] : of.center.at[0];
  }

  // Those of `values`, from the tile's value `first` on, that are inside; others are zero.
  template <int count, class Inside>
  __device__ __forceinline__ void apply(Vector<T, count>& values, const Vector<T, count>& other,
                                        int first, Act act, const Inside& inside) const {
    const auto zeros = each<n>([](int) { return A{}; });
#pragma unroll
    for (int i = 0; i < count; i += n) {
      const auto last = load_channels<n>(third + first + i);
      const Change<T, n> change{load_channels<n>(scale + first + i), of_grad ? last : zeros,
                                load_channels<n>(shift + first + i), of_grad ? zeros : last, act};
#pragma unroll
      for (int k = i; k < i + n; ++k)
        values.at[k] = inside(k) ? change(values.at[k], other.at[k], k - i) : T{};
    }
  }
};

template <class B>
struct ChainWgradOperands {
  using T = typename B::T;
  using Rows = StagedOperand<B, B::kRows>;
  using Columns = StagedOperand<B, B::kColumns>;
  struct Given {
    const T* grad;
    Prologue rows, columns;  // of grad and x
  };
  struct Shared {
    Changes<T, B::kRows, true> rows;
    Changes<T, B::kColumns, false> columns;
  };
  const Conv& c;
  const Given& given;
  Shared& shared;
  const int first_channel;  // of the group, in grad
  const T* x;               // of the group
  Channel row;
  Depth column;
  Rows rows, others;
  Columns columns;
  typename B::Sums sums;

  __device__ __forceinline__ ChainWgradOperands(const Conv& c, const Given& given, int group,
                                                int first_row, int first_column, Shared& shared)
      : c(c),
        given(given),
        shared(shared),
        first_channel(group * c.group_out_channels()),
        x(static_cast<const T*>(c.x) + group * c.group_channels()),
        row{first_row + Rows::first_value()},
        column(c, first_column + Columns::first_value()) {
    const int mine = threadIdx.x;
    if (mine < B::kRows)
      shared.rows.set(given.rows, first_channel + first_row + mine,
                      first_row + mine < c.group_out_channels());
    if (mine < B::kColumns) {
      const Depth at(c, first_column + mine);
      shared.columns.set(given.columns, group * c.group_channels() + at.channel, !at.ended(c));
    }
  }

  __device__ __forceinline__ void fetch(unsigned char* stage, int slot, const Source* sources,
                                        int64_t first) {
    auto of = [&](const T* image) {
      return [=](int pixel, const Channel& k) -> const T* {
        const bool inside = k.at < c.group_out_channels() && first + pixel < c.pixels();
        return inside ? image + (first + pixel) * c.out_channels + first_channel + k.at : nullptr;
      };
    };
    rows.fetch(c, row, stage, slot, of(given.grad));
    if (given.rows.other)
      others.fetch(c, row, stage + B::kOperandBytes, slot,
                   of(static_cast<const T*>(given.rows.other)));
    columns.fetch(c, column, stage + B::kRowsBytes, slot, [&](int pixel, const Depth& k) {
      const Source s = sources[pixel];
      return input_at(c, x, s.in, s.h, s.w, k);
    });
  }
  __device__ __forceinline__ void arrive(unsigned char* stage, int slot, int64_t) const {
    if (changes(given.rows)) {
      rows.each(stage, slot, [&](auto& v, const auto& inside, int place) {
        Vector<T, Rows::n> other = {};
        if (given.rows.other)
          other = load<Rows::n>(reinterpret_cast<const T*>(stage + B::kOperandBytes + place));
        shared.rows.apply(v, other, Rows::first_value(), given.rows.act, inside);
      });
    }
    arrive_columns(stage, slot);
  }
  __device__ __forceinline__ void arrive_columns(unsigned char* stage, int slot) const {
    if (!changes(given.columns)) return;
    columns.each(stage + B::kRowsBytes, slot, [&](auto& v, const auto& inside, int) {
      shared.columns.apply(v, {}, Columns::first_value(), given.columns.act, inside);
    });
  }
  __device__ __forceinline__ void multiply(const unsigned char* stage, int) {
    sums.template multiply_by_depth<B::kDepth>(stage, stage + B::kRowsBytes);
  }
  __device__ __forceinline__ void finish(int) const {}
};

}  // namespace fused_resnet::cuda
