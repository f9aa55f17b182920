// WKV-7, 16 tokens at a time on tensor cores: what the passes have in common. ../README.md derives the maths and the
// scales, and draws the layouts.
//
//     prepare()                          one warp, one chunk: decayed operands in place of the raw rows, and four
//                                        16 × 16 matrices
//     begin_forward(), forward_chunk()   one warp, 16 value rows (or 32): S after the chunk, M, Y
//     begin_backward(), backward_chunk() the same for E before the chunk, dM, dV
//
// Tiles are 16 rows of 64 halves, squares 16 rows of 16; both are swizzled, so that no access of a warp meets itself in
// a bank. Names follow the README: R, A, B, K for R̃, Ã, B̃, K̃; E for the gradient of S.

#pragma once

#include "tensor_cores.h"

constexpr int N = 64;             // head size
constexpr int CHUNK = 16;         // tokens
constexpr int SAVED_EVERY = 32;   // tokens between saved states
constexpr int VALUE_TILES = 4;    // of 16 value rows
constexpr int STATE = N * N;

constexpr Address TILE = 2048, SQUARE = 512;  // bytes

// A chunk's tiles in shared memory; dY follows the last one that a pass reads.
constexpr Address W = 0, R = TILE, A = 2 * TILE, B = 3 * TILE, K = 4 * TILE, V = 5 * TILE;

// A chunk's small things, after its four squares
constexpr Address T = 0, RB = SQUARE, AK = 2 * SQUARE, RK = 3 * SQUARE;
constexpr Address START = 4 * SQUARE;       // 64 floats: z, decay from the chunk's start to its reference point
constexpr Address END = START + 4 * N;      // 64 floats: from there to its end
constexpr Address EXPONENTS = END + 4 * N;  // of R and K, then room for the gradient pass
constexpr Address SMALL = EXPONENTS + 128;

constexpr int CLAMP = 100;  // exponents of what is all zeros
constexpr float LOG2_E = 1.44269504f;
constexpr unsigned ALL = 0xffffffffu;

// --- lanes and addresses ---

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }
__device__ inline int group() { return lane() / 4; }          // the row of a fragment's first matrix
__device__ inline int pair() { return lane() % 4 * 2; }       // its first column

// 16 bytes (`segment`) of a row
__device__ inline Address in_tile(int row, int segment) { return row * 128 + ((segment ^ row) & 7) * 16; }
__device__ inline Address in_square(int row, int segment) { return row * 32 + ((segment ^ row >> 2) & 1) * 16; }

// The address that this lane gives ldmatrix for 16 columns of a tile, or a square. Its four matrices are the quarters of 16 × 16,
// taken down first or across first, and transposed or not:
//
//                  plain                        transposed
//     down         A, stored [m][k]             B, stored [k][n]
//     across       B, stored [n][k]             A, stored [k][m]
//
// In B the registers 0, 1 are mma's operand for columns 0 … 7 of n, and 2, 3 for columns 8 … 15.
__device__ inline Address columns(int sixteen) { return in_tile(lane() % 16, lane() / 16) ^ sixteen * 32; }
__device__ inline Address columns_across(int sixteen) {
    return in_tile(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2) ^ sixteen * 32;
}
__device__ inline Address square() { return in_square(lane() % 16, lane() / 16); }
__device__ inline Address square_across() { return in_square(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2); }

// Fragments back into 16 columns of a tile: one that columns() loaded, and one that columns_across() did.
__device__ inline void store_fragment(Address tile, int sixteen, const Fragment& f) {
#if HAS_STORE_MATRICES
    store_matrices(tile + columns(sixteen), f);
#else
#pragma unroll
    for (int q = 0; q < 4; ++q)
        store_word(tile + in_tile(group() + q % 2 * 8, sixteen * 2 + q / 2) + pair() * 2, f.x[q]);
#endif
}
__device__ inline void store_fragment_across(Address tile, int sixteen, const Fragment& f) {
#if HAS_STORE_MATRICES
    store_matrices(tile + columns_across(sixteen), f);
#else
#pragma unroll
    for (int q = 0; q < 4; ++q)
        store_word(tile + in_tile(group() + q / 2 * 8, sixteen * 2 + q % 2) + pair() * 2, f.x[q]);
#endif
}
// And a fragment of values × tokens into a tile of tokens × values.
__device__ inline void store_fragment_transposed(Address tile, int sixteen, const Fragment& f) {
#if HAS_STORE_MATRICES
    store_matrices_transposed(tile + columns_across(sixteen), f);
#else
    Fragment t;
#pragma unroll
    for (int q = 0; q < 4; ++q) t.x[q] = transpose(f.x[q]);
    store_fragment_across(tile, sixteen, t);
#endif
}

// --- numbers ---

__device__ inline float low_bfloat16(unsigned x) { return __uint_as_float(x << 16); }
__device__ inline float high_bfloat16(unsigned x) { return __uint_as_float(x & 0xffff0000u); }

__device__ inline int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
__device__ inline float power_of_two(int exponent) {  // -126 … 127
    return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
}
__device__ inline float nearest_power_of_two(int exponent) { return power_of_two(clamp(exponent, -126, 127)); }
// The exponent of the largest among a warp's non-negative numbers: 2^exponent ≤ x < 2^(exponent + 1).
__device__ inline int exponent_of_largest(float x) {
    return clamp(static_cast<int>(__reduce_max_sync(ALL, __float_as_uint(x)) >> 23) - 127, -CLAMP, CLAMP);
}
__device__ inline void find_largest(unsigned& most, const Fragment& bfloat16s) {
#pragma unroll
    for (int q = 0; q < 4; ++q) most = larger_bfloat16s(most, bfloat16s.x[q]);
}
__device__ inline float largest(unsigned most) { return fmaxf(low_bfloat16(most), high_bfloat16(most)); }

// Two neighbouring accumulators as an operand.
__device__ inline Fragment as_operand(const Sums& left, const Sums& right) {
    return {{pack_halves(left.x[0], left.x[1]), pack_halves(left.x[2], left.x[3]),
             pack_halves(right.x[0], right.x[1]), pack_halves(right.x[2], right.x[3])}};
}
__device__ inline void scale_bfloat16s(Fragment& f, float by) {  // and make them halves
#pragma unroll
    for (int q = 0; q < 4; ++q) f.x[q] = pack_halves(low_bfloat16(f.x[q]) * by, high_bfloat16(f.x[q]) * by);
}

// sums += a b, or sums = a b if it is their `first` product: 16 × 16, two of sums, over 16 of k
__device__ inline void multiply(Sums* sums, const Fragment& a, const Fragment& b, bool first = false) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
        if (first)
            sums[n] = product_of_halves(a, b.x[2 * n], b.x[2 * n + 1]);
        else
            multiply_halves(sums[n], a, b.x[2 * n], b.x[2 * n + 1]);
}

// --- documents ---

struct Document {
    int64 index, start, stop;
};

__device__ inline Document document_at(int64 index, int64 tokens, int64 documents, const int* cu_seqlens) {
    Document d;
    d.index = index;
    d.start = cu_seqlens[index];
    d.stop = index < documents ? cu_seqlens[index + 1] : tokens;  // the padding
    if (d.start < 0 || d.stop < d.start || d.stop > tokens) __trap();  // rather than write where nothing is ours
    return d;
}

__device__ inline void clear_padding(unsigned short* out, int64 tokens, int64 heads, int64 head, int64 start) {
    for (int64 n = threadIdx.x; n < (tokens - start) * (N / 8); n += blockDim.x)
        *reinterpret_cast<uint4*>(out + ((start + n / 8) * heads + head) * N + n % 8 * 8) = uint4{0, 0, 0, 0};
}

// --- a chunk's operands ---

// [s ≤ t] - [s ≤ 8], or with s < t: times W, the logarithms of the decays from the reference point, which is after
// token 8. Exact: W is bfloat16, the sums are float32.
__device__ inline Fragment sums_from_reference(bool before) {
    Fragment f;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int t = group() + q % 2 * 8, s = pair() + q / 2 * 8 + e;
            x[e] = static_cast<float>(s <= t - (before ? 1 : 0)) - static_cast<float>(s < CHUNK / 2);
        }
        f.x[q] = pack_bfloat16s(x[0], x[1]);
    }
    return f;
}

// log2 of D_t / z and D_{t-1} / z in 16 columns
struct Decays {
    Sums through[2], before[2];
};
__device__ inline Decays decays_of(Address chunk, int sixteen, const Fragment& through, const Fragment& before) {
    const Fragment w = load_matrices_transposed(chunk + W + columns(sixteen));
    Decays d;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        d.through[n] = product_of_bfloat16s(through, w.x[2 * n], w.x[2 * n + 1]);
        d.before[n] = product_of_bfloat16s(before, w.x[2 * n], w.x[2 * n + 1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            d.through[n].x[e] *= LOG2_E;
            d.before[n].x[e] *= LOG2_E;
        }
    }
    return d;
}

// T = (I - Ab)⁻¹. Its two 8 × 8 blocks on the diagonal by substitution in float32, a column per lane; the one below them
// is T22 A21 T11. T's place holds Ab's blocks on the diagonal, in 16 rows of 8 floats; a21 is this lane's part of the third.
constexpr Address AB_ROW = 8 * 4;
__device__ inline void invert(Address t, unsigned a21) {
    const int block = lane() / 8 % 2, column = lane() % 8;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
        for (int j = 0; j < i; j += 4) {
            const FloatQuad q = load_quad(t + (block * 8 + i) * AB_ROW + j * 4);
            x[i] += q.x * x[j];
            if (j + 1 < i) x[i] += q.y * x[j + 1];
            if (j + 2 < i) x[i] += q.z * x[j + 2];
            if (j + 3 < i) x[i] += q.w * x[j + 3];
        }
    }
    __syncwarp();  // all lanes have read Ab
    if (lane() < 16)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            store_half(t + in_square(block * 8 + i, block) + column * 2, pack_halves(x[i], 0.0f));
    store_word(t + in_square(group(), 1) + pair() * 2, 0);
    __syncwarp();  // T11 and T22 are there
    const bool second = lane() / 8 == 3;  // the fourth matrix that is loaded is T22, the others are T11
    const Fragment diagonal = load_matrices(t + in_square(lane() % 8 + second * 8, second));
    const Sums p = product_of_halves({{0, a21, 0, 0}}, transpose(diagonal.x[0]), 0);
    const Sums t21 = product_of_halves({{0, 0, 0, diagonal.x[3]}}, 0, transpose(pack_halves(p.x[2], p.x[3])));
    store_word(t + in_square(group() + 8, 0) + pair() * 2, pack_halves(t21.x[2], t21.x[3]));
}

// The diagonal of R Kᵀ from the rows as given, exact but for float32's sums: [h] is row group() + h · 8, in the lane that
// has the diagonal's element of Rk. y of a document's first token is (r·k) v, and GroupNorm magnifies it however small
// r·k has become by cancelling; sums of R̃'s and K̃'s fp16 would leave an error there.
struct Diagonal {
    float x[2];
};
__device__ inline Diagonal diagonal_of_products(const Fragment (&r)[4], const Fragment (&k)[4]) {
    Sums p[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        p[h] = product_of_bfloat16s(r[0], k[0].x[2 * h], k[0].x[2 * h + 1]);
#pragma unroll
        for (int j = 1; j < 4; ++j) multiply_bfloat16s(p[h], r[j], k[j].x[2 * h], k[j].x[2 * h + 1]);
    }
    const bool second = group() % 2;
    return {{second ? p[0].x[1] : p[0].x[0], second ? p[1].x[3] : p[1].x[2]}};
}

// One warp makes a chunk's operands.
template <bool KEYS, bool REST>  // K, Ak, Rk too; and in the tile `rest` (W's will do) what rounding takes from B
__device__ inline void prepare(Address chunk, Address small, Address rest) {
    const Fragment through = sums_from_reference(false), before = sums_from_reference(true);
    Fragment r[4], k[4];
    unsigned most_r = 0, most_k = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        r[j] = load_matrices(chunk + R + columns(j));
        find_largest(most_r, r[j]);
        if constexpr (KEYS) {
            k[j] = load_matrices(chunk + K + columns_across(j));
            find_largest(most_k, k[j]);
        }
    }
    const int scale_r = exponent_of_largest(largest(most_r)) - 2;
    const int scale_k = KEYS ? exponent_of_largest(largest(most_k)) - 2 : 0;
    const float minus_r = static_cast<float>(-scale_r), to_k = power_of_two(-scale_k);
    if (lane() == 0) {
        store_word(small + EXPONENTS, static_cast<unsigned>(scale_r));
        store_word(small + EXPONENTS + 4, static_cast<unsigned>(scale_k));
    }
    Diagonal own = {};
    if constexpr (KEYS) {
        own = diagonal_of_products(r, k);
#pragma unroll
        for (int h = 0; h < 2; ++h) own.x[h] = own.x[h] * power_of_two(-scale_r) * to_k;
    }
    Sums ab[2], ak[2], rb[2], rk[2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const Decays d = decays_of(chunk, j, through, before);
        Fragment a = load_matrices(chunk + A + columns(j)), b = load_matrices(chunk + B + columns_across(j));
        Fragment r_j = r[j], k_j = k[j], b_rest;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            // Rows group() + q % 2 · 8, columns j · 16 + q / 2 · 8 + pair(); in b and k the other way round.
            const float *c = &d.through[q / 2].x[q % 2 * 2], *u = &d.before[q / 2].x[q % 2 * 2];
            r_j.x[q] = pack_halves(low_bfloat16(r_j.x[q]) * exp2_approximate(c[0] + minus_r),
                                   high_bfloat16(r_j.x[q]) * exp2_approximate(c[1] + minus_r));
            a.x[q] = pack_halves(low_bfloat16(a.x[q]) * exp2_approximate(u[0]),
                                 high_bfloat16(a.x[q]) * exp2_approximate(u[1]));
            const int other = q % 2 * 2 + q / 2;
            const float undo[2] = {exp2_approximate(-c[0]), exp2_approximate(-c[1])};
            const float low = low_bfloat16(b.x[other]) * undo[0], high = high_bfloat16(b.x[other]) * undo[1];
            b.x[other] = pack_halves(low, high);
            if constexpr (REST) {
                const FloatPair rounded = widen_halves(b.x[other]);
                b_rest.x[other] = pack_halves(low - rounded.x, high - rounded.y);
            }
            if constexpr (KEYS)
                k_j.x[other] = pack_halves(low_bfloat16(k_j.x[other]) * (undo[0] * to_k),
                                           high_bfloat16(k_j.x[other]) * (undo[1] * to_k));
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {  // from before the first row, and from the last one
            const bool first = group() == 0;
            const FloatPair x = {exp2_approximate(first ? -d.before[n].x[0] : d.through[n].x[2]),
                                 exp2_approximate(first ? -d.before[n].x[1] : d.through[n].x[3])};
            store_pair(small + (first ? START : END) + (j * 16 + n * 8 + pair()) * 4, x, first || group() == 7);
        }
        multiply(ab, a, b, j == 0);
        multiply(rb, r_j, b, j == 0);
        if constexpr (KEYS) {
            multiply(ak, a, k_j, j == 0);
            multiply(rk, r_j, k_j, j == 0);
        }
        __syncwarp();  // all lanes have read these columns
        store_fragment(chunk + R, j, r_j);
        store_fragment(chunk + A, j, a);
        store_fragment_across(chunk + B, j, b);
        if constexpr (KEYS) store_fragment_across(chunk + K, j, k_j);
        if constexpr (REST) store_fragment_across(rest, j, b_rest);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int t = group() + h * 8, s = n * 8 + pair();
            const auto lower = [=](const Sums(&x)[2], int e, bool diagonal) {
                return s + e < t + (diagonal ? 1 : 0) ? x[n].x[h * 2 + e] : 0.0f;
            };
            const Address at = small + in_square(t, n) + pair() * 2;
            if (n == h) store_pair(small + T + t * AB_ROW + pair() * 4, {lower(ab, 0, false), lower(ab, 1, false)});
            store_word(at + RB, pack_halves(lower(rb, 0, true), lower(rb, 1, true)));
            if constexpr (KEYS) {
                store_word(at + AK, pack_halves(lower(ak, 0, false), lower(ak, 1, false)));
                const auto with_own = [=](int e) { return s + e == t ? own.x[h] : lower(rk, e, false); };
                store_word(at + RK, pack_halves(with_own(0), with_own(1)));
            }
        }
    __syncwarp();  // Ab is there
    invert(small + T, pack_halves(ab[0].x[2], ab[0].x[3]));
}

// --- 16 value rows ---

// 16 values × 64 keys of S or E, as accumulators. Lane l has rows l / 4 and l / 4 + 8.
struct Rows {
    Sums at[8];
};

__device__ inline void clear(Rows& s) {
#pragma unroll
    for (int n = 0; n < 8; ++n) s.at[n] = {};
}
__device__ inline void load_rows(Rows& s, const float* state, int tile) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float2 x =
                *reinterpret_cast<const float2*>(state + (tile * 16 + group() + h * 8) * N + n * 8 + pair());
            s.at[n].x[2 * h] = x.x;
            s.at[n].x[2 * h + 1] = x.y;
        }
}
__device__ inline void store_rows(float* state, const Rows& s, int tile) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            *reinterpret_cast<float2*>(state + (tile * 16 + group() + h * 8) * N + n * 8 + pair()) =
                float2{s.at[n].x[2 * h], s.at[n].x[2 * h + 1]};
}

__device__ inline float largest(const Rows& s) {
    float most = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) most = fmaxf(most, fabsf(s.at[n].x[e]));
    return most;
}
__device__ inline void scale(Rows& s, float by) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s.at[n].x[e] *= by;
}
// Each key by its number, times one for all.
__device__ inline void scale_keys(Rows& s, Address floats, float by) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const FloatPair z = load_pair(floats + (n * 8 + pair()) * 4);
        s.at[n].x[0] *= z.x * by;
        s.at[n].x[1] *= z.y * by;
        s.at[n].x[2] *= z.x * by;
        s.at[n].x[3] *= z.y * by;
    }
}
__device__ inline Fragment keys_as_operand(const Rows& s, int sixteen) {
    return as_operand(s.at[2 * sixteen], s.at[2 * sixteen + 1]);
}

// Saved rows: the operand that a chunk makes of them, in the order of the lanes' registers, and its scale.
struct SavedRows {
    uint4* halves;  // [4][32]
    int* scale;
};
__device__ inline SavedRows saved_rows(unsigned short* states, int* scales, int64 slot, int64 heads, int64 head,
                                       int tile) {
    const int64 state = slot * heads + head;
    return {reinterpret_cast<uint4*>(states + state * STATE) + tile * 128 + lane(), scales + state * VALUE_TILES + tile};
}
__device__ inline void save_rows(const SavedRows& to, const Fragment (&rows)[4], int scale) {
#pragma unroll
    for (int j = 0; j < 4; ++j) to.halves[j * 32] = uint4{rows[j].x[0], rows[j].x[1], rows[j].x[2], rows[j].x[3]};
    if (lane() == 0) *to.scale = scale;
}
__device__ inline void restore_rows(const SavedRows& from, Fragment (&rows)[4], int& scale) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint4 u = from.halves[j * 32];
        rows[j] = {{u.x, u.y, u.z, u.w}};
    }
    scale = *from.scale;
}
__device__ inline void widen_rows(Rows& s, const Fragment (&rows)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const FloatPair p = widen_halves(rows[j].x[q]);
            s.at[2 * j + q / 2].x[q % 2 * 2] = p.x;
            s.at[2 * j + q / 2].x[q % 2 * 2 + 1] = p.y;
        }
}

// 16 values × 16 tokens of y or dv, in bfloat16, to [token][value].
__device__ inline void write_tokens(unsigned short* out, int64 heads, int64 head, int64 first, int64 stop, int tile,
                                    const Sums (&x)[2], float by) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const unsigned word = transpose(pack_bfloat16s(x[n].x[2 * h] * by, x[n].x[2 * h + 1] * by));
            const int64 token = first + n * 8 + group();
            if (token < stop)
                *reinterpret_cast<unsigned*>(out + (token * heads + head) * N + tile * 16 + h * 8 + pair()) = word;
        }
}

// A chunk and 16 value rows, forward; what is in it is 2^-scale times as large as it should be.
struct ForwardChunk {
    Fragment state[4];  // S diag z: 16 values × 64 keys
    Fragment v, m;      // 16 values × 16 tokens
    Sums y[2];          // the same; 2^-(scale + R's) times as large
    int scale;
};

// From S before the chunk to the operands: chooses the scale.
__device__ inline void begin_forward(ForwardChunk& x, Rows& s, Address chunk, Address small, int tile) {
    const int scale_k = static_cast<int>(load_word(small + EXPONENTS + 4));
    x.v = load_matrices_transposed(chunk + V + columns_across(tile));
    unsigned most_v = 0;
    find_largest(most_v, x.v);
    scale_keys(s, small + START, 1.0f);
    x.scale = exponent_of_largest(fmaxf(largest(s) * 0.0625f, largest(most_v) * power_of_two(scale_k - 2)));
    scale(s, power_of_two(-x.scale));
    scale_bfloat16s(x.v, nearest_power_of_two(scale_k - x.scale));
#pragma unroll
    for (int j = 0; j < 4; ++j) x.state[j] = keys_as_operand(s, j);
}
// The same from rows that were saved there.
__device__ inline void resume_forward(ForwardChunk& x, Rows& s, Address chunk, Address small, int tile) {
    widen_rows(s, x.state);
    x.v = load_matrices_transposed(chunk + V + columns_across(tile));
    scale_bfloat16s(x.v, nearest_power_of_two(static_cast<int>(load_word(small + EXPONENTS + 4)) - x.scale));
}

// `TILES` of 16 value rows through one chunk, once begun: M, Y, and S after the chunk. The pass that follows a document
// multiplies M by B and by its rest: where a token is repeated, Mᵀ B removes what Vᵀ K has put there before, and an error
// in that direction's neighbours is removed by nothing.
template <int TILES, bool OUTPUT>
__device__ inline void forward_chunk(ForwardChunk (&x)[TILES], Rows (&s)[TILES], Address chunk, Address small) {
    Sums sums[TILES][2];
    {
        const Fragment ak = load_matrices(small + AK + square_across()), rk = load_matrices(small + RK + square_across());
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            multiply(sums[i], x[i].v, ak, true);
            if (OUTPUT) multiply(x[i].y, x[i].v, rk, true);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const Fragment a = load_matrices(chunk + A + columns_across(j));
#pragma unroll
        for (int i = 0; i < TILES; ++i) multiply(sums[i], x[i].state[j], a);
        if constexpr (OUTPUT) {
            const Fragment r = load_matrices(chunk + R + columns_across(j));
#pragma unroll
            for (int i = 0; i < TILES; ++i) multiply(x[i].y, x[i].state[j], r);
        }
    }
    const Fragment t = load_matrices(small + T + square_across()), rb = load_matrices(small + RB + square_across());
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        Sums m[2];
        multiply(m, as_operand(sums[i][0], sums[i][1]), t, true);
        x[i].m = as_operand(m[0], m[1]);
        if (OUTPUT) multiply(x[i].y, x[i].m, rb);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const Fragment k = load_matrices_transposed(chunk + K + columns(j));
        const Fragment b = load_matrices_transposed(chunk + B + columns(j));
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            multiply(&s[i].at[2 * j], x[i].v, k);
            multiply(&s[i].at[2 * j], x[i].m, b);
        }
        if constexpr (OUTPUT) {
            const Fragment b_rest = load_matrices_transposed(chunk + W + columns(j));
#pragma unroll
            for (int i = 0; i < TILES; ++i) multiply(&s[i].at[2 * j], x[i].m, b_rest);
        }
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) scale_keys(s[i], small + END, power_of_two(x[i].scale));
}

// The same, backward.
struct BackwardChunk {
    Fragment state[4];  // E diag(D_L / z)
    Fragment dy, dm;    // 16 values × 16 tokens
    Sums dv[2];         // the same; 2^-(scale + K's) times as large
    int scale;
};

__device__ inline void begin_backward(BackwardChunk& x, Rows& e, Address chunk, Address small, Address dy, int tile) {
    const int scale_r = static_cast<int>(load_word(small + EXPONENTS));
    x.dy = load_matrices_transposed(chunk + dy + columns_across(tile));
    unsigned most_dy = 0;
    find_largest(most_dy, x.dy);
    scale_keys(e, small + END, 1.0f);
    x.scale = exponent_of_largest(fmaxf(largest(e) * 0.0625f, largest(most_dy) * power_of_two(scale_r - 2)));
    scale(e, power_of_two(-x.scale));
    scale_bfloat16s(x.dy, nearest_power_of_two(scale_r - x.scale));
#pragma unroll
    for (int j = 0; j < 4; ++j) x.state[j] = keys_as_operand(e, j);
}
__device__ inline void resume_backward(BackwardChunk& x, Rows& e, Address chunk, Address small, Address dy, int tile) {
    widen_rows(e, x.state);
    x.dy = load_matrices_transposed(chunk + dy + columns_across(tile));
    scale_bfloat16s(x.dy, nearest_power_of_two(static_cast<int>(load_word(small + EXPONENTS)) - x.scale));
}

// With OUTPUT, dM is of B and its rest: where a token is repeated, E is all but 0 in B's direction, not in its error's.
template <int TILES, bool OUTPUT>
__device__ inline void backward_chunk(BackwardChunk (&x)[TILES], Rows (&e)[TILES], Address chunk, Address small,
                                      Address rest) {
    Sums sums[TILES][2];
    {
        const Fragment rb = load_matrices_transposed(small + RB + square());
#pragma unroll
        for (int i = 0; i < TILES; ++i) multiply(sums[i], x[i].dy, rb, true);
    }
    if constexpr (OUTPUT) {
        const Fragment rk = load_matrices_transposed(small + RK + square());
#pragma unroll
        for (int i = 0; i < TILES; ++i) multiply(x[i].dv, x[i].dy, rk, true);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const Fragment b = load_matrices(chunk + B + columns_across(j));
#pragma unroll
        for (int i = 0; i < TILES; ++i) multiply(sums[i], x[i].state[j], b);
        if constexpr (OUTPUT) {
            const Fragment k = load_matrices(chunk + K + columns_across(j));
#pragma unroll
            for (int i = 0; i < TILES; ++i) multiply(x[i].dv, x[i].state[j], k);
            const Fragment b_rest = load_matrices(rest + columns_across(j));
#pragma unroll
            for (int i = 0; i < TILES; ++i) multiply(sums[i], x[i].state[j], b_rest);
        }
    }
    {
        const Fragment t = load_matrices_transposed(small + T + square());
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            Sums dm[2];
            multiply(dm, as_operand(sums[i][0], sums[i][1]), t, true);
            x[i].dm = as_operand(dm[0], dm[1]);
        }
    }
    if constexpr (OUTPUT) {
        const Fragment ak = load_matrices_transposed(small + AK + square());
#pragma unroll
        for (int i = 0; i < TILES; ++i) multiply(x[i].dv, x[i].dm, ak);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const Fragment r = load_matrices_transposed(chunk + R + columns(j));
        const Fragment a = load_matrices_transposed(chunk + A + columns(j));
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            multiply(&e[i].at[2 * j], x[i].dy, r);
            multiply(&e[i].at[2 * j], x[i].dm, a);
        }
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) scale_keys(e[i], small + START, power_of_two(x[i].scale));
}
