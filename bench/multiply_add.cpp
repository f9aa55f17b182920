// The float multiply-adds per second that these cores do when nothing else limits them: the unit of bench/wkv7_cpu.py.

#include <chrono>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int CHAINS = 12;  // enough to hide the latency of each
typedef float vec __attribute__((vector_size(4 * LANES)));

double rate(long rounds) {
    vec x[CHAINS];
    const vec factor = 0.999f - vec{}, term = 0.001f - vec{};
    for (int n = 0; n < CHAINS; ++n) x[n] = float(n) - vec{};
    const auto start = std::chrono::steady_clock::now();
    for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int n = 0; n < CHAINS; ++n) x[n] = x[n] * factor + term;
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    vec sum = x[0];
    for (int n = 1; n < CHAINS; ++n) sum += x[n];
    volatile float used = sum[0];
    (void)used;
    return double(rounds) * CHAINS * LANES / seconds;
}

}  // namespace

// The rate of all threads together, over a third of a millisecond: short enough to find the cores free on a busy machine.
extern "C" double multiply_adds_per_second(int threads) {
    constexpr long ROUNDS = 1 << 17;
    std::vector<double> rates(threads);
    std::vector<std::thread> others;
    for (int n = 1; n < threads; ++n) others.emplace_back([&rates, n] { rates[n] = rate(ROUNDS); });
    rates[0] = rate(ROUNDS);
    for (auto& other : others) other.join();
    double sum = 0;
    for (const double r : rates) sum += r;
    return sum;
}
