// Large pages for large results. The system clears every page of fresh memory as it is first
// written, and takes a fault for each: with pages of 4 KiB that is most of the time of a kernel
// that does little else than write.
#include <cstdint>

#include "../bertkd.h"
#include "checks.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bertkd {

void use_large_pages(void* data, int64_t bytes) {
  check_memory(data, bytes);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whole pages only; the first and the last belong to neighbours too.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  const uintptr_t to = end / page * page;
  // Advice: where it is refused the memory is what it was.
  if (from < to) (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace bertkd
