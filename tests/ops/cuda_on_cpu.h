// Runs a CUDA kernel on the CPU, to see whether it computes the right thing: one fiber per thread of a block, blocks
// one after another. A fiber runs until it needs the others, at a barrier or in a warp shuffle. Lot decides which warp
// runs next and how far it gets ahead of the others, and the order of its threads; shared memory is full of NaN when a
// block begins. So a barrier that is missing shows; leave_out() takes one out, by its place in the source.
//
// Include this, then the kernel's source, then launch(). For g++ and clang++ on Linux.

#pragma once

#undef _FORTIFY_SOURCE  // it takes a jump between stacks for an attack

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

// Of that section, by the linker; a source without __shared__ has none.
extern char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, blockDim;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace cuda_on_cpu {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10;

enum class Waits { nothing, block, warp, ended };

struct Fiber {
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    ucontext_t first;
    jmp_buf at;
    bool started = false;
    Waits waits = Waits::nothing;
    float shuffled[2];  // by turns: who is ahead writes the one that nobody still reads
    int shuffled_at[2];  // lines
    int turn = 0;
    unsigned block_barriers = 0, warp_barriers = 0;  // passed by this thread
};

static std::vector<Fiber> fibers;
static std::function<void()> body;
static jmp_buf scheduler;
static int current;
static std::function<void()> before_block, after_block;
static std::string first_error;  // of a launch
static std::string left_out_file;  // of the barrier, commit or wait that does nothing: its file's name and its line
static int left_out_line = 0;      // 0: none
static std::map<int, int> bank_conflicts;  // line → wavefronts of its accesses to shared memory where one would do

template <class... Values>
void record(const char* format, Values... values) {
    if (!first_error.empty()) return;
    char text[300];
    std::snprintf(text, sizeof(text), format, values...);
    first_error = "block " + std::to_string(blockIdx.x) + ": " + text;
}

inline void leave_out(const char* file, int line) {
    left_out_file = file;
    left_out_line = line;
}

inline bool is_left_out(const char* path, int line) {
    if (line != left_out_line) return false;
    const char* slash = std::strrchr(path, '/');
    return left_out_file == (slash ? slash + 1 : path);
}

// Switching by _setjmp is some 30 times faster than by swapcontext, which asks the kernel for the signal mask.
inline void wait(Waits what) {
    Fiber& self = fibers[current];
    self.waits = what;
    if (_setjmp(self.at) == 0) _longjmp(scheduler, 1);
}

inline void begin() {
    body();
    fibers[current].waits = Waits::ended;
    _longjmp(scheduler, 1);
}

static jmp_buf given_up;

// Ends the launch.
[[noreturn]] inline void fail(const char* what) {
    record("%s%s", what, "");
    _longjmp(given_up, 1);
}

// Those of [first, last) that wait for each other go on, if all do or have ended. True: some do go on.
inline bool release(size_t first, size_t last, Waits what) {
    bool any = false;
    for (size_t n = first; n < last; ++n) {
        if (fibers[n].waits != what && fibers[n].waits != Waits::ended) return false;
        any |= fibers[n].waits == what;
    }
    for (size_t n = first; any && n < last; ++n)
        if (fibers[n].waits == what) fibers[n].waits = Waits::nothing;
    return any;
}

// Runs a fiber until it waits.
inline void resume(int n) {
    current = n;
    threadIdx.x = n;
    Fiber& fiber = fibers[n];
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = STACK_BYTES;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, begin, 0);
    setcontext(&fiber.first);
}

// The threads of a warp that can run, each until it waits, in any order. False: none can.
inline bool run_warp(size_t warp, std::mt19937& lot) {
    std::vector<int> ready;
    release(warp, warp + WARP, Waits::warp);
    for (size_t n = warp; n < warp + WARP; ++n)
        if (fibers[n].waits == Waits::nothing) ready.push_back(static_cast<int>(n));
    for (size_t n = ready.size(); n > 1; --n) std::swap(ready[n - 1], ready[lot() % n]);
    for (const int n : ready) resume(n);
    return !ready.empty();
}

inline void run_block(std::mt19937& lot) {
    if (before_block) before_block();
    std::memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
    for (auto& fiber : fibers) {
        fiber.started = false;
        fiber.waits = Waits::nothing;
        fiber.block_barriers = fiber.warp_barriers = 1;
    }
    const size_t warps = fibers.size() / WARP;
    for (;;) {
        // One warp for a while, sometimes as far as it gets: the others are then as late as they can be.
        const size_t chosen = lot() % warps * WARP;
        int turns = lot() % 64;
        while (run_warp(chosen, lot) && --turns > 0) {
        }
        bool any = false;
        for (size_t warp = 0; !any && warp < fibers.size(); warp += WARP) {
            release(warp, warp + WARP, Waits::warp);
            for (size_t n = warp; n < warp + WARP; ++n) any |= fibers[n].waits == Waits::nothing;
        }
        if (any || release(0, fibers.size(), Waits::block)) continue;
        for (auto& fiber : fibers)
            if (fiber.waits != Waits::ended) fail("threads wait for each other at different places");
        if (after_block) after_block();
        return;
    }
}

// All blocks of a grid, each with `threads` threads that run `kernel`; `seed` decides their order.
inline void launch(unsigned blocks, unsigned threads, unsigned seed, std::function<void()> kernel) {
    std::mt19937 lot(seed);
    body = std::move(kernel);
    fibers.clear();
    fibers.resize(threads);
    blockDim.x = threads;
    first_error.clear();
    if (_setjmp(given_up)) return;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(lot);
}

// The same with the kernel's arguments as they are handed to a GPU: integers, pointers among them.
template <class... Parameters>
void launch(unsigned blocks, unsigned threads, unsigned seed, void (*kernel)(Parameters...), const int64_t* arguments) {
    launch(blocks, threads, seed, [=] {
        const int64_t* next = arguments;
        std::tuple<Parameters...> all{[&] {
            if constexpr (std::is_pointer_v<Parameters>)
                return reinterpret_cast<Parameters>(*next++);
            else
                return static_cast<Parameters>(*next++);
        }()...};
        std::apply(kernel, all);
    });
}

// For kernels whose shared memory is static.
template <class Kernel>
void launch_without_shared_memory(unsigned blocks, unsigned threads, unsigned, unsigned seed, Kernel kernel,
                                  const int64_t* arguments) {
    launch(blocks, threads, seed, kernel, arguments);
}

}  // namespace cuda_on_cpu

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (cuda_on_cpu::is_left_out(file, line)) return;
    cuda_on_cpu::wait(cuda_on_cpu::Waits::block);
    ++cuda_on_cpu::fibers[cuda_on_cpu::current].block_barriers;
}

inline float __shfl_xor_sync(unsigned, float x, int mask, int line = __builtin_LINE()) {
    using namespace cuda_on_cpu;
    const int self = current, turn = fibers[self].turn ^= 1;
    fibers[self].shuffled[turn] = x;
    fibers[self].shuffled_at[turn] = line;
    wait(Waits::warp);
    if (fibers[self ^ mask].shuffled_at[turn] != line) fail("a shuffle that its lanes do not share");
    return fibers[self ^ mask].shuffled[turn];
}

inline float __uint_as_float(unsigned x) {
    float out;
    std::memcpy(&out, &x, sizeof(out));
    return out;
}

inline unsigned __float_as_uint(float x) {
    unsigned out;
    std::memcpy(&out, &x, sizeof(out));
    return out;
}

[[noreturn]] inline void __trap() { cuda_on_cpu::fail("trap"); }
