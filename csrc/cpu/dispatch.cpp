// The public functions: check, choose the instruction set, run. Also the only allocation.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../bertkd.h"
#include "checks.h"
#include "kernels.h"

namespace bertkd {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs_here;
};

#if defined(__x86_64__)
// Asked of the processor itself: Clang 14 does not know "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// Best first.
const Candidate* candidates(int* count) {
#if defined(__x86_64__)
  static const Candidate all[] = {
      {&kKernelsAvx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq")},
      {&kKernelsAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          has_f16c()},
      {&kKernelsPortable, true},
  };
#else
  static const Candidate all[] = {{&kKernelsPortable, true}};
#endif
  *count = static_cast<int>(sizeof all / sizeof *all);
  return all;
}

const Kernels* find(const char* name, const char* source) {
  int count;
  const Candidate* all = candidates(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].runs_here && (name == nullptr || std::strcmp(name, all[i].kernels->name) == 0))
      return all[i].kernels;
  throw std::invalid_argument(std::string(source) + " '" + name +
                              "' is not one that this build and processor can run: " + cpu_isas() +
                              ".");
}

// Heads are padded to two vectors of keys. Up to here AVX2's do, and take 0.35 to 0.8 of the time of
// AVX-512's, which would mostly pack zeros; from 17 keys on these are as fast or faster.
constexpr int64_t kShort = 16;
std::atomic<const Kernels*> chosen{nullptr}, chosen_for_short{nullptr};

// By name; without one what is best, which depends on the length of the sequences.
void choose(const char* name, const char* source) {
  const Kernels *best = find(name, source), *for_short = best;
#if defined(__x86_64__)
  int count;
  const Candidate* all = candidates(&count);
  for (int i = 0; name == nullptr && i < count; ++i)
    if (all[i].kernels == &kKernelsAvx2 && all[i].runs_here) for_short = all[i].kernels;
#endif
  chosen_for_short.store(for_short);
  chosen.store(best);
}

const Kernels& kernels() {
  if (chosen.load() == nullptr) {
    const char* wish = std::getenv("BERTKD_CPU_ISA");
    choose(wish && *wish ? wish : nullptr, "BERTKD_CPU_ISA");
  }
  return *chosen.load();
}

const Kernels& kernels_for(int64_t length) {
  const Kernels& usual = kernels();
  return length <= kShort ? *chosen_for_short.load() : usual;
}

bool is_empty(const Attention& args) {
  if (args.batch && args.heads && args.length) return false;
  if (args.weights.data) *args.loss = 0.f;
  return true;
}

// A block is preceded by its size. The last one is kept for the next call, where it is small: fresh
// memory of a few MiB is handed back to the system and faulted in again every time, which costs a
// short sequence a tenth of its time.
constexpr int64_t kLine = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kMostKept = 0;  // every block with its own ends, for overruns to show
#else
constexpr int64_t kMostKept = int64_t{16} << 20;
#endif
std::atomic<char*> kept{nullptr};

int64_t& size_of(char* block) { return *reinterpret_cast<int64_t*>(block); }

}  // namespace

void* allocate(int64_t bytes) {
  const int64_t needed = (bytes + 2 * kLine) / kLine * kLine;
  char* block = needed <= kMostKept ? kept.exchange(nullptr) : nullptr;
  if (block != nullptr && size_of(block) < needed) {
    std::free(block);
    block = nullptr;
  }
  if (block == nullptr) {
    block = static_cast<char*>(std::aligned_alloc(kLine, static_cast<size_t>(needed)));
    if (block == nullptr) throw std::bad_alloc();
    size_of(block) = needed;
  }
  return block + kLine;
}

void release(void* memory) noexcept {
  char* block = static_cast<char*>(memory) - kLine;
  if (size_of(block) <= kMostKept) block = kept.exchange(block);
  std::free(block);
}

const char* cpu_isa() { return kernels().name; }

void select_cpu_isa(const char* name) { choose(name, "instruction set"); }

const char* cpu_isas() {
  static const std::string names = [] {
    std::string joined;
    int count;
    const Candidate* all = candidates(&count);
    for (int i = 0; i < count; ++i)
      if (all[i].runs_here)
        joined += (joined.empty() ? "" : ",") + std::string(all[i].kernels->name);
    return joined;
  }();
  return names.c_str();
}

void relation_kl(const Attention& args) {
  check_attention("relation_kl", args, Relation::kPair);
  if (!is_empty(args)) kernels_for(args.length).relation_kl(args, Relation::kPair);
}

void self_relation_kl(const Attention& args) {
  check_attention("self_relation_kl", args, Relation::kSelf);
  if (!is_empty(args)) kernels_for(args.length).relation_kl(args, Relation::kSelf);
}

void attention_mse(const Attention& args) {
  check_attention("attention_mse", args, Relation::kPair);
  if (!is_empty(args)) kernels_for(args.length).attention_mse(args);
}

void self_attention(const SelfAttention& args) {
  check_self_attention(args);
  if (args.batch && args.heads && args.length) kernels_for(args.length).self_attention(args);
}

void hidden_mse(const HiddenMse& args) {
  check_hidden_mse(args);
  *args.loss = 0.f;
  if (args.states && args.rows) kernels().hidden_mse(args);
}

void softmax_kl(const SoftmaxKl& args) {
  check_softmax_kl(args);
  if (args.weights) *args.loss = 0.f;
  if (args.rows) kernels().softmax_kl(args);
}

void exp2(const float* x, float* out, int64_t count) {
  check_exp2(x, out, count);
  kernels().exp2(x, out, count);
}

}  // namespace bertkd
