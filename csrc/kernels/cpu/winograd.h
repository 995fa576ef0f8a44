// Winograd's transforms: kOut x kOut outputs of a 3x3 kernel are A^T ((G g G^T) * (B^T d B)) A,
// with one product for each of the (kOut + 2)^2 numbers that their input d and the kernel g become.
// Here are the transforms in one dimension; B^T comes from polynomials that are zero at kOut + 1
// points, the last one being infinity.
#pragma once

#include "vec.h"

FR_NAMESPACE_BEGIN

template <int kOut>
struct Winograd;

// At the points 0, 1 and -1.
template <>
struct Winograd<2> {
  FR_VEC void weight(const double (&g)[3], double (&u)[4]) {
    u[0] = g[0];
    u[1] = (g[0] + g[1] + g[2]) / 2;
    u[2] = (g[0] - g[1] + g[2]) / 2;
    u[3] = g[2];
  }

  FR_VEC void input(const VecF (&d)[4], VecF (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[2] + d[1];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }

  FR_VEC void output(const VecF (&m)[4], VecF (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

// At 0 and at plus and minus kNear and kFar. 1 and 2, as everyone has them, would need a
// multiplication less, and have twice the error.
constexpr double kNear = 0.625, kFar = 1.5;

template <>
struct Winograd<4> {
  static constexpr double kNear2 = kNear * kNear, kFar2 = kFar * kFar;

  FR_VEC void weight(const double (&g)[3], double (&u)[6]) {
    const double near = g[0] + kNear2 * g[2], far = g[0] + kFar2 * g[2];
    u[0] = g[0] / (kNear2 * kFar2);
    u[1] = (near + kNear * g[1]) / (2 * kNear2 * (kNear2 - kFar2));
    u[2] = (near - kNear * g[1]) / (2 * kNear2 * (kNear2 - kFar2));
    u[3] = (far + kFar * g[1]) / (2 * kFar2 * (kFar2 - kNear2));
    u[4] = (far - kFar * g[1]) / (2 * kFar2 * (kFar2 - kNear2));
    u[5] = g[2];
  }

  FR_VEC void input(const VecF (&d)[6], VecF (&v)[6]) {
    constexpr float near = kNear, far = kFar, near2 = kNear2, far2 = kFar2;
    constexpr float sum = kNear2 + kFar2, product = kNear2 * kFar2;
    const VecF near_even = d[4] - far2 * d[2], near_odd = near * (d[3] - far2 * d[1]);
    const VecF far_even = d[4] - near2 * d[2], far_odd = far * (d[3] - near2 * d[1]);
    v[0] = d[4] - sum * d[2] + product * d[0];
    v[1] = near_even + near_odd;
    v[2] = near_even - near_odd;
    v[3] = far_even + far_odd;
    v[4] = far_even - far_odd;
    v[5] = d[5] - sum * d[3] + product * d[1];
  }

  FR_VEC void output(const VecF (&m)[6], VecF (&y)[4]) {
    constexpr float near = kNear, far = kFar, near2 = kNear2, far2 = kFar2;
    constexpr float near3 = kNear * kNear2, far3 = kFar * kFar2;
    const VecF near_even = m[1] + m[2], near_odd = m[1] - m[2];
    const VecF far_even = m[3] + m[4], far_odd = m[3] - m[4];
    y[0] = m[0] + near_even + far_even;
    y[1] = near * near_odd + far * far_odd;
    y[2] = near2 * near_even + far2 * far_even;
    y[3] = m[5] + near3 * near_odd + far3 * far_odd;
  }
};

FR_NAMESPACE_END
