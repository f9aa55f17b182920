// WKV-7 in chunks: the gradients of the inputs, all groups of 32 tokens at once. A block has one group of one head: it
// reads the state before the group and the gradient of the state after it, which the passes of chunked_chains.cu saved.
//
//     prepare    a warp per chunk makes the operands
//     follow     a warp per 16 value rows: E back through the group, which gives dv, then S forward
//     pairs      a warp per 16 × 16 gradient: dY Vᵀ, dY Mᵀ, dM Vᵀ, dM Mᵀ
//     finish     a warp per 16 keys: dr, dlog_decay, dk, da, db
//
// Each line waits for the one above.

#include "chunk.h"

constexpr int CHUNKS = SAVED_EVERY / CHUNK;  // of a group
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int TENSORS = 7;

constexpr Address DY = V + TILE, M = DY + TILE, DM = M + TILE;  // tokens × values, as V
constexpr Address S = DM + TILE, E = S + VALUE_TILES * TILE;    // values × keys
constexpr Address B_REST = M;  // until M comes
constexpr Address CHUNK_BYTES = E + VALUE_TILES * TILE;
constexpr Address BYTES = CHUNKS * (CHUNK_BYTES + SMALL);

constexpr Address FORWARD_SCALES = EXPONENTS + 8, BACKWARD_SCALES = FORWARD_SCALES + 16, PAIR_SCALES = BACKWARD_SCALES + 16;
// Once T, Rb, Ak and Rk have been used, the gradients of Rk, Rb, Ak and Ab take their place.
constexpr int PAIR_RK = 0, PAIR_RB = 1, PAIR_AK = 2, PAIR_AB = 3;

// The document that has a slot for saved states: slots begin at start / 32 + index and rise. A warp tries 32 at a time.
__device__ inline int64 document_of_slot(int64 slot, int64 documents, const int* cu_seqlens) {
    int64 low = 0, high = documents;  // low's slots begin at or before this one, high's do not
    while (high - low > 1) {
        const int64 step = (high - low + 31) / 32, tried = low + (lane() + 1) * step;
        const bool before = tried < high && cu_seqlens[tried] / SAVED_EVERY + tried <= slot;
        low += __popc(__ballot_sync(ALL, before)) * step;
        high = low + step < high ? low + step : high;
    }
    return low;
}

struct Group {
    int64 heads, head, slot, first, stop;  // tokens
    int chunks;
};

__device__ inline void copy_inputs(const Group& group, const unsigned short* const (&inputs)[TENSORS], Address to) {
    const int segment = threadIdx.x % 8;
#pragma unroll
    for (int row = threadIdx.x / 8; row < SAVED_EVERY; row += THREADS / 8) {
        const bool inside = group.first + row < group.stop;
        const int64 offset = ((inside ? group.first + row : group.first) * group.heads + group.head) * N + segment * 8;
        const Address to_row = to + row / CHUNK * CHUNK_BYTES + in_tile(row % CHUNK, segment);
#pragma unroll
        for (int n = 0; n < TENSORS; ++n) copy_async(to_row + n * TILE, inputs[n] + offset, inside);
    }
    commit_copies();
}

// S through the group, from what was saved: leaves S diag z, and V and M as operands.
__device__ inline void follow_forward(const Group& group, ForwardChunk (&x)[1], Address chunks, Address smalls) {
    Rows s[1];
#pragma unroll 1
    for (int n = 0; n < group.chunks; ++n) {
        const Address chunk = chunks + n * CHUNK_BYTES, small = smalls + n * SMALL;
        if (n == 0)
            resume_forward(x[0], s[0], chunk, small, warp());
        else
            begin_forward(x[0], s[0], chunk, small, warp());
        forward_chunk<1, false>(x, s, chunk, small);
        __syncwarp();  // all lanes have read V
        store_fragment_transposed(chunk + V, warp(), x[0].v);
        store_fragment_transposed(chunk + M, warp(), x[0].m);
#pragma unroll
        for (int j = 0; j < 4; ++j) store_fragment(chunk + S + warp() * TILE, j, x[0].state[j]);
        if (lane() == 0) store_word(small + FORWARD_SCALES + warp() * 4, static_cast<unsigned>(x[0].scale));
    }
}

// E back through the group: leaves E diag(D_L / z), and dY and dM as operands; writes dv.
__device__ inline void follow_backward(const Group& group, BackwardChunk (&x)[1], Address chunks, Address smalls,
                                       unsigned short* dv) {
    Rows e[1];
#pragma unroll 1
    for (int n = group.chunks - 1; n >= 0; --n) {
        const Address chunk = chunks + n * CHUNK_BYTES, small = smalls + n * SMALL;
        if (n == group.chunks - 1)
            resume_backward(x[0], e[0], chunk, small, DY, warp());
        else
            begin_backward(x[0], e[0], chunk, small, DY, warp());
        backward_chunk<1, true>(x, e, chunk, small, chunk + B_REST);
        write_tokens(dv, group.heads, group.head, group.first + n * CHUNK, group.stop, warp(), x[0].dv,
                     nearest_power_of_two(x[0].scale + static_cast<int>(load_word(small + EXPONENTS + 4))));
        __syncwarp();  // all lanes have read dY
        store_fragment_transposed(chunk + DY, warp(), x[0].dy);
        store_fragment_transposed(chunk + DM, warp(), x[0].dm);
#pragma unroll
        for (int j = 0; j < 4; ++j) store_fragment(chunk + E + warp() * TILE, j, x[0].state[j]);
        if (lane() == 0) store_word(small + BACKWARD_SCALES + warp() * 4, static_cast<unsigned>(x[0].scale));
    }
}

// Sums over values pair S, V, M with E, dY, dM: `by` brings 16 values' products to one scale, 2^-top, as a factor for
// both halves of a register.
struct Scales {
    int top;
    unsigned by[VALUE_TILES];
};
__device__ inline Scales scales_of(Address small) {
    Scales scales;
    int sum[VALUE_TILES];
    scales.top = -4 * CLAMP;
#pragma unroll
    for (int k = 0; k < VALUE_TILES; ++k) {
        sum[k] = static_cast<int>(load_word(small + FORWARD_SCALES + k * 4)) +
                 static_cast<int>(load_word(small + BACKWARD_SCALES + k * 4));
        scales.top = sum[k] > scales.top ? sum[k] : scales.top;
    }
#pragma unroll
    for (int k = 0; k < VALUE_TILES; ++k) {
        const float by = nearest_power_of_two(sum[k] - scales.top);
        scales.by[k] = pack_halves(by, by);
    }
    return scales;
}
__device__ inline Fragment scaled(Fragment f, unsigned by) {
#pragma unroll
    for (int q = 0; q < 4; ++q) f.x[q] = scale_halves(f.x[q], by);
    return f;
}

// One of the gradients of Rk, Rb, Ak, Ab: of dY or dM with V or M, each with an exponent of its own.
__device__ inline void make_pairs(Address chunk, Address small) {
    const int which = warp();
    const bool of_dy = which == PAIR_RK || which == PAIR_RB, with_v = which == PAIR_RK || which == PAIR_AK;
    const Address left = chunk + (of_dy ? DY : DM), right = chunk + (with_v ? V : M);
    const Scales scales = scales_of(small);
    Sums p[2];
#pragma unroll
    for (int k = 0; k < VALUE_TILES; ++k)
        multiply(p, scaled(load_matrices(left + columns(k)), scales.by[k]), load_matrices(right + columns_across(k)), k == 0);
    float most = 0.0f;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int t = group() + e / 2 * 8, s = n * 8 + pair() + e % 2;
            if (s >= t + (of_dy ? 1 : 0)) p[n].x[e] = 0.0f;
            most = fmaxf(most, fabsf(p[n].x[e]));
        }
    const int exponent = exponent_of_largest(most) - 8;
    const float by = power_of_two(-exponent);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            store_word(small + which * SQUARE + in_square(group() + h * 8, n) + pair() * 2,
                       pack_halves(p[n].x[2 * h] * by, p[n].x[2 * h + 1] * by));
    if (lane() == 0) store_word(small + PAIR_SCALES + which * 4, static_cast<unsigned>(exponent));
}

// sums += by · a · b
__device__ inline void add_product(Sums (&sums)[2], const Fragment& a, const Fragment& b, float by) {
    Sums product[2];
    multiply(product, a, b, true);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[n].x[e] += product[n].x[e] * by;
}

__device__ inline float one_of(FloatPair p, int e) { return e ? p.y : p.x; }

struct Outputs {
    unsigned short *dr, *dlog_decay, *dk, *da, *db;
};

__device__ inline void write_pair(unsigned short* out, int64 at, float x, float y) {
    *reinterpret_cast<unsigned*>(out + at) = pack_bfloat16s(x, y);
}

// 16 tokens × 16 keys of five gradients
__device__ inline void finish(const Group& group_, Address chunk, Address small, int64 first, const Outputs& out) {
    const Scales scales = scales_of(small);
    const Address keys = columns(warp());
    Sums gr[2], ga[2], gb[2], gk[2];
    float products[2] = {};  // Σ over values of E ∘ S, of keys group and group + 8
#pragma unroll
    for (int k = 0; k < VALUE_TILES; ++k) {
        const Fragment s = load_matrices_transposed(chunk + S + k * TILE + keys);
        const Fragment e = scaled(load_matrices_transposed(chunk + E + k * TILE + keys), scales.by[k]);
        multiply(gr, scaled(load_matrices(chunk + DY + columns(k)), scales.by[k]), s, k == 0);
        multiply(ga, scaled(load_matrices(chunk + DM + columns(k)), scales.by[k]), s, k == 0);
        multiply(gb, load_matrices(chunk + M + columns(k)), e, k == 0);
        multiply(gk, load_matrices(chunk + V + columns(k)), e, k == 0);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const FloatPair x = widen_halves(s.x[q]), y = widen_halves(e.x[q]);
            products[q / 2] += x.x * y.x + x.y * y.y;
        }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        products[n] += __shfl_xor_sync(ALL, products[n], 1);
        products[n] += __shfl_xor_sync(ALL, products[n], 2);
    }
    const Fragment r = load_matrices(chunk + R + keys), a = load_matrices(chunk + A + keys),
                   b = load_matrices(chunk + B + keys), k = load_matrices(chunk + K + keys);
    float through_all[2][2];  // what dlog_decay has of every token: E ∘ S, B ∘ M E, K ∘ V E
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float sum = 0.0f;
#pragma unroll
            for (int h = 0; h < 2; ++h)
                sum += one_of(widen_halves(b.x[n * 2 + h]), e) * gb[n].x[h * 2 + e] +
                       one_of(widen_halves(k.x[n * 2 + h]), e) * gk[n].x[h * 2 + e];
#pragma unroll
            for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(ALL, sum, step);
            through_all[n][e] = sum + __shfl_sync(ALL, products[n], (pair() + e) * 4);
        }
    {
        const Fragment r_t = load_matrices_transposed(chunk + R + keys), a_t = load_matrices_transposed(chunk + A + keys),
                       b_t = load_matrices_transposed(chunk + B + keys), k_t = load_matrices_transposed(chunk + K + keys);
        const auto add = [=](int which, Sums(&of_left)[2], const Fragment& right, Sums(&of_right)[2],
                             const Fragment& left) {
            const float by = power_of_two(static_cast<int>(load_word(small + PAIR_SCALES + which * 4)));
            add_product(of_left, load_matrices(small + which * SQUARE + square()), right, by);
            add_product(of_right, load_matrices_transposed(small + which * SQUARE + square_across()), left, by);
        };
        add(PAIR_RK, gr, k_t, gk, r_t);
        add(PAIR_RB, gr, b_t, gb, r_t);
        add(PAIR_AK, ga, k_t, gk, a_t);
        add(PAIR_AB, ga, b_t, gb, a_t);
    }
    const Decays decays = decays_of(chunk, warp(), sums_from_reference(false), sums_from_reference(true));
    const float top = static_cast<float>(scales.top);
    const float top_r = top - static_cast<float>(static_cast<int>(load_word(small + EXPONENTS)));
    const float top_k = top - static_cast<float>(static_cast<int>(load_word(small + EXPONENTS + 4)));
    const float by = nearest_power_of_two(scales.top);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        float dw[4];  // rows group and group + 8
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float here[2], before[2];  // terms of the sums over s ≥ t, and over s > t
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int q = n * 2 + h, x = h * 2 + e;
                before[h] = one_of(widen_halves(a.x[q]), e) * ga[n].x[x];
                here[h] = one_of(widen_halves(r.x[q]), e) * gr[n].x[x] - one_of(widen_halves(b.x[q]), e) * gb[n].x[x] -
                          one_of(widen_halves(k.x[q]), e) * gk[n].x[x] + before[h];
            }
#pragma unroll
            for (int step = 4; step < 32; step *= 2)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float later = __shfl_down_sync(ALL, here[h], step);
                    if (lane() + step < 32) here[h] += later;
                }
            const float second_half = __shfl_sync(ALL, here[1], lane() % 4);
            dw[e] = through_all[n][e] + here[0] + second_half - before[0];
            dw[2 + e] = through_all[n][e] + here[1] - before[1];
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64 token = first + group() + h * 8;
            const int64 at = (token * group_.heads + group_.head) * N + warp() * 16 + n * 8 + pair();
            const int x = h * 2;
            const float *c = &decays.through[n].x[x], *u = &decays.before[n].x[x];
            if (token < group_.stop) {
                write_pair(out.dr, at, gr[n].x[x] * exp2_approximate(top_r + c[0]),
                           gr[n].x[x + 1] * exp2_approximate(top_r + c[1]));
                write_pair(out.dlog_decay, at, dw[x] * by, dw[x + 1] * by);
                write_pair(out.dk, at, gk[n].x[x] * exp2_approximate(top_k - c[0]),
                           gk[n].x[x + 1] * exp2_approximate(top_k - c[1]));
                write_pair(out.da, at, ga[n].x[x] * exp2_approximate(top + u[0]),
                           ga[n].x[x + 1] * exp2_approximate(top + u[1]));
                write_pair(out.db, at, gb[n].x[x] * exp2_approximate(top - c[0]),
                           gb[n].x[x + 1] * exp2_approximate(top - c[1]));
            }
        }
    }
}

// One block per head and slot, and one more per head that clears the padding.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    wkv7_chunked_gradients(int64 tokens, int64 heads, int64 documents, const int* cu_seqlens, const int* /* order */,
                           const unsigned short* r, const unsigned short* log_decay, const unsigned short* k,
                           const unsigned short* v, const unsigned short* a, const unsigned short* b,
                           const unsigned short* dy, unsigned short* states, int* scales, unsigned short* dstates,
                           int* dscales, unsigned short* dr, unsigned short* dlog_decay, unsigned short* dk,
                           unsigned short* dv, unsigned short* da, unsigned short* db) {
    Group group;
    group.heads = heads;
    group.head = blockIdx.x % heads;
    group.slot = blockIdx.x / heads;
    if (group.slot == tokens / SAVED_EVERY + documents) {
        unsigned short* outputs[6] = {dr, dlog_decay, dk, dv, da, db};
        const int64 start = document_at(documents, tokens, documents, cu_seqlens).start;
        for (int n = 0; n < 6; ++n) clear_padding(outputs[n], tokens, heads, group.head, start);
        return;
    }
    const Document document =
        document_at(document_of_slot(group.slot, documents, cu_seqlens), tokens, documents, cu_seqlens);
    group.first = document.start + (group.slot - document.start / SAVED_EVERY - document.index) * SAVED_EVERY;
    group.stop = document.stop;
    if (document.index == documents || group.first >= group.stop) return;  // a slot that no group needs
    group.chunks = group.stop - group.first > CHUNK ? CHUNKS : 1;

    const Address chunks = shared_memory(), smalls = chunks + CHUNKS * CHUNK_BYTES;
    const unsigned short* const inputs[TENSORS] = {log_decay, r, a, b, k, v, dy};
    copy_inputs(group, inputs, chunks);
    BackwardChunk backward[1];
    restore_rows(saved_rows(dstates, dscales, group.slot, heads, group.head, warp()), backward[0].state,
                 backward[0].scale);
    wait_for_copies();
    __syncthreads();  // the inputs are there
    if (warp() < group.chunks) {
        const Address chunk = chunks + warp() * CHUNK_BYTES;
        prepare<true, true>(chunk, smalls + warp() * SMALL, chunk + B_REST);
    }
    __syncthreads();  // the operands are
    follow_backward(group, backward, chunks, smalls, dv);
    ForwardChunk forward[1];
    restore_rows(saved_rows(states, scales, group.slot, heads, group.head, warp()), forward[0].state, forward[0].scale);
    __syncthreads();  // B's rest has been read
    follow_forward(group, forward, chunks, smalls);
    __syncthreads();  // S, E, M, dM are there; T, Rb, Ak, Rk have been read
#pragma unroll 1
    for (int n = 0; n < group.chunks; ++n) make_pairs(chunks + n * CHUNK_BYTES, smalls + n * SMALL);
    __syncthreads();  // the pairs are there
    const Outputs out = {dr, dlog_decay, dk, da, db};
#pragma unroll 1
    for (int n = 0; n < group.chunks; ++n)
        finish(group, chunks + n * CHUNK_BYTES, smalls + n * SMALL, group.first + n * CHUNK, out);
}
