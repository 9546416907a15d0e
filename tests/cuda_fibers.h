// Fibers for cuda_emulator.h: one per CUDA thread of a block, switched where threads meet.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define BERTKD_GRID_CONSTANT

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulator {

constexpr int kWarp = 32;
constexpr int kStack = 128 * 1024;

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  const uint64_t* waits_for = nullptr;  // runs again when this counter has left `seen`
  uint64_t seen = 0;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Warp {
  uint64_t generation = 0;
  int arrived = 0;
  int operation = 0;
  uint32_t in[kWarp][10];
  uint32_t out[kWarp][4];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  uint64_t barrier = 0;
  int at_barrier = 0, alive = 0;
  unsigned current = 0;
  uint64_t random = 1;
  ucontext_t scheduler;
  std::function<void()> body;
  std::string error;
};

inline Block& block() {
  static Block b;
  return b;
}
inline dim3& block_index() {
  static dim3 x;
  return x;
}
inline dim3& block_size() {
  static dim3 x;
  return x;
}
inline dim3& grid_size() {
  static dim3 x;
  return x;
}
inline dim3 thread_index() { return dim3(block().current, 0, 0); }

inline Fiber& fiber() { return block().fibers[block().current]; }

inline void fail(const std::string& what) {
  // A kernel cannot throw across fibers: the scheduler does.
  if (block().error.empty()) block().error = what;
  fiber().done = true;
  swapcontext(&fiber().context, &block().scheduler);
}

inline void wait(const uint64_t* counter) {
  Fiber& f = fiber();
  f.waits_for = counter;
  f.seen = *counter;
  swapcontext(&f.context, &block().scheduler);
}

inline void barrier() {
  Block& b = block();
  if (++b.at_barrier == b.alive) {
    b.at_barrier = 0;
    ++b.barrier;
    return;
  }
  wait(&b.barrier);
}

// Every lane of the warp brings its words; the last one to come computes what all of them get.
inline void exchange(int operation, const uint32_t* in, int words, uint32_t* out, int results,
                     void (*compute)(Warp&)) {
  Block& b = block();
  Warp& w = b.warps[b.current / kWarp];
  if (w.arrived == 0) w.operation = operation;
  if (w.operation != operation) fail("lanes of a warp meet at different instructions");
  std::memcpy(w.in[b.current % kWarp], in, words * 4);
  const unsigned me = b.current;
  if (++w.arrived == kWarp) {
    compute(w);
    w.arrived = 0;
    ++w.generation;
  } else {
    wait(&w.generation);
  }
  // Nobody can start the next exchange before this lane joins it, so the results are still there.
  std::memcpy(out, w.out[me % kWarp], results * 4);
}

inline void run_fiber() {
  block().body();
  Block& b = block();
  fiber().done = true;
  --b.alive;
  if (b.alive > 0 && b.at_barrier == b.alive) {
    b.at_barrier = 0;
    ++b.barrier;
  }
  swapcontext(&fiber().context, &b.scheduler);
}

inline void run_block(int threads, int64_t shared, const std::function<void()>& body) {
  Block& b = block();
  if (threads % kWarp != 0) throw std::logic_error("a block must have whole warps");
  b.fibers.resize(threads);
  b.warps.assign(threads / kWarp, Warp{});
  b.shared.assign(shared + 16, 0xff);
  b.barrier = 0, b.at_barrier = 0, b.alive = threads;
  b.body = body;
  b.error.clear();
  std::vector<unsigned> order(threads);
  for (int i = 0; i < threads; ++i) {
    order[i] = i;
    Fiber& f = b.fibers[i];
    f.done = false, f.waits_for = nullptr;
    f.groups.clear(), f.open.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
  }
  bool left = true;
  while (left && b.error.empty()) {
    for (int i = threads - 1; i > 0; --i) {
      b.random = b.random * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(order[i], order[(b.random >> 33) % (i + 1)]);
    }
    left = false;
    bool moved = false;
    for (unsigned i : order) {
      Fiber& f = b.fibers[i];
      if (f.done) continue;
      left = true;
      if (f.waits_for != nullptr && *f.waits_for == f.seen) continue;
      f.waits_for = nullptr;
      b.current = i;
      moved = true;
      swapcontext(&b.scheduler, &f.context);
      if (!b.error.empty()) break;
    }
    if (left && !moved)
      b.error = "threads wait for a barrier or a warp that the others never reach";
  }
  if (!b.error.empty()) throw std::runtime_error("emulator: " + b.error);
}

inline unsigned char* shared() {
  unsigned char* start = block().shared.data();
  return start + (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16;
}

inline int64_t shared_limit() {
  const char* bytes = std::getenv("BERTKD_EMULATED_SHARED");
  return bytes != nullptr ? std::atoll(bytes) : 227 * 1024;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
#define BERTKD_SHARED(name) unsigned char* name = emulator::shared()
