// The Gram matrix, and what is made of it, against plain loops in double.
#include "check.h"

namespace {

template <class T>
void check_gram_one(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t stride,
                    bool scaled) {
  Array<T> x(batch * height * width * channels);
  Array<Acc<T>> scale(channels, scaled), shift(channels, scaled), center(channels);
  Array<double> first(channels * channels), gram(channels * channels), sum(channels);
  x.fill();
  scale.fill();
  shift.fill();
  center.fill();
  std::vector<double> exact(channels * channels), size(channels * channels), zc(channels);
  int64_t rows = 0;
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t h = 0; h < height; h += stride)
      for (int64_t w = 0; w < width; w += stride, ++rows) {
        for (int64_t c = 0; c < channels; ++c) {
          double z = x.at(((n * height + h) * width + w) * channels + c);
          if (scaled) z = z * scale.at(c) + shift.at(c);
          zc[c] = activate(z, Act::relu) - center.at(c);
        }
        for (int64_t i = 0; i < channels; ++i)
          for (int64_t j = 0; j < channels; ++j) {
            exact[i * channels + j] += zc[i] * zc[j];
            size[i * channels + j] += 9;  // |z| is at most 2, the center at most 1
          }
      }
  for (int threads : {3, 1}) {
    const fused_resnet::BnActGramArgs args{
        Type<T>::dtype, Act::relu, x.data(), scale.data(), shift.data(), center.data(), gram.data(),
        sum.data(),     batch,     height,   width,        channels,     stride};
    expect(kernels::bn_act_gram(args, pool(threads)) == Status::ok, "bn_act_gram");
    // z is rounded to T before it is centered: as T's, in units of the largest.
    for (int64_t i = 0; i < channels * channels; ++i) {
      const double rounding = 8 * Type<T>::unit * size[i] + Type<T>::least;
      const double summed = (rows + 8) * Type<Acc<T>>::unit * size[i];
      expect(std::fabs(gram.at(i) - exact[i]) <= rounding + summed, "gram");
    }
    if (threads == 3) memcpy(first.data(), gram.data(), gram.size() * sizeof(double));
    expect(gram.same(first), "gram: bits differ with threads");
  }
}

template <class T>
void check_gram_type() {
  const int64_t lanes = kernels::kLanes<Acc<T>>;
  for (int64_t channels : {int64_t(1), lanes - 1, lanes, lanes + 1, 3 * lanes, 4 * lanes, 61l})
    check_gram_one<T>(1, channels, 3, 5, 1, channels % 2);
  check_gram_one<T>(2, 5, 7, 6, 2, true);
  check_gram_one<T>(2, 5, 5, 8, 3, true);
  check_gram_one<T>(1, 3, 2, FR_GRAM_ROWS, 1, true);
  check_gram_one<T>(0, 3, 4, 5, 1, true);
}

template <class T>
void check_product_type() {
  using A = Acc<T>;
  const int64_t rows = 3;
  for (int64_t channels : {1, 16, 35}) {
    const int64_t size = channels * channels;
    Array<double> gram(size), sum(channels);
    Array<A> center(channels), covariance(size), moments(size + channels), product(rows * channels),
        mean(rows), about(rows), m2(rows), scale(rows), invstd(rows), sum_g(rows), dgamma(rows),
        scaled_s(rows * channels), slopes(rows * (channels + 1));
    Array<T> weight(rows * channels), scaled_weight(rows * channels);
    gram.fill();
    sum.fill();
    center.fill();
    product.fill();
    weight.fill();
    scale.fill();
    invstd.fill(1.5);
    sum_g.fill();
    const fused_resnet::GramMomentsArgs of_gram{
        Type<A>::dtype, gram.data(), sum.data(), covariance.data(), moments.data(), channels, 7};
    expect(kernels::gram_moments(of_gram, pool(3)) == Status::ok, "gram_moments");
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < channels; ++j) {
        const double both = gram.at(i * channels + j), taken = sum.at(i) * sum.at(j) / 7;
        expect_near<A>(covariance.at(i * channels + j), both - taken,
                       std::fabs(both) + std::fabs(taken), 4, "covariance");
        expect_near<A>(moments.at(i * (channels + 1) + j), both, std::fabs(both), 1, "moments");
      }
      expect_near<A>(moments.at((i + 1) * (channels + 1) - 1), sum.at(i), std::fabs(sum.at(i)), 1,
                     "moments");
    }
    const fused_resnet::GramStatsArgs of_stats{Type<T>::dtype,
                                               weight.data(),
                                               product.data(),
                                               sum.data(),
                                               center.data(),
                                               mean.data(),
                                               about.data(),
                                               m2.data(),
                                               rows,
                                               channels,
                                               7};
    expect(kernels::gram_stats(of_stats, pool(3)) == Status::ok, "gram_stats");
    const fused_resnet::GramGradientsArgs of_gradients{
        Type<T>::dtype, weight.data(),        product.data(), scale.data(),  mean.data(),
        invstd.data(),  sum_g.data(),         nullptr,        dgamma.data(), scaled_s.data(),
        slopes.data(),  scaled_weight.data(), rows,           channels,      7};
    expect(kernels::gram_gradients(of_gradients, pool(3)) == Status::ok, "gram_gradients");
    for (int64_t k = 0; k < rows; ++k) {
      double squares = 0, near = 0, offset = 0, larger = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const double w = weight.at(k * channels + c);
        squares += w * product.at(k * channels + c);
        near += w * sum.at(c) / 7;
        offset += w * center.at(c);
        larger += std::fabs(w) * (std::fabs(product.at(k * channels + c)) + std::fabs(sum.at(c)) +
                                  std::fabs(center.at(c)));
      }
      const double steps = 4 + channels;
      expect_near<A>(m2.at(k), squares < 0 ? 0 : squares, larger, steps, "m2");
      expect_near<A>(about.at(k), near, larger, steps, "about");
      expect_near<A>(mean.at(k), near + offset, larger, steps, "mean");
      const double of_g = std::fabs(mean.at(k) * sum_g.at(k));
      const double gamma = invstd.at(k) * (squares - mean.at(k) * sum_g.at(k));
      expect_near<A>(dgamma.at(k), gamma, invstd.at(k) * (larger + of_g), steps, "dgamma");
      const double a = scale.at(k), b = -a * invstd.at(k) * dgamma.at(k) / 7;
      for (int64_t c = 0; c < channels; ++c) {
        const double w = weight.at(k * channels + c), s = a * product.at(k * channels + c);
        expect_near<A>(scaled_s.at(k * channels + c), s, std::fabs(s), 2, "scaled_s");
        expect_near<T>(scaled_weight.at(k * channels + c), a * w, std::fabs(a * w), 3, "scaled");
        expect_near<A>(slopes.at(k * (channels + 1) + c), b * w, std::fabs(b * w), 6, "slopes");
      }
      const double last = -a * sum_g.at(k) / 7 - b * mean.at(k);
      expect_near<A>(slopes.at((k + 1) * (channels + 1) - 1), last,
                     std::fabs(a * sum_g.at(k)) + std::fabs(b * mean.at(k)), 6, "slopes");
    }
  }
}

template <class T>
void check_type() {
  check_gram_type<T>();
  check_product_type<T>();
}

}  // namespace

void check_gram() {
  check_type<float>();
  check_type<double>();
  check_type<bf16>();
  check_type<f16>();
}
