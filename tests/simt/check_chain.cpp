// Checks the CUDA convolution of chains in every tile, with whatever it may read, add, mask and
// reduce, against nested loops in double, within the bound that rounding every operation allows;
// what is reduced, against what was stored.
#include "../../csrc/kernels/cuda/conv_chain.cuh"
#include "conv_problem.h"

using namespace fused_resnet;

namespace {

// What is done around the products; all of it in turn, and together.
struct Around {
  bool normalised = false, two = false, centered = false, second = false;
  bool epilogue = false, masked = false, reduced = false;
};
constexpr Around kArounds[] = {
    {.normalised = true},
    {.normalised = true, .epilogue = true, .reduced = true},
    {.normalised = true, .two = true, .masked = true, .reduced = true},
    {.normalised = true, .centered = true, .second = true, .epilogue = true},
    {.normalised = true,
     .two = true,
     .centered = true,
     .second = true,
     .epilogue = true,
     .masked = true,
     .reduced = true},
    {.reduced = true},
};

template <class T>
double rounded(double value) {
  return static_cast<double>(static_cast<Acc<T>>(T(static_cast<Acc<T>>(value))));
}

// An operand's image with what normalises it, and the weight it is multiplied by.
template <class T>
struct Operand {
  const ConvShape s;
  const Array<T> x, other, weight;
  const Array<Acc<T>> scale, shift, slope, center;

  Operand(const ConvShape& s, int64_t misaligned)
      : s(s),
        x(s.batch * s.height * s.width * s.in_channels, misaligned),
        other(x.size, misaligned),
        weight(s.out_channels * s.kernel[0] * s.kernel[1] * s.in_channels / s.groups),
        scale(s.in_channels),
        shift(s.in_channels),
        slope(s.in_channels),
        center(s.in_channels) {}

  void describe(bool tf32, const Around& a, bool two, cuda::Product* p) const {
    check(cuda::describe(Type<T>::dtype, tf32, s, &p->conv), "sizes");
    p->conv.x = x.data();
    p->conv.weight = weight.data();
    if (!a.normalised) return;
    p->in = {Act::relu, scale.data(), shift.data(), nullptr, nullptr, nullptr};
    if (a.centered) p->in.center = center.data();
    if (two) {
      p->in.other = other.data();
      p->in.slope = slope.data();
    }
  }

  // What is multiplied, and how far rounding may put it beside.
  Sum read(const Prologue& in, int64_t at) const {
    if (!in.scale) return {x.at(at), 0};
    const int64_t c = at % s.in_channels;
    double z = x.at(at) * scale.at(c) + shift.at(c);
    double magnitude = std::fabs(x.at(at) * scale.at(c)) + std::fabs(shift.at(c));
    if (in.other) {
      z += other.at(at) * slope.at(c);
      magnitude += std::fabs(other.at(at) * slope.at(c));
    }
    z = rounded<T>(z < 0 ? 0 : z);
    if (in.center) z = rounded<T>(z - rounded<T>(center.at(c)));
    const double unit = 2 * Type<T>::unit + (sizeof(T) == 8 ? 0x1p-51 : 0x1p-23);
    return {z, unit * (magnitude + std::fabs(z) + (in.center ? 1 : 0))};
  }

  // The sums of output element i: of the products, of their magnitudes, of how far they may be off.
  void add(const Prologue& in, int64_t i, Sum* sum, double* off) const {
    const int64_t channels = s.in_channels / s.groups;
    auto w = [&](int64_t k, int64_t c, int64_t kh, int64_t kw) {
      return weight.at(((k * s.kernel[0] + kh) * s.kernel[1] + kw) * channels + c);
    };
    const Sum products = convolved(s, i, [&](int64_t at) { return read(in, at).value; }, w);
    sum->value += products.value;
    sum->magnitude += products.magnitude;
    *off += convolved(s, i, [&](int64_t at) { return read(in, at).magnitude; }, w).magnitude;
  }
};

template <class T>
class Problem {
 public:
  Problem(const Case& c, bool tf32, const Around& around)
      : around(around),
        s(c.shape()),
        name(c.text() + " dtype " + std::to_string(static_cast<int>(Type<T>::dtype)) +
             (tf32 ? " tf32" : "") + " around " + std::to_string(&around - kArounds)),
        first(s, c.misaligned),
        second(measured(conv_shape(s.batch, s.out_height, s.out_width, s.out_channels,
                                   s.out_channels, 1)),
               c.misaligned),
        residual(s.batch * s.out_height * s.out_width * s.out_channels, c.misaligned),
        mask(residual.size, c.misaligned),
        scale(s.out_channels),
        shift(s.out_channels),
        mean(s.out_channels),
        offset(c.misaligned),
        product_unit(tf32 ? 0x1p-11 : 0) {
    first.describe(tf32, around, around.two, &chain.products[0]);
    chain.count = 1 + around.second;
    if (around.second) second.describe(tf32, around, false, &chain.products[1]);
    cuda::Conv& conv = chain.products[0].conv;
    if (around.epilogue) {
      conv.scale = scale.data();
      conv.shift = shift.data();
      conv.residual = residual.data();
    }
    if (around.masked) {
      chain.mask_x = mask.data();
      chain.mask_scale = scale.data();
      chain.mask_shift = shift.data();
      chain.mask_mean = mean.data();
    }
  }

  void run(int tile, const Bug<cuda::Chain>& bug) {
    const cuda::ConvTile& of = cuda::kConvTiles[tile];
    const cuda::ChainPlan plan{tile, cuda::ceil_div(residual.size / s.out_channels, of.rows)};
    what = name + " tile " + std::to_string(tile) + ": ";
    Array<T> out(residual.size, offset);
    for (int64_t i = 0; i < out.size; ++i) out.data()[i] = T(NAN);
    const Array<Acc<T>> sums(2 * plan.tiles * s.out_channels);
    cuda::Chain given = chain;
    given.products[0].conv.out = given.products[1].conv.out = out.data();
    if (around.reduced) {
      given.first = sums.data();
      given.second = sums.data() + sums.size / 2;
    }
    bug(given);
    if (cuda::convolve(given, plan, nullptr) != Status::ok) check_failed(what + "status");
    for (int64_t i = 0; i < out.size; ++i) check_element(out, i);
    if (around.reduced)
      for (int64_t i = 0; i < sums.size / 2; ++i)
        check_sums(out, i, of.rows, sums.at(i), sums.at(sums.size / 2 + i));
  }

  cuda::Chain chain{};

 private:
  void expect(double got, double exact, double bound, int64_t at, const char* of) const {
    if (!(std::fabs(got - exact) <= bound))
      check_failed(what + of + " " + std::to_string(at) + " is " + std::to_string(got) +
                   ", expected " + std::to_string(exact) + " within " + std::to_string(bound));
  }

  void check_element(const Array<T>& out, int64_t i) const {
    const int64_t k = i % s.out_channels;
    if (around.masked) {
      const double z = mask.at(i) * scale.at(k) + shift.at(k);
      if (std::fabs(z) < 0x1p-10) return;  // rounding may decide
      if (z < 0) return expect(out.at(i), 0, 0, i, "masked");
    }
    Sum sum;
    double off = 0;
    first.add(chain.products[0].in, i, &sum, &off);
    if (around.second) second.add(chain.products[1].in, i, &sum, &off);
    const double a = around.epilogue ? scale.at(k) : 1, b = around.epilogue ? shift.at(k) : 0;
    const double added = around.epilogue ? residual.at(i) : 0, value = sum.value * a + b + added;
    const double steps = s.kernel[0] * s.kernel[1] * s.in_channels + s.out_channels + 20;
    const double unit = sizeof(T) == 8 ? 0x1p-52 : 0x1p-24;
    const double summed =
        (steps * unit + 2 * product_unit) *
            ((sum.magnitude + off) * std::fabs(a) + std::fabs(b) + std::fabs(added)) +
        off * std::fabs(a);
    expect(out.at(i), value, summed + Type<T>::unit * (std::fabs(value) + summed) + Type<T>::least,
           i, "element");
  }

  // What is left of a tile's channel, of what was stored.
  void check_sums(const Array<T>& out, int64_t at, int64_t rows, double got_first,
                  double got_second) const {
    const int64_t k = at % s.out_channels, pixels = out.size / s.out_channels;
    const int64_t from = at / s.out_channels * rows, end = std::min(from + rows, pixels);
    const double unit = (sizeof(T) == 8 ? 0x1p-52 : 0x1p-23) * rows;
    double total = 0, moments = 0, size = 0, other_size = 0;
    for (int64_t p = from; p < end; ++p) {
      const int64_t i = p * s.out_channels + k;
      const double product = out.at(i) * (mask.at(i) - mean.at(k));
      total += out.at(i);
      moments += product;
      size += std::fabs(out.at(i));
      other_size += std::fabs(product);
    }
    if (around.masked) {
      expect(got_first, total, unit * size, at, "sum");
      return expect(got_second, moments, unit * other_size, at, "sum of products");
    }
    const double average = total / (end - from);
    double deviations = 0;
    for (int64_t p = from; p < end; ++p) {
      const double away = out.at(p * s.out_channels + k) - average;
      deviations += away * away;
    }
    expect(got_first, average, unit * size, at, "mean");
    expect(got_second, deviations, unit * (deviations + 1), at, "deviations");
  }

  const Around& around;
  const ConvShape s;
  const std::string name;
  std::string what;
  const Operand<T> first, second;
  const Array<T> residual, mask;
  const Array<Acc<T>> scale, shift, mean;
  const int64_t offset;
  const double product_unit;
};

template <class T>
void run_all(bool tf32, const Bug<cuda::Chain>& bug) {
  const int64_t n = 16 / sizeof(T), stage = cuda::kConvRowBytes / sizeof(T);
  std::vector<Case> cases = at_tile_edges(n);
  for (int64_t stages = 1; stages <= 4; ++stages)  // and of the pipeline
    for (int64_t near : {-n, int64_t{0}, int64_t{1}, n})
      cases.push_back({1, 2, 3, stages * stage + near, 9});
  cases.push_back({2, 7, 5, 2 * n, 3 * n, 3, 2, 1});
  cases.push_back({2, 6, 7, n, 2 * n, 3, 1, 2, 2});
  cases.push_back({1, 11, 9, 3, 8, 7, 2, 3});
  cases.push_back({2, 5, 4, 4 * n, 4 * n, 3, 1, 1, 1, 4});
  cases.push_back({2, 5, 4, 12, 18, 3, 2, 1, 1, 3});
  cases.push_back({2, 3, 3, n, n, 1, 3, 4});
  cases.push_back({1, 5, 5, 2 * n, n, 3, 1, 1, 1, 1, 1});
  int count = 0;
  for (const Case& c : cases)
    for (const Around& around : kArounds) {
      if (around.second && c.groups > 1) continue;  // the second has one group
      // Small ones meet everything, others something.
      if ((&c - cases.data() + &around - kArounds) % 3 > 0 && c.height * c.width > 70) continue;
      Problem<T> problem(c, tf32, around);
      const cuda::Product(&products)[2] = problem.chain.products;
      const bool wide = cuda::reads_wide(products[0].conv) &&
                        (!around.second || cuda::reads_wide(products[1].conv));
      for (int tile : {0, cuda::kConvTileCount - 1}) {
        if (tile > 0 && !(wide && products[0].conv.math == cuda::Math::tensor)) continue;
        problem.run(tile, bug);
        ++count;
      }
    }
  printf("%d runs\n", count);
}

}  // namespace

void check_chain(int argc, char** argv) {
  const auto bug = planted<cuda::Chain>(
      {
          {"no_relu", [](auto& chain) { chain.products[0].in.act = Act::none; }},
          {"no_other", [](auto& chain) { chain.products[0].in.other = nullptr; }},
          {"no_center", [](auto& chain) { chain.products[0].in.center = nullptr; }},
          {"no_second", [](auto& chain) { chain.count = 1; }},
          {"no_residual", [](auto& chain) { chain.products[0].conv.residual = nullptr; }},
          {"no_mask", [](auto& chain) { chain.mask_x = nullptr; }},
          {"no_sums", [](auto& chain) { chain.first = nullptr; }},
          {"another_mean", [](auto& chain) { chain.mask_mean = chain.mask_shift; }},
          {"another_order", [](auto& chain) { std::swap(chain.first, chain.second); }},
      },
      argc, argv);
  with_type(argv[0], [&](auto type, bool tf32) { run_all<decltype(type)>(tf32, bug); });
}
