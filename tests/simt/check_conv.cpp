// Checks the CUDA convolution in every tile and with every number of splits, and the means over
// images of its result, against nested loops in double, within the bound that rounding every
// operation allows.
#include <cstring>

#include "../../csrc/kernels/cuda/conv.cuh"
#include "../../csrc/kernels/cuda/workspace.h"
#include "conv_problem.h"

using namespace fused_resnet;

namespace {

template <class T>
class Problem {
 public:
  Problem(const Case& c, bool tf32, bool epilogue)
      : s(c.shape()),
        name(c.text() + " dtype " + std::to_string(static_cast<int>(Type<T>::dtype)) +
             (tf32 ? " tf32" : "")),
        x(s.batch * s.height * s.width * s.in_channels, c.misaligned),
        weight(s.out_channels * s.kernel[0] * s.kernel[1] * s.in_channels / s.groups),
        residual(s.batch * s.out_height * s.out_width * s.out_channels, c.misaligned),
        scale(s.out_channels),
        shift(s.out_channels),
        offset(c.misaligned),
        product_unit(tf32 ? 0x1p-11 : 0) {
    check(cuda::describe(Type<T>::dtype, tf32, s, &conv), "sizes");
    conv.x = x.data();
    conv.weight = weight.data();
    if (epilogue) {
      conv.act = Act::relu;
      conv.scale = scale.data();
      conv.shift = shift.data();
      conv.residual = residual.data();
    }
    compute();
  }

  void run(const cuda::ConvPlan& plan) {
    const std::string what =
        name + " tile " + std::to_string(plan.tile) + " splits " + std::to_string(plan.splits);
    Array<T> out(residual.size, offset);
    Array<unsigned char> partial(cuda::partial_bytes(conv, plan));
    for (int64_t i = 0; i < out.size; ++i) out.data()[i] = T(NAN);
    conv.out = out.data();
    if (cuda::convolve(conv, plan, partial.data(), nullptr) != Status::ok)
      check_failed(what + ": status");
    for (int64_t i = 0; i < out.size; ++i)
      expect(what + ": element ", i, out.at(i), exact[i], bound[i]);
  }

  // The mean of each image, which is the same to the bit on every GPU.
  void run_means(const Bug<ConvBnActAvgpoolArgs>& bug) {
    ConvBnActAvgpoolArgs args{};
    args.conv.dtype = Type<T>::dtype;
    args.conv.act = conv.act;
    args.conv.shape = s;
    args.conv.x = conv.x;
    args.conv.weight = conv.weight;
    for (int d = 0; d < 4; ++d) args.conv.weight_stride[d] = conv.weight_stride[d];
    args.conv.scale = conv.scale;
    args.conv.shift = conv.shift;
    args.conv.residual = conv.residual;
    args.conv.tf32 = product_unit > 0;
    bug(args);
    const int64_t size = s.batch * s.out_channels;
    const Array<T> outs[2] = {Array<T>(size), Array<T>(size)};
    for (const Array<T>& out : outs) {
      const cuda::Gpu gpu = &out == outs ? cuda::Gpu{2, 80} : cuda::Gpu{132, 90};
      const Array<unsigned char> workspace(cuda::workspace_bytes(args, gpu));
      args.out = out.data();
      if (cuda::conv_bn_act_avgpool(args, {nullptr, gpu, workspace.data()}) != Status::ok)
        check_failed(name + ": status");
    }
    check(memcmp(outs[0].data(), outs[1].data(), size * sizeof(T)) == 0, "another GPU's means");
    for (int64_t i = 0; i < size; ++i) check_mean(outs[0], i);
  }

  cuda::Conv conv;

 private:
  static void expect(const std::string& what, int64_t i, double got, double expected,
                     double within) {
    if (!(std::fabs(got - expected) <= within))
      check_failed(what + std::to_string(i) + " is " + std::to_string(got) + ", expected " +
                   std::to_string(expected) + " within " + std::to_string(within));
  }

  void check_mean(const Array<T>& out, int64_t i) const {
    const int64_t pixels = s.out_height * s.out_width;
    const int64_t first = i / s.out_channels * pixels * s.out_channels + i % s.out_channels;
    double mean = 0, off = 0, magnitude = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t at = first + p * s.out_channels;
      mean += exact[at] / pixels;
      off += bound[at] / pixels;
      magnitude += (std::fabs(exact[at]) + bound[at]) / pixels;
    }
    constexpr int kAdded = 66;  // the pixels of a tile, and what rounds the sum of tiles
    off += kAdded * (sizeof(T) == 8 ? 0x1p-53 : 0x1p-24) * magnitude;
    expect(name + ": mean ", i, out.at(i), mean,
           off + Type<T>::unit * (std::fabs(mean) + off) + Type<T>::least);
  }

  // The weight is dense as channels_last has it.
  void compute() {
    const int64_t in = s.in_channels / s.groups;
    const int64_t steps = s.kernel[0] * s.kernel[1] * in + 20;
    for (int64_t i = 0; i < residual.size; ++i) {
      const int64_t k = i % s.out_channels;
      const Sum sum = convolved(
          s, i, [&](int64_t at) { return x.at(at); },
          [&](int64_t k, int64_t c, int64_t kh, int64_t kw) {
            return weight.at(((k * s.kernel[0] + kh) * s.kernel[1] + kw) * in + c);
          });
      const double a = conv.scale ? scale.at(k) : 1, b = conv.shift ? shift.at(k) : 0;
      const double added = conv.residual ? residual.at(i) : 0;
      const double value = sum.value * a + b + added;
      exact.push_back(conv.act == Act::relu && value < 0 ? 0 : value);
      const double unit = sizeof(T) == 8 ? 0x1p-52 : 0x1p-24;
      const double summed = (steps * unit + 2 * product_unit) *
                            (sum.magnitude * std::fabs(a) + std::fabs(b) + std::fabs(added));
      bound.push_back(summed + Type<T>::unit * (std::fabs(value) + summed) + Type<T>::least);
    }
  }

  const ConvShape s;
  const std::string name;
  const Array<T> x, weight, residual;
  const Array<Acc<T>> scale, shift;
  const int64_t offset;
  const double product_unit;
  std::vector<double> exact, bound;
};

template <class T>
void run_all(bool tf32) {
  const int64_t n = 16 / sizeof(T), stage = cuda::kConvRowBytes / sizeof(T);
  std::vector<Case> cases = at_tile_edges(n);
  for (int64_t stages = 1; stages <= 5; ++stages)  // and of the pipeline
    for (int64_t near : {-n, -int64_t{1}, int64_t{0}, int64_t{1}, n})
      cases.push_back({1, 2, 3, stages * stage + near, 9});
  cases.push_back({2, 7, 5, 2 * n, 3, 3, 2, 1});
  cases.push_back({2, 6, 7, n, 2 * n, 3, 1, 2, 2});
  cases.push_back({1, 11, 9, 3, 8, 7, 2, 3});
  cases.push_back({2, 5, 4, 4 * n, 4 * n, 3, 1, 1, 1, 4});
  cases.push_back({2, 5, 4, 12, 18, 3, 2, 1, 1, 3});
  cases.push_back({2, 3, 3, 8, 8, 3, 1, 1, 1, 8});
  cases.push_back({2, 3, 3, n, n, 1, 3, 4});
  cases.push_back({1, 5, 5, 2 * n, n, 3, 1, 1, 1, 1, 1});
  int count = 0;
  for (const Case& c : cases) {
    const bool epilogue = (&c - cases.data()) % 3 > 0;
    Problem<T> problem(c, tf32, epilogue);
    const cuda::Conv& conv = problem.conv;
    for (int tile = 0; tile < cuda::kConvTileCount; ++tile) {
      if (!cuda::conv_has_tile(cuda::sizes_of(conv), tile)) continue;
      for (int splits : {1, 2 + tile % 2}) {
        if (splits > 1 && count % 3 > 0 && cuda::conv_stages(cuda::sizes_of(conv)) == 1) continue;
        problem.run({tile, splits});
        ++count;
      }
    }
  }
  printf("%d runs\n", count);
}

// Images of a tile of 64 pixels, of less, of more and of several; channels at the edge of theirs.
template <class T>
void run_means(bool tf32, const Bug<ConvBnActAvgpoolArgs>& bug) {
  const int64_t n = 16 / sizeof(T);
  const Case cases[] = {
      {3, 7, 7, n, 65},
      {2, 7, 9, 3 * n, 64, 3, 1, 1},
      {2, 8, 8, n, 63},
      {2, 5, 13, n, n},
      {1, 11, 12, 2 * n, 3 * n, 3, 1, 1},
      {2, 13, 11, n, 2 * n, 3, 2, 2, 2},
      {2, 9, 15, 3, 8, 2, 1, 0},
      {2, 5, 14, 4 * n, 4 * n, 3, 1, 1, 1, 4},
      {2, 6, 12, n, n, 1, 1, 0, 1, 1, 1},
      {2, 2, 33, 4 * static_cast<int64_t>(cuda::kConvRowBytes / sizeof(T)) + n, 9},
  };
  for (const Case& c : cases) Problem<T>(c, tf32, &c != cases).run_means(bug);
  printf("%zu runs\n", std::size(cases));
}

}  // namespace

// What every plan has to hold to, over the layers of ResNets and beyond.
void check_conv_plan(int, char**) {
  int split = 0, large = 0;
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (int64_t pixels : {1, 49, 196, 784, 3136, 12544, 401408, 1 << 26})
      for (int64_t columns : {1, 4, 63, 64, 65, 128, 512, 2048})
        for (int64_t depth : {0, 3, 27, 64, 576, 2048, 4608})
          for (int multiprocessors : {1, 16, 108, 132})
            for (int64_t groups : {1, 32}) {
              const cuda::Gpu gpu{multiprocessors, 80};
              const cuda::Math math = dtype == DType::f64 ? cuda::Math::scalar : cuda::Math::tensor;
              const bool wide = depth % 8 == 0 && dtype != DType::f64;
              const cuda::ConvSizes s{dtype, math, wide, pixels, columns, depth, groups};
              const cuda::ConvPlan plan = cuda::plan_conv(s, gpu, true);
              check(plan.tile >= 0 && plan.tile < cuda::kConvTileCount, "tile");
              check(cuda::conv_has_tile(s, plan.tile), "a tile that is not compiled");
              check(cuda::plan_conv(s, gpu, false).splits == 1, "splits that were not allowed");
              const int64_t stages = cuda::conv_stages(s);
              check(plan.splits == 1 || stages / plan.splits >= cuda::kConvSplitStages / 2,
                    "splits of almost nothing");
              check(plan.splits == 1 ||
                        cuda::ceil_div(stages, cuda::ceil_div(stages, plan.splits)) == plan.splits,
                    "a split that is empty");
              const int64_t blocks = cuda::conv_blocks(s, cuda::kConvTiles[plan.tile]);
              check(plan.tile == 0 || blocks >= multiprocessors, "idle multiprocessors");
              split += plan.splits > 1;
              large += plan.tile == 2;

              const cuda::WgradPlan of_weight =
                  cuda::plan_wgrad({dtype, math, wide, columns, depth + 1, pixels, groups}, gpu);
              for (const cuda::WgradPlan& p : {of_weight, cuda::plan_gram(columns, pixels, gpu)}) {
                check(p.split_pixels % cuda::kStagePixels == 0, "a split that ends within a stage");
                check(p.splits * p.split_pixels >= pixels, "pixels that no split has");
                check((p.splits - 1) * p.split_pixels < pixels, "a split that is empty");
              }
            }
  check(split > 0 && large > 0, "nothing is ever split, or large");
}

void check_conv(int argc, char** argv) {
  check(argc == 1, "expected a dtype");
  with_type(argv[0], [](auto type, bool tf32) { run_all<decltype(type)>(tf32); });
}

void check_avgpool(int argc, char** argv) {
  const auto bug = planted<ConvBnActAvgpoolArgs>(
      {
          {"no_row", [](auto& args) { --args.conv.shape.out_height; }},
          {"no_residual", [](auto& args) { args.conv.residual = nullptr; }},
          {"no_relu", [](auto& args) { args.conv.act = Act::none; }},
      },
      argc, argv);
  with_type(argv[0], [&](auto type, bool tf32) { run_means<decltype(type)>(tf32, bug); });
}
