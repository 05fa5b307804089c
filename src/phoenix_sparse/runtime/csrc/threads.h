// Work shared out over the threads of the OpenMP runtime that is in the process already, torch's own.
#pragma once

#include <atomic>
#include <cstdint>

// The entry points that every OpenMP runtime for gcc's programs has (libgomp, and LLVM's and Intel's libomp). They are
// called by name, so that no compiler flag adds a runtime, and with it a second pool of threads, to this library. Where
// there is none they stay null, and all work is done by the caller.
#define PHX_FROM_OUTSIDE __attribute__((weak, visibility("default")))
extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) PHX_FROM_OUTSIDE;
int omp_get_thread_num(void) PHX_FROM_OUTSIDE;
int omp_get_num_threads(void) PHX_FROM_OUTSIDE;
}

namespace phx {

inline bool have_threads() { return GOMP_parallel && omp_get_thread_num && omp_get_num_threads; }

constexpr int MAX_THREADS = 1024;

// Call work(item) for each item in 0..items-1. A thread goes through a range of its own, in order, and then helps with
// what is left of others': a core that others use as well holds nobody up. Who does an item has no effect on it.
template <class Work>
void share_out(int threads, int64_t items, const Work& work) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > items) threads = static_cast<int>(items);
    if (threads <= 1 || !have_threads()) {
        for (int64_t i = 0; i < items; ++i) work(i);
        return;
    }
    struct alignas(64) Range {
        std::atomic<int64_t> next;
        int64_t end;
    };
    struct Shared {
        const Work& work;
        Range* ranges;
        int count;
    };
    // On the stack, for a call that takes tens of microseconds.
    Range ranges[MAX_THREADS];
    for (int t = 0; t < threads; ++t) {
        ranges[t].next.store(items * t / threads, std::memory_order_relaxed);
        ranges[t].end = items * (t + 1) / threads;
    }
    Shared shared{work, ranges, threads};
    auto body = [](void* data) {
        Shared& all = *static_cast<Shared*>(data);
        // Fewer threads than asked for may have come; then the ranges without one are helped out with, too.
        const int me = omp_get_thread_num();
        for (int t = 0; t < all.count; ++t) {
            Range& range = all.ranges[(me + t) % all.count];
            for (;;) {
                int64_t i = range.next.fetch_add(1, std::memory_order_relaxed);
                if (i >= range.end) break;
                all.work(i);
            }
        }
    };
    GOMP_parallel(body, &shared, static_cast<unsigned>(threads), 0);
}

}  // namespace phx
