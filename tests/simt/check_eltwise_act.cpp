// Checks cuda::eltwise_act against a scalar reference in long double, within the bound that
// rounding every operation of the accumulation type allows, and one rounding to the storage type.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/kernels/cuda/launch.h"
#include "check.h"

using namespace fused_resnet;

namespace {

struct Bf16 {
  uint16_t bits;
  Bf16() = default;
  explicit Bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    bits = x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const {
    uint32_t u = uint32_t{bits} << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// `size` elements, `offset` elements behind an aligned address; what lies behind is not ours to
// touch.
template <class T>
class Buffer {
 public:
  Buffer(int64_t size, int64_t offset) : size_(size), offset_(offset) {
    void* p = nullptr;
    check(posix_memalign(&p, 64, (offset + size) * sizeof(T)) == 0, "out of memory");
    memory_.reset(static_cast<T*>(p));
    memset(p, 0xff, (offset + size) * sizeof(T));
  }
  T* data() const { return memory_.get() + offset_; }
  int64_t size() const { return size_; }

 private:
  int64_t size_, offset_;
  std::unique_ptr<T, decltype(&free)> memory_{nullptr, free};
};

struct Case {
  EltwiseOp op;
  Act act;
  int64_t numel;
  int count;
  bool coeff;
  bool special;      // NaN, infinities, zeros, values that overflow in sums of f16
  int misaligned;    // 0 nothing, 1 out, 2 the first input, 3 the last input, 4 everything alike
  int out_is_input;  // -1: a buffer of its own
  std::string text() const {
    return "op " + std::to_string(int(op)) + " act " + std::to_string(int(act)) + " numel " +
           std::to_string(numel) + " count " + std::to_string(count) + " coeff " +
           std::to_string(coeff) + " special " + std::to_string(special) + " misaligned " +
           std::to_string(misaligned) + " out_is_input " + std::to_string(out_is_input);
  }
};

// What any order of rounding may give: everything between these two, NaN for NaN.
struct Range {
  long double low, high;
};

template <class A>
Range reference(const Case& c, const std::vector<A>& x, const std::vector<double>& coeff) {
  long double result = c.op == EltwiseOp::prod ? 1 : c.op == EltwiseOp::sum ? 0 : -INFINITY;
  long double magnitude = 0;
  for (int k = 0; k < c.count; ++k) {
    long double term = x[k];
    if (c.op == EltwiseOp::sum) {
      if (c.coeff) term *= static_cast<A>(coeff[k]);
      result += term;
      magnitude += std::fabs(term);
    } else if (c.op == EltwiseOp::prod) {
      result *= term;
      magnitude = std::fabs(result);
    } else {
      if (std::isnan(term) || term > result) result = term;  // a NaN in result compares false
    }
  }
  // One rounding an input; one more pays for second-order terms and for the reference's own.
  const long double unit = std::numeric_limits<A>::epsilon() / 2;
  const long double bound = std::isfinite(result) ? (c.count + 1) * unit * magnitude : 0;
  auto act = [&](long double v) { return c.act == Act::relu && v < 0 ? 0 : v; };
  return {act(result - bound), act(result + bound)};
}

template <class T>
void run(DType dtype, const Case& c, std::mt19937& generator, uint64_t* checksum) {
  using A = Acc<T>;
  const int shift = c.misaligned ? 1 : 0;
  auto random_value = [&]() -> float {
    if (c.special && generator() % 8 == 0) {
      const float big = c.op == EltwiseOp::prod ? 1.5f : 60000.0f;
      const float values[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, big, -big};
      return values[generator() % 7];
    }
    const float value = std::ldexp(1 + generator() % 4096 / 4096.0f, -int(generator() % 2));
    return generator() % 2 ? value : -value;  // in (-2, -0.5] or [0.5, 2): products stay in range
  };
  std::vector<Buffer<T>> inputs;
  std::vector<std::vector<A>> values(c.count);
  std::vector<const void*> pointers;
  std::vector<double> coeff;
  for (int k = 0; k < c.count; ++k) {
    const bool moved = c.misaligned == 4 || (c.misaligned == 2 && k == 0) ||
                       (c.misaligned == 3 && k == c.count - 1);
    inputs.emplace_back(c.numel, moved ? shift : 0);
    for (int64_t i = 0; i < c.numel; ++i) {
      inputs[k].data()[i] = T(random_value());
      values[k].push_back(inputs[k].data()[i]);
    }
    pointers.push_back(inputs[k].data());
    coeff.push_back(generator() % 1000 / 250.0 - 2);
  }
  Buffer<T> own(c.numel, c.misaligned == 1 || c.misaligned == 4 ? shift : 0);
  T* out = c.out_is_input >= 0 ? inputs[c.out_is_input].data() : own.data();

  EltwiseActArgs args{
      dtype, c.op, c.act, c.count, pointers.data(), c.coeff ? coeff.data() : nullptr, out, c.numel};
  if (cuda::eltwise_act(args, nullptr) != Status::ok) check_failed(c.text() + ": status");

  std::vector<A> x(c.count);
  for (int64_t i = 0; i < c.numel; ++i) {
    for (int k = 0; k < c.count; ++k) x[k] = values[k][i];
    const Range range = reference<A>(c, x, coeff);
    const A low = T(A(range.low)), high = T(A(range.high)), got = out[i];
    const bool good = std::isnan(low) ? std::isnan(got) : got >= low && got <= high;
    if (!good)
      check_failed(c.text() + ": element " + std::to_string(i) + " is " + std::to_string(got) +
                   ", expected " + std::to_string(low) + " to " + std::to_string(high));
    uint64_t bits = 0;
    if (!std::isnan(got)) memcpy(&bits, &out[i], sizeof(T));
    *checksum = (*checksum ^ bits) * 0x100000001b3;
  }
}

template <class T>
void run_all(DType dtype, EltwiseOp op) {
  const int64_t vector = 16 / sizeof(T), tile = cuda::Streaming::kTile<T>;
  const int64_t loop = tile * cuda::streaming_blocks<T>(std::numeric_limits<int32_t>::max(), 1);
  std::vector<int64_t> sizes = {0, 1, 3, 4, 5, 7, 8, 9, 255, 256, 257, 1000};
  for (int64_t edge : {vector, 256 * vector, tile, 2 * tile})
    for (int64_t near : {-1, 0, 1}) sizes.push_back(edge + near);
  std::vector<Case> cases;
  for (int64_t numel : sizes)
    for (int misaligned = 0; misaligned < 5; ++misaligned) {
      if (numel > 1000 && (numel + misaligned) % 2) continue;  // neighbours take turns
      for (Act act : {Act::none, Act::relu}) {
        const int n = cases.size(), count = 1 + n % 9;
        cases.push_back({op, act, numel, count, op == EltwiseOp::sum && n % 4 < 2, n % 3 == 0,
                         misaligned, n % 5 == 0 ? n % count : -1});
      }
    }
  for (int count : {1, 2, 3, 4, 5, 6, 7, 8, 9, 64})
    for (bool coeff : {false, true})
      for (bool special : {false, true})
        cases.push_back({op, Act::none, 37, count, coeff && op == EltwiseOp::sum, special, 0, -1});
  // Blocks go round their loop more than once, the second time partly.
  for (int misaligned : {0, 1})
    cases.push_back({op, Act::relu, 2 * loop + tile / 2 + 1, 2, false, true, misaligned, -1});

  std::mt19937 generator(1);
  uint64_t checksum = 0xcbf29ce484222325;
  for (const Case& c : cases) run<T>(dtype, c, generator, &checksum);
  printf("%zu cases, results %016llx\n", cases.size(), static_cast<unsigned long long>(checksum));
}

void refuses_bad_arguments() {
  float x = 1;
  const std::vector<const void*> inputs(65, &x);
  auto status = [&](DType dtype, EltwiseOp op, int count, int64_t numel) {
    EltwiseActArgs args{dtype, op, Act::none, count, inputs.data(), nullptr, &x, numel};
    return cuda::eltwise_act(args, nullptr);
  };
  check(status(DType::f32, EltwiseOp::sum, 0, 1) == Status::unsupported, "no input");
  check(status(DType::f32, EltwiseOp::sum, 65, 1) == Status::unsupported, "too many inputs");
  check(status(DType(9), EltwiseOp::sum, 1, 1) == Status::unsupported, "unknown dtype");
  check(status(DType::f32, EltwiseOp(9), 1, 1) == Status::unsupported, "unknown op");
  check(status(DType::f32, EltwiseOp::sum, 2, 0) == Status::ok && x == 1, "empty");
}

}  // namespace

void check_eltwise_act(int argc, char** argv) {
  check(argc == 2, "expected a dtype and an op");
  const std::string dtype = argv[0], name = argv[1];
  const EltwiseOp op = name == "sum"    ? EltwiseOp::sum
                       : name == "prod" ? EltwiseOp::prod
                                        : EltwiseOp::max;
  check(op != EltwiseOp::max || name == "max", "unknown op");
  refuses_bad_arguments();
  if (dtype == "f32") return run_all<float>(DType::f32, op);
  if (dtype == "f64") return run_all<double>(DType::f64, op);
  if (dtype == "bf16") return run_all<Bf16>(DType::bf16, op);
  if (dtype == "f16") return run_all<_Float16>(DType::f16, op);
  check_failed("unknown dtype " + dtype);
}
