// Vectors of floats, and the few dense pieces that WKV-7 is made of, in GCC's and Clang's vector extensions: the same
// source serves AVX-512, AVX2, SSE and NEON.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

constexpr int N = 64;  // head size

// LANES floats in a vector. A block of a recurrence is ACROSS vectors wide, a block of a product DOWN × 2 vectors:
// what the machine's registers hold.
#if defined(__AVX512F__)
constexpr int LANES = 16, ACROSS = 4, DOWN = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, ACROSS = 2, DOWN = 4;
#else
constexpr int LANES = 4, ACROSS = 2, DOWN = 4;
#endif
constexpr int WIDTH = ACROSS * LANES;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;
typedef float Row[N];

template <class To, class From>
inline To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "one reinterpreted as the other");
    To out;
    std::memcpy(&out, &x, sizeof(To));
    return out;
}

inline vec load(const float* p) {
    vec x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

inline vec load(const bf16* p) {
    hvec x;
    std::memcpy(&x, p, sizeof(x));
    return bits<vec>(__builtin_convertvector(x, uvec) << 16);
}

inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof(x)); }

inline void store(bf16* p, vec x) {  // to nearest, ties to even; a NaN stays a quiet NaN
    const uvec u = bits<uvec>(x);
    const uvec nearest = u + 0x7fff + ((u >> 16) & 1);
    const hvec out = __builtin_convertvector((x == x ? nearest : (u | 0x400000)) >> 16, hvec);
    std::memcpy(p, &out, sizeof(out));
}

// A store past the caches, for what is read much later if at all: an ordinary one would first read the line. `p` is
// aligned as the vector is. Where there is no such instruction, an ordinary store.
inline void stream(float* p, vec x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX__)
    _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE__)
    _mm_stream_ps(p, (__m128)x);
#else
    store(p, x);
#endif
}

inline void stream(bf16* p, vec x) {
#if defined(__AVX__)
    hvec out;
    store(reinterpret_cast<bf16*>(&out), x);
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)out);
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)out);
#endif
#else
    store(p, x);
#endif
}

// After this, other threads see what was streamed.
inline void end_of_stream() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}

template <class To, class From>
inline void copy(To* out, const From* in) {  // a row
#pragma GCC unroll 4
    for (int n = 0; n < N; n += LANES) store(out + n, load(in + n));
}

template <class To>
inline void stream_row(To* out, const float* in) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n += LANES) stream(out + n, load(in + n));
}

inline void clear(float* out) { std::memset(out, 0, sizeof(Row)); }

// A hint: this row into the second-level cache; the first one is full of states. Inlined by force, since GCC takes a
// function that does nothing but hint for one that does nothing, and drops the calls.
template <class T>
[[gnu::always_inline]] inline void will_read(const T* p) {
    for (int n = 0; n < N; n += 64 / sizeof(T)) __builtin_prefetch(p + n, 0, 2);
}

// Not 0 + x: that is an addition, lest x be -0.
inline vec broadcast(float x) { return x - vec{}; }

// x times d, from d - 1: the form in which a decay close to 1 keeps its digits.
inline vec decayed(vec x, vec decay) { return x + x * decay; }

// exp(x) - 1 to an ulp or so: x = n ln 2 + f with |f| ≤ ln 2 / 2, then 2^n (exp(f) - 1) + (2^n - 1).
inline vec expm1(vec x) {
    const vec low = broadcast(-87.0f), high = broadcast(88.0f);  // beyond, 2^n leaves the exponents of a float
    x = x < low ? low : (x > high ? high : x);            // a NaN is neither, and stays
    const vec shifted = x * 1.44269504088896341f + 12582912.0f;  // adding 1.5 · 2^23 rounds to an integer
    const vec n = shifted - 12582912.0f;
    const vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first one exact
    vec p = f * (1.0f / 5040) + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f * f + f;
    const vec power = bits<vec>((__builtin_convertvector(n, ivec) + 127) << 23);
    return power * p + (power - 1.0f);
}

// Swaps the H × H squares off the diagonal of each 2H × 2H square in rows x and y.
template <int H, int... I>
inline void exchange(vec& x, vec& y, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    const vec low = __builtin_shufflevector(x, y, (I & H ? LANES + I - H : I)...);
    const vec high = __builtin_shufflevector(x, y, (I & H ? LANES + I : I + H)...);
#else
    const vec low = __builtin_shuffle(x, y, ivec{(I & H ? LANES + I - H : I)...});
    const vec high = __builtin_shuffle(x, y, ivec{(I & H ? LANES + I : I + H)...});
#endif
    x = low;
    y = high;
}

template <int H>
inline void exchange(vec (&x)[LANES]) {
    if constexpr (H < LANES) {
#pragma GCC unroll 16
        for (int l = 0; l < LANES; ++l)
            if (!(l & H)) exchange<H>(x[l], x[l + H], std::make_integer_sequence<int, LANES>());
        exchange<2 * H>(x);
    }
}

// out[j][i] = in[i][j]
template <int ROWS, int COLUMNS, int IN, int OUT>
void transpose(const float (*in)[IN], float (*out)[OUT]) {
    for (int i = 0; i < ROWS; i += LANES)
        for (int j = 0; j < COLUMNS; j += LANES) {
            vec square[LANES];
#pragma GCC unroll 16
            for (int l = 0; l < LANES; ++l) square[l] = load(&in[i + l][j]);
            exchange<1>(square);
#pragma GCC unroll 16
            for (int l = 0; l < LANES; ++l) store(&out[j + l][i], square[l]);
        }
}

// out[m][n] = Σ_i c[m][i] x[i][n]. `meanwhile` is called now and then.
template <int ROWS, int COLUMNS, class Meanwhile>
void multiply(const Row* __restrict c, const float (*__restrict x)[COLUMNS], float (*__restrict out)[COLUMNS],
              const Meanwhile& meanwhile) {
    for (int n = 0; n < COLUMNS; n += 2 * LANES)
        for (int m = 0; m < ROWS; m += DOWN) {
            vec sum[DOWN][2] = {};
            for (int start = 0; start < N; start += N / 2) {
                meanwhile();
                for (int i = start; i < start + N / 2; ++i) {
                    const vec left = load(&x[i][n]), right = load(&x[i][n + LANES]);
#pragma GCC unroll 8
                    for (int q = 0; q < DOWN; ++q) {
                        sum[q][0] += left * c[m + q][i];
                        sum[q][1] += right * c[m + q][i];
                    }
                }
            }
#pragma GCC unroll 8
            for (int q = 0; q < DOWN; ++q) {
                store(&out[m + q][n], sum[q][0]);
                store(&out[m + q][n + LANES], sum[q][1]);
            }
        }
}

// While it lives, subnormal numbers count as 0 in this thread. A state that fades, with nothing new to hold, passes
// through them, and there each operation costs a hundred.
class FlushSubnormals {
#if defined(__SSE__)
    const unsigned saved = _mm_getcsr();

public:
    FlushSubnormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
    uint64_t saved;

public:
    FlushSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved));
        asm volatile("msr fpcr, %0" ::"r"(saved | uint64_t{1} << 24));
    }
    ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved)); }
#else
public:
    FlushSubnormals() {}
#endif
};

}  // namespace
