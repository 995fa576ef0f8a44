// The Gram matrix as a symmetric rank-k update. A block of rows is brought into vectors of columns,
// [vector][row][lane], activated and centered, and stays in the second-level cache while register
// tiles pass over it: only those that touch the upper triangle, which is mirrored at the end.
//
// Rows are cut into blocks, and blocks into ranges that have a matrix each, by sizes alone: the
// result does not depend on the number of threads. Threads beyond the ranges share out the tiles.
#include "../math.h"
#include "channels.h"

FR_NAMESPACE_BEGIN

namespace {

// The register tile: rows by vectors of columns. Rows divide a vector's length. Its vectors are no
// longer than a register: GCC keeps longer ones that live through a loop in memory.
#if defined(__AVX512F__)
constexpr int kGramRows = 8;
constexpr int kGramVecs = 3;
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kGramRows = 4;
constexpr int kGramVecs = 1;
constexpr int kRegisterBytes = 32;
#else
constexpr int kGramRows = 2;
constexpr int kGramVecs = 1;
constexpr int kRegisterBytes = 16;
#endif

constexpr int64_t kGramBlockBytes = 512 << 10;
constexpr int64_t kMostGramRows = 512;  // a chain of sums in fp32
constexpr int64_t kLeastGramRows = 64;
constexpr int64_t kGramRanges = 32;
constexpr int64_t kGramRangeBytes = 16 << 20;  // of all ranges' matrices

template <class A>
using Register __attribute__((vector_size(kRegisterBytes))) = A;

// to[k][:] += sum over rows r of a[r][k] * b[:][r][lane].
template <class A, int kVecs>
__attribute__((noinline)) void tile(const A* a, const A* b, int64_t rows, int64_t vector_stride,
                                    double* to, int64_t to_stride) {
  constexpr int kLength = kLanes<A>, kParts = 64 / kRegisterBytes;
  constexpr int kPart = kLength / kParts;
  Register<A> sum[kGramRows][kVecs * kParts] = {};
  for (int64_t r = 0; r < rows; ++r) {
    Register<A> w[kVecs * kParts];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs * kParts; ++v)
      __builtin_memcpy(&w[v], b + v / kParts * vector_stride + r * kLength + v % kParts * kPart,
                       kRegisterBytes);
#pragma GCC unroll 8
    for (int k = 0; k < kGramRows; ++k) {
      const Register<A> x = a[r * kLength + k] - Register<A>{};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs * kParts; ++v) sum[k][v] += x * w[v];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kGramRows; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs * kParts; ++v) {
      A lanes[kPart];
      __builtin_memcpy(lanes, &sum[k][v], kRegisterBytes);
      double* at = to + k * to_stride + v * kPart;
      for (int i = 0; i < kPart; ++i) at[i] += lanes[i];
    }
}

template <class T>
struct Gram {
  using A = Acc<T>;
  static constexpr int kLength = kLanes<A>;
  const BnActGramArgs& args;
  const int64_t vectors;  // of columns
  const int64_t rows, block_rows, blocks, ranges;
  double* matrices;  // [range][column][column]
  double* sums;      // [range][column]

  int64_t columns() const { return vectors * kLength; }
  int64_t out_height() const { return (args.height + args.stride - 1) / args.stride; }
  int64_t out_width() const { return (args.width + args.stride - 1) / args.stride; }

  const T* pixel(int64_t row) const {
    const T* x = static_cast<const T*>(args.x);
    if (args.stride == 1) return x + row * args.channels;
    const int64_t w = row % out_width(), line = row / out_width();
    const int64_t h = line % out_height(), image = line / out_height();
    return x +
           ((image * args.height + h * args.stride) * args.width + w * args.stride) * args.channels;
  }

  // One block's vectors from `first` on; their sums go to `total` if there is one.
  void pack(int64_t begin, int64_t end, int64_t first, A* block, A* total) const {
    const A* scale = static_cast<const A*>(args.scale);
    const A* shift = static_cast<const A*>(args.shift);
    const A* center = static_cast<const A*>(args.center);
    for (int64_t row = begin; row < end; row += kRowsAtOnce) {
      const int64_t count = end - row < kRowsAtOnce ? end - row : kRowsAtOnce;
      const T* pixels[kRowsAtOnce];
      for (int64_t r = 0; r < count; ++r) pixels[r] = pixel(row + r);
      const int64_t start = first * kLength;
      for_vectors<A>(args.channels - start, [&](int64_t at, auto lanes) FR_LAMBDA {
        const int64_t c = start + at;
        A* to = block + c * block_rows + (row - begin) * kLength;
        const Vec<A> middle = load(center + c, lanes);
        Vec<A> sum{};
        for (int64_t r = 0; r < count; ++r) {
          Vec<A> z = load(pixels[r] + c, lanes);
          if (scale)
            z = rounded<T>(math::activate(
                math::scale_shift(z, load(scale + c, lanes), load(shift + c, lanes)), args.act));
          else
            z = math::activate(z, args.act);
          z -= middle;
          store(to + r * kLength, z);
          sum += z;
        }
        if (total) store(total + c, load(total + c) + sum);
      });
    }
  }

  // Tiles of the rows that belong to `split`: they are dealt out in turn, their lengths differ.
  void multiply(int64_t count, const A* block, int64_t split, int64_t splits,
                double* matrix) const {
    const int64_t vector_stride = block_rows * kLength;
    for (int64_t i = split * kGramRows; i < columns(); i += splits * kGramRows) {
      const int64_t own = i / kLength;
      const A* a = block + own * vector_stride + i % kLength;
      double* to = matrix + i * columns();
      for_tiles<kGramVecs>(own, vectors, [&](auto width, int64_t v) FR_LAMBDA {
        tile<A, width.value>(a, block + v * vector_stride, count, vector_stride, to + v * kLength,
                             columns());
      });
    }
  }

  Status range(int64_t index, int64_t split, int64_t splits) const {
    Workspace<A> room((block_rows + 1) * columns());
    if (!room.data) return Status::out_of_memory;
    A* total = room.data + block_rows * columns();
    double* matrix = matrices + index * columns() * columns();
    double* sum = sums + index * columns();
    const int64_t first = split * kGramRows / kLength;
    for (int64_t b = blocks * index / ranges; b < blocks * (index + 1) / ranges; ++b) {
      const int64_t begin = b * block_rows;
      const int64_t end = begin + block_rows < rows ? begin + block_rows : rows;
      for (int64_t c = 0; c < columns(); ++c) total[c] = 0;
      pack(begin, end, first, room.data, split == 0 ? total : nullptr);
      if (split == 0)
        for (int64_t c = 0; c < columns(); ++c) sum[c] += total[c];
      multiply(end - begin, room.data, split, splits, matrix);
    }
    return Status::ok;
  }

  // Adds up the ranges and mirrors.
  void finish(int64_t i) const {
    const int64_t size = columns() * columns();
    double* gram = static_cast<double*>(args.gram);
    double total = 0;
    for (int64_t range = 0; range < ranges; ++range) total += sums[range * columns() + i];
    static_cast<double*>(args.sum)[i] = total;
    for (int64_t j = i; j < args.channels; ++j) {
      double value = 0;
      for (int64_t range = 0; range < ranges; ++range)
        value += matrices[range * size + i * columns() + j];
      gram[i * args.channels + j] = gram[j * args.channels + i] = value;
    }
  }
};

template <class T>
Status compute(const BnActGramArgs& args, const Pool& pool) {
  using A = Acc<T>;
  constexpr int64_t kLength = kLanes<A>;
  const int64_t vectors = (args.channels + kLength - 1) / kLength, columns = vectors * kLength;
  if (columns == 0) return Status::ok;
  auto clamp = [](int64_t n, int64_t least, int64_t most) {
    return n < least ? least : n > most ? most : n;
  };
  auto steps = [&](int64_t n) { return (n + args.stride - 1) / args.stride; };
  const int64_t rows = args.batch * steps(args.height) * steps(args.width);
  const int64_t block_rows = clamp(kGramBlockBytes / (columns * static_cast<int64_t>(sizeof(A))),
                                   kLeastGramRows, kMostGramRows);
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  const int64_t matrix_bytes = columns * columns * static_cast<int64_t>(sizeof(double));
  const int64_t ranges =
      clamp(clamp(kGramRangeBytes / matrix_bytes, 1, kGramRanges), 1, blocks > 0 ? blocks : 1);
  Workspace<double> memory(ranges * columns * (columns + 1));
  if (!memory.data) return Status::out_of_memory;
  double* sums = memory.data + ranges * columns * columns;
  parallel(pool, ranges * (columns + 1), kMapGrain / columns + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * columns; i < end * columns; ++i) memory.data[i] = 0;
  });
  const Gram<T> gram{args, vectors, rows, block_rows, blocks, ranges, memory.data, sums};
  const int64_t splits = clamp((pool.threads + ranges - 1) / ranges, 1, columns / kGramRows);
  int failed = 0;
  parallel(pool, ranges * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job)
      if (gram.range(job / splits, job % splits, splits) != Status::ok)
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  if (failed) return Status::out_of_memory;
  parallel(pool, args.channels, kMapGrain / (args.channels * ranges) + 1,
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) gram.finish(i);
           });
  return Status::ok;
}

}  // namespace

Status bn_act_gram(const BnActGramArgs& args, const Pool& pool) {
  return dispatch(args.dtype, [&](auto type) { return compute<decltype(type)>(args, pool); });
}

FR_NAMESPACE_END
