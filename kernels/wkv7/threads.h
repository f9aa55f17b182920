// Work on several threads: those of torch's OpenMP where they are known, so that no others compete with them.

#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// GOMP_parallel of the OpenMP that torch computes with, found by streaming_rwkv/ops/threads.py: calls the function
// with the data on each thread of a team, the caller's among them, and returns when all are done.
typedef void (*Parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);

struct Threads {
    int64_t count;
    Parallel parallel;  // or null
};

// f() once, or where there is more than one part to do on all threads at once; f takes parts from a queue until it is
// empty, so it matters to no result how many threads really come.
//
// Without OpenMP the threads live for this call only. Their start takes some 20 µs; what costs more is that the threads
// of torch's last operation still spin, waiting for its next, on the processors that these need.
template <class F>
void on_threads(const Threads& threads, int64_t parts, const F& f) {
    if (threads.count < 2 || parts < 2) return f();
    if (threads.parallel)
        return threads.parallel([](void* data) { (*static_cast<const F*>(data))(); }, const_cast<F*>(&f),
                                static_cast<unsigned>(threads.count), 0);
    std::vector<std::thread> helpers;
    try {
        for (int64_t n = 1; n < threads.count && n < parts; ++n) helpers.emplace_back(f);
    } catch (const std::system_error&) {
        // The system gives no more threads; those that run share the work.
    }
    f();
    for (auto& helper : helpers) helper.join();
}

}  // namespace
