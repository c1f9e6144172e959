// Tells the thread sanitizer that an OpenMP parallel region starts after what came before it and ends before what
// comes after. libgomp synchronises by futexes of its own, which the sanitizer does not see: without this every value
// that one region writes and the next one reads on another thread is reported. Preloaded by tools/sanitize.sh; torch's
// parallel_for enters every region through GOMP_parallel.
#define _GNU_SOURCE
#include <dlfcn.h>

void __tsan_acquire(void *address);
void __tsan_release(void *address);

struct region {
  void (*body)(void *);
  void *data;
  char begin, end;  // two places, or a thread that is done early would seem to come before one that starts late
};

static void run(void *argument) {
  struct region *region = argument;
  __tsan_acquire(&region->begin);
  region->body(region->data);
  __tsan_release(&region->end);
}

void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
  void (*next)(void (*)(void *), void *, unsigned, unsigned) = dlsym(RTLD_NEXT, "GOMP_parallel");
  struct region region = {body, data, 0, 0};
  __tsan_release(&region.begin);
  next(run, &region, threads, flags);
  __tsan_acquire(&region.end);
}
