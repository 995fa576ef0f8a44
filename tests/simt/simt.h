// Runs CUDA source on the CPU: g++ -x c++ -DFUSED_RESNET_SIMT -include simt.h kernel.cu, with
// CUDA's own headers, for half types and dim3, on the include path. Nothing of CUDA is linked.
//
// Every CUDA thread is a fiber. A fiber runs alone until it waits, at __syncthreads, __syncwarp, a
// shuffle or a matrix instruction, or ends; `order` picks the next. Blocks run one after the other.
// Round robin alone hides missing barriers, so kernels are run in every order: in the others one
// warp, first, last or random, runs ahead. Asynchronous copies land at once or as late as waiting
// for them allows: each hides what the other shows. Shared memory is on the heap, of its exact
// size, and starts as 0xff bytes (NaN).
//
// Stricter than hardware: all threads of a block, or of a warp's mask, must meet at one source
// line, and none may have returned. Whatever breaks this is thrown by the launch, as a Failure. A
// barrier inside a helper is one line whoever calls it.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

enum class Order { round_robin, first_ahead, last_ahead, random };
inline Order order = Order::round_robin;
inline std::mt19937 generator;  // seed it for Order::random

enum class Landing { eager, lazy };
inline Landing landing = Landing::eager;

// Takes ORDER or ORDER+lazy, ORDER being a name of `Order`; returns false for anything else.
inline bool set_schedule(const std::string& schedule, unsigned seed) {
  const char* const names[] = {"round_robin", "first_ahead", "last_ahead", "random"};
  const std::string name = schedule.substr(0, schedule.find('+'));
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names) || (schedule != name && schedule != name + "+lazy")) return false;
  order = static_cast<Order>(found - names);
  landing = schedule == name ? Landing::eager : Landing::lazy;
  generator.seed(seed);
  return true;
}

constexpr int kMostThreads = 1024;  // of a block, as on hardware
constexpr size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32;

struct Place {  // where a fiber waits; all that meet must agree on it
  const char* what;
  const char* file;
  int line;
  unsigned mask;
  bool operator==(const Place& b) const {
    return line == b.line && mask == b.mask && !strcmp(what, b.what) && !strcmp(file, b.file);
  }
};

struct Copy {  // asynchronous: `bytes` from `from`, and zeros up to 16
  void* to;
  const void* from;
  int bytes;
  int group;
};

// What runs on a stack of its own: a fiber, or the scheduler.
struct Context {
  ucontext_t entry;  // where it begins
  jmp_buf left;      // and where it was left, since swapcontext costs two calls of the system
  bool begun = false;
};

struct Fiber {
  enum { ready, waiting, done } state;
  Context context;
  std::unique_ptr<char[]> stack;
  void* fake_stack;  // ASan's
  uint3 thread;
  Place place;
  int source;                // the lane a shuffle reads from,
  uint64_t sent, received;   // and the two ends of it
  void* brought;             // to an operation of the whole warp
  std::vector<Copy> copies;  // not waited for
  int groups;                // committed
};

using Memory = std::unique_ptr<char, decltype(&free)>;

// Kept from launch to launch, where they are; the first `threads` are in use.
inline std::vector<Fiber> fibers(kMostThreads);
inline int threads, current;
inline int arrived;                 // at the block's barrier
inline std::exception_ptr failure;  // of a fiber; the others are abandoned where they are
inline std::function<void()> body;
inline void (*block_ends)() = nullptr;  // looks for what is still in flight
inline Context scheduler;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
inline std::map<const void*, Memory> shared;  // by declaration
inline Memory dynamic_shared{nullptr, free};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const std::string& why) {
  throw Failure("simt: " + why + " in block (" + std::to_string(blockIdx.x) + ", " +
                std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")");
}

inline std::string name(const Place& place) {
  std::string file = place.file;
  return std::string(place.what) + " at " + file.substr(file.rfind('/') + 1) + ":" +
         std::to_string(place.line);
}

[[noreturn]] inline void deadlock() {
  std::map<std::string, int> count;
  for (int i = 0; i < threads; ++i)
    ++count[fibers[i].state == Fiber::done ? "done" : name(fibers[i].place)];
  std::string why = "deadlock:";
  for (auto& [where, n] : count) why += " [" + std::to_string(n) + " threads " + where + "]";
  fail(why);
}

inline __attribute__((noinline)) void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)  // which takes a jump for the end of a stack's frames
  from.begun = true;
  swapcontext(&from.entry, &to.entry);
#else
  if (_setjmp(from.left)) return;
  from.begun = true;
  if (to.begun) _longjmp(to.left, 1);
  setcontext(&to.entry);
#endif
}

// Back to the scheduler until it resumes this fiber.
inline void yield() {
  Fiber& self = fibers[current];
  __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_stack, scheduler_stack_bytes);
  switch_context(self.context, scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

// A fiber runs one thread after the other.
inline void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    try {
      body();
      if (!fibers[current].copies.empty()) fail("a thread ends before its copies have landed");
    } catch (...) {  // an exception cannot leave a fiber
      failure = std::current_exception();
    }
    fibers[current].state = Fiber::done;
    yield();
  }
}

inline void resume(int next) {
  current = next;
  threadIdx = fibers[next].thread;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fibers[next].stack.get(), kStackBytes);
  switch_context(scheduler, fibers[next].context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

inline void meet_block(const char* file, int line) {
  fibers[current].state = Fiber::waiting;
  fibers[current].place = {"__syncthreads", file, line, 0};
  if (++arrived == threads) {
    for (int i = 0; i < threads; ++i) {
      if (!(fibers[i].place == fibers[0].place)) deadlock();
      fibers[i].state = Fiber::ready;
    }
    arrived = 0;
  }
  yield();
}

// Whether any thread brings true; none brings something else before all have read it.
inline int any_of_block(int predicate, const char* file, int line) {
  fibers[current].sent = predicate != 0;
  meet_block(file, line);
  int any = 0;
  for (int i = 0; i < threads; ++i) any |= fibers[i].sent != 0;
  meet_block(file, line);
  return any;
}

// The last lane to come delivers what all of them sent, or performs what they came for together.
inline void meet_warp(const char* what, unsigned mask, int source, const char* file, int line,
                      const std::function<void(Fiber*)>& perform = nullptr) {
  Fiber* lanes = &fibers[current / kWarp * kWarp];
  Fiber& self = fibers[current];
  mask &= ~0u >> std::max(0, kWarp - (threads - current / kWarp * kWarp));  // a smaller last warp
  auto takes_part = [&](int lane) { return lane >= 0 && lane < kWarp && (mask >> lane & 1); };
  self.state = Fiber::waiting;
  self.place = {what, file, line, mask};
  self.source = source;
  if (!takes_part(current % kWarp)) fail(name(self.place) + ": a lane is not in its own mask");
  if (!takes_part(source)) fail(name(self.place) + ": reads a lane that takes no part");
  bool complete = true;
  for (int i = 0; i < kWarp; ++i)
    if (takes_part(i))
      complete = complete && lanes[i].state == Fiber::waiting && lanes[i].place == self.place;
  if (complete) {
    if (perform) perform(lanes);
    for (int i = 0; i < kWarp; ++i) {
      if (!takes_part(i)) continue;
      lanes[i].received = lanes[lanes[i].source].sent;
      lanes[i].state = Fiber::ready;
    }
  }
  yield();
}

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  memcpy(&fibers[current].sent, &value, sizeof(T));
  meet_warp(what, mask, source, file, line);
  memcpy(&value, &fibers[current].received, sizeof(T));
  return value;
}

// An operation of all 32 lanes: each brings a T, perform(lane -> T&) is run once.
template <class T, class F>
void together(const char* what, T mine, const char* file, int line, const F& perform) {
  if (current / kWarp * kWarp + kWarp > threads) fail(std::string(what) + ": not a full warp");
  fibers[current].brought = &mine;
  meet_warp(what, ~0u, current % kWarp, file, line, [&](Fiber* lanes) {
    perform([&](int lane) -> T& { return *static_cast<T*>(lanes[lane].brought); });
  });
}

inline void land(const Copy& copy) {
  char bytes[16] = {};
  memcpy(bytes, copy.from, copy.bytes);
  memcpy(copy.to, bytes, 16);
}

inline void start_copy(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16) fail("cp.async: the destination is not aligned");
  if (bytes && reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async: the source is not aligned");
  Fiber& self = fibers[current];
  self.copies.push_back({to, from, bytes, self.groups});
  if (landing == Landing::eager) land(self.copies.back());
}

inline void commit_copies() { ++fibers[current].groups; }

// Until at most `left` of the committed groups are in flight.
inline void wait_for_copies(int left) {
  Fiber& self = fibers[current];
  auto done = [&](const Copy& copy) { return copy.group < self.groups - left; };
  for (const Copy& copy : self.copies)
    if (landing == Landing::lazy && done(copy)) land(copy);
  self.copies.erase(std::remove_if(self.copies.begin(), self.copies.end(), done),
                    self.copies.end());
}

// The ready fiber to run next, or -1.
inline int pick() {
  auto first_ready = [](int count, const auto& fiber_at) {
    for (int i = 0; i < count; ++i)
      if (fibers[fiber_at(i)].state == Fiber::ready) return fiber_at(i);
    return -1;
  };
  if (order == Order::first_ahead) return first_ready(threads, [](int i) { return i; });
  if (order == Order::last_ahead)
    return first_ready(threads, [](int i) { return threads - 1 - i; });
  const int warp = current / kWarp * kWarp, lanes = std::min(kWarp, threads - warp);
  if (order == Order::random && generator() % 8) {
    const int any = generator() % lanes;
    const int next = first_ready(lanes, [&](int i) { return warp + (any + i) % lanes; });
    if (next >= 0) return next;
  }
  const int start = order == Order::random ? generator() % threads : current + 1;
  return first_ready(threads, [&](int i) { return (start + i) % threads; });
}

inline Memory allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes)) fail("out of memory");
  return Memory(static_cast<char*>(memset(p, 0xff, bytes)), free);
}

inline void run_block(size_t shared_bytes) {
  shared.clear();
  dynamic_shared = allocate(shared_bytes);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.context.begun) {
      if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context.entry);
      fiber.context.entry.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.entry.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.context.entry, enter, 0);
    }
    fiber.state = Fiber::ready;
    fiber.groups = 0;
    fiber.copies.clear();
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  current = threads - 1;
  arrived = 0;
  for (int next; (next = pick()) >= 0;) {
    resume(next);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  }
  for (int i = 0; i < threads; ++i)
    if (fibers[i].state != Fiber::done) deadlock();
  if (block_ends) block_ends();
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/,
                   std::function<void()> kernel) {
  gridDim = grid;
  blockDim = block;
  threads = block.x * block.y * block.z;
  body = std::move(kernel);
  if (threads > kMostThreads) fail("more than 1024 threads");
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (order == Order::last_ahead) std::reverse(blocks.begin(), blocks.end());
  if (order == Order::random) std::shuffle(blocks.begin(), blocks.end(), generator);
  try {
    for (unsigned b : blocks) {
      blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
      run_block(shared_bytes);
    }
  } catch (...) {  // the fibers stay in the middle of what they did
    for (Fiber& fiber : fibers) fiber.context.begun = false;
    throw;
  }
}

template <class T>
T& declare(const void* key) {
  auto found = shared.find(key);
  if (found == shared.end()) found = shared.emplace(key, allocate(sizeof(T))).first;
  return *reinterpret_cast<T*>(found->second.get());
}

}  // namespace simt

// What kernels see. Each declaration has a key of its own, each instantiation of a template too.
#define FR_SHARED(type, name)                            \
  type& name = simt::declare<type>([]() -> const void* { \
    static char key;                                     \
    return &key;                                         \
  }())
#define FR_DYNAMIC_SHARED(name) \
  unsigned char* const name = reinterpret_cast<unsigned char*>(simt::dynamic_shared.get())

#define SIMT_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_CALLER) { simt::meet_block(file, line); }
inline int __syncthreads_or(int predicate, SIMT_CALLER) {
  return simt::any_of_block(predicate, file, line);
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_CALLER) {
  simt::meet_warp("__syncwarp", mask, simt::current % simt::kWarp, file, line);
}

// `width` lanes form a group. A lane whose source lies outside reads itself.
#define SIMT_SHUFFLE(name, type, argument, from, inside)                                       \
  template <class T>                                                                           \
  T name(unsigned mask, T value, type argument, int width = 32, SIMT_CALLER) {                 \
    const int lane = simt::current % simt::kWarp, first = lane / width * width, source = from; \
    return simt::shuffle(#name, mask, value, inside ? source : lane, file, line);              \
  }
SIMT_SHUFFLE(__shfl_sync, int, lane_in_group, first + (lane_in_group & (width - 1)), true)
SIMT_SHUFFLE(__shfl_up_sync, unsigned, delta, lane - int(delta), source >= first)
SIMT_SHUFFLE(__shfl_down_sync, unsigned, delta, lane + int(delta), source < first + width)
SIMT_SHUFFLE(__shfl_xor_sync, int, bits, lane ^ bits, source < first + width)

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
