// WKV-7 on the GPU, forward and backward, for any number of documents of any length. ../README.md derives the maths.
//
// One block per (document, head); one more per head clears the padding. A thread holds a tile of the state in
// registers, so a document's recurrence touches global memory only for its inputs and outputs, for `removed` = S a,
// and for a state every CHUNK tokens. No atomics: each number has one writer, so results are bitwise the same in any
// pack and from run to run.
//
//     tile          of                              per thread              shares a sum with
//     by rows       forward; backward's dv and      2 values × 16 keys      the 3 lanes next to it
//                   the gradient of removed
//     by columns    backward's dr, dlog_decay,      2 keys × 16 values      the lanes 8, 16 and 24 away
//                   dk, da, db
//
// The columns of a chunk wait for its rows, which give them the gradient of `removed`. States are not kept per token:
// the state after a chunk is read and undone token by token, which is why CHUNK is 16 and no more.
//
// NVRTC compiles this without any header; a CPU runs it under tests/ops/cuda_on_cpu.h.

typedef long long int64;

#ifdef WKV7_BFLOAT16
typedef unsigned short Element;
#else
typedef float Element;
#endif

constexpr int N = 64;         // head size
constexpr int CHUNK = 16;     // tokens between saved states
constexpr int THREADS = 128;  // of a block

constexpr int SHORT = 2, LONG = 16;    // sides of a tile
constexpr int PARTS = N / LONG;        // threads that share a sum
constexpr int QUADS = LONG / 4;        // a tile's long side comes in fours, the parts taking turns
static_assert(THREADS * SHORT * LONG == N * N, "the threads hold the state once");

struct alignas(16) Four {
    float at[4];
};
struct alignas(8) Two {
    float at[2];
};
struct alignas(4 * sizeof(Element)) FourElements {
    Element at[4];
};
struct alignas(2 * sizeof(Element)) TwoElements {
    Element at[2];
};

__device__ inline Four four(const float* p) { return *reinterpret_cast<const Four*>(p); }
__device__ inline Two two(const float* p) { return *reinterpret_cast<const Two*>(p); }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(unsigned short x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, unsigned short& out) {  // to nearest, ties to even; a NaN stays a quiet NaN
    const unsigned u = __float_as_uint(x);
    out = static_cast<unsigned short>((x == x ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000) >> 16);
}

__device__ inline void store_two(Element* out, const float (&x)[2]) {
    TwoElements pair;
    narrow(x[0], pair.at[0]);
    narrow(x[1], pair.at[1]);
    *reinterpret_cast<TwoElements*>(out) = pair;
}
__device__ inline void store_two_floats(float* out, const float (&x)[2]) {
    *reinterpret_cast<Two*>(out) = Two{{x[0], x[1]}};
}

__device__ inline void fetch_ahead(const void* p) {  // to the second-level cache
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// The tokens that a block works on.
struct Span {
    int64 document, head, start, stop;  // document == documents: the padding after the last one
};

__device__ inline Span span_of_block(int64 tokens, int64 heads, int64 documents, const int* cu_seqlens,
                                     const int* order) {
    const int64 rank = blockIdx.x / heads;
    Span s;
    s.head = blockIdx.x % heads;
    s.document = rank < documents ? order[rank] : documents;
    s.start = cu_seqlens[s.document];
    s.stop = s.document < documents ? cu_seqlens[s.document + 1] : tokens;
    if (s.start < 0 || s.stop < s.start || s.stop > tokens) __trap();  // rather than write where nothing is ours
    return s;
}

// A document's chunks begin at slot start / CHUNK + document: room for every partial chunk, whatever the lengths.
__device__ inline int64 saved_state_of(const Span& s, int64 heads, int64 token) {
    return ((s.start / CHUNK + s.document + (token - s.start) / CHUNK) * heads + s.head) * N * N;
}

// This head's rows of tokens first … first + count into shared memory; the block calls it together.
template <class From>
__device__ inline void load_rows(float (*to)[N], const From* from, int64 heads, int64 head, int64 first, int count) {
    for (int n = threadIdx.x * 4; n < count * N; n += THREADS * 4) {
        struct alignas(4 * sizeof(From)) Quad {
            From at[4];
        };
        const Quad x = *reinterpret_cast<const Quad*>(from + ((first + n / N) * heads + head) * N + n % N);
        *reinterpret_cast<Four*>(&to[n / N][n % N]) = Four{{widen(x.at[0]), widen(x.at[1]), widen(x.at[2]), widen(x.at[3])}};
    }
}

// exp(log_decay) - 1: near 0 it keeps the digits that exp(log_decay) near 1 would lose.
__device__ inline void load_decays(float (*to)[N], const Element* log_decay, int64 heads, int64 head, int64 first,
                                   int count) {
    for (int n = threadIdx.x; n < count * N; n += THREADS)
        to[n / N][n % N] = expm1f(widen(log_decay[((first + n / N) * heads + head) * N + n % N]));
}

// Chunk rows that the next turn of the loop will load.
template <class From>
__device__ inline void fetch_rows_ahead(const From* from, int64 heads, int64 head, int64 first, int count) {
    constexpr int PER_ROW = THREADS / CHUNK;
    const int t = threadIdx.x / PER_ROW;
    if (t < count) fetch_ahead(from + ((first + t) * heads + head) * N + threadIdx.x % PER_ROW * (N / PER_ROW));
}

__device__ inline void clear_rows(Element* out, int64 heads, const Span& s) {
    Element zero;
    narrow(0.0f, zero);
    for (int64 n = threadIdx.x; n < (s.stop - s.start) * N; n += THREADS)
        out[((s.start + n / N) * heads + s.head) * N + n % N] = zero;
}

// Sums over the lanes that differ in the bits STEP and 2 STEP: all of these lanes get them.
template <int STEP, int COUNT>
__device__ inline void sum_across(float (&x)[COUNT]) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
        x[n] += __shfl_xor_sync(0xffffffffu, x[n], STEP);
        x[n] += __shfl_xor_sync(0xffffffffu, x[n], 2 * STEP);
    }
}

// A thread's tile of a state: `across` its place on the short side, `part` on the long one.
struct Place {
    int across, part;
    __device__ int along(int quad) const { return (quad * PARTS + part) * 4; }
};
__device__ inline Place place_by_rows() {
    const int lane = threadIdx.x;
    return {lane / PARTS * SHORT, lane % PARTS};
}
__device__ inline Place place_by_columns() {
    constexpr int STRIDE = 32 / PARTS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return {(warp * STRIDE + lane % STRIDE) * SHORT, lane / STRIDE};
}

typedef float Tile[SHORT][LONG];

__device__ inline void load_by_rows(Tile& s, const float* state, Place at) {
#pragma unroll
    for (int i = 0; i < SHORT; ++i)
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            const Four x = four(state + (at.across + i) * N + at.along(q));
#pragma unroll
            for (int e = 0; e < 4; ++e) s[i][q * 4 + e] = x.at[e];
        }
}

__device__ inline void store_by_rows(float* state, const Tile& s, Place at) {
#pragma unroll
    for (int i = 0; i < SHORT; ++i)
#pragma unroll
        for (int q = 0; q < QUADS; ++q)
            *reinterpret_cast<Four*>(state + (at.across + i) * N + at.along(q)) =
                Four{{s[i][q * 4], s[i][q * 4 + 1], s[i][q * 4 + 2], s[i][q * 4 + 3]}};
}

__device__ inline void load_by_columns(Tile& s, const float* state, Place at) {
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const Two x = two(state + (at.along(q) + e) * N + at.across);
            s[0][q * 4 + e] = x.at[0];
            s[1][q * 4 + e] = x.at[1];
        }
}

__device__ inline void clear(Tile& s) {
#pragma unroll
    for (int i = 0; i < SHORT; ++i)
#pragma unroll
        for (int j = 0; j < LONG; ++j) s[i][j] = 0.0f;
}

// s_m[i] = Σ_j s[i][j] m[j], by rows
__device__ inline void multiply(const Tile& s, const float* m, Place at, float (&s_m)[SHORT]) {
#pragma unroll
    for (int i = 0; i < SHORT; ++i) s_m[i] = 0.0f;
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const Four x = four(m + at.along(q));
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
            for (int i = 0; i < SHORT; ++i) s_m[i] += s[i][q * 4 + e] * x.at[e];
    }
    sum_across<1>(s_m);
}

// s += x pᵀ, by rows
__device__ inline void add_outer(Tile& s, const float (&x)[SHORT], const float* p, Place at) {
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const Four y = four(p + at.along(q));
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
            for (int i = 0; i < SHORT; ++i) s[i][q * 4 + e] += x[i] * y.at[e];
    }
}

// s ← s diag(1 + decay), by rows
__device__ inline void apply_decay(Tile& s, const float* decay, Place at) {
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const Four x = four(decay + at.along(q));
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
            for (int i = 0; i < SHORT; ++i) s[i][q * 4 + e] += s[i][q * 4 + e] * x.at[e];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    wkv7_forward(int64 tokens, int64 heads, int64 documents, const int* cu_seqlens, const int* order, const Element* r,
                 const Element* log_decay, const Element* k, const Element* v, const Element* a, const Element* b,
                 const float* initial_state,  // (documents, heads, N, N) [value, key], or null for zeros
                 Element* y, float* final_state,
                 float* removed,  // (tokens, heads, N), or null: there will be no backward pass
                 float* states) {  // (tokens / CHUNK + documents, heads, N, N), or null: no backward pass
    __shared__ float rows_r[CHUNK][N], rows_decay[CHUNK][N], rows_k[CHUNK][N], rows_v[CHUNK][N], rows_a[CHUNK][N],
        rows_b[CHUNK][N];
    const Span span = span_of_block(tokens, heads, documents, cu_seqlens, order);
    if (span.document == documents) {
        clear_rows(y, heads, span);
        return;
    }
    const Place at = place_by_rows();
    const int64 state = (span.document * heads + span.head) * N * N;
    Tile s;
    if (initial_state)
        load_by_rows(s, initial_state + state, at);
    else
        clear(s);
    for (int64 chunk = span.start; chunk < span.stop; chunk += CHUNK) {
        const int count = static_cast<int>(span.stop - chunk < CHUNK ? span.stop - chunk : CHUNK);
        __syncthreads();  // the chunk before has been read
        load_rows(rows_r, r, heads, span.head, chunk, count);
        load_decays(rows_decay, log_decay, heads, span.head, chunk, count);
        load_rows(rows_k, k, heads, span.head, chunk, count);
        load_rows(rows_v, v, heads, span.head, chunk, count);
        load_rows(rows_a, a, heads, span.head, chunk, count);
        load_rows(rows_b, b, heads, span.head, chunk, count);
        __syncthreads();
        const int64 next = chunk + CHUNK;
        const int ahead = static_cast<int>(span.stop - next < CHUNK ? span.stop - next : CHUNK);
        fetch_rows_ahead(r, heads, span.head, next, ahead);
        fetch_rows_ahead(log_decay, heads, span.head, next, ahead);
        fetch_rows_ahead(k, heads, span.head, next, ahead);
        fetch_rows_ahead(v, heads, span.head, next, ahead);
        fetch_rows_ahead(a, heads, span.head, next, ahead);
        fetch_rows_ahead(b, heads, span.head, next, ahead);
        if (states) store_by_rows(states + saved_state_of(span, heads, chunk), s, at);
        for (int t = 0; t < count; ++t) {
            const int64 out = ((chunk + t) * heads + span.head) * N + at.across;
            const Two v_t = two(&rows_v[t][at.across]);
            float removed_t[SHORT], y_t[SHORT];
            multiply(s, rows_a[t], at, removed_t);
            apply_decay(s, rows_decay[t], at);
            add_outer(s, v_t.at, rows_k[t], at);
            add_outer(s, removed_t, rows_b[t], at);
            multiply(s, rows_r[t], at, y_t);
            if (at.part == 0) store_two(y + out, y_t);
            if (at.part == 1 && removed) store_two_floats(removed + out, removed_t);
        }
    }
    store_by_rows(final_state + state, s, at);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    wkv7_backward(int64 tokens, int64 heads, int64 documents, const int* cu_seqlens, const int* order,
                  const Element* r, const Element* log_decay, const Element* k, const Element* v, const Element* a,
                  const Element* b, const float* final_state, const float* removed, const float* states,
                  const Element* dy,
                  const float* dfinal_state,  // or null for zeros
                  Element* dr, Element* dlog_decay, Element* dk, Element* dv, Element* da, Element* db,
                  float* dinitial_state) {  // or null where nobody asks
    __shared__ float rows_r[CHUNK][N], rows_decay[CHUNK][N], rows_k[CHUNK][N], rows_v[CHUNK][N], rows_a[CHUNK][N],
        rows_b[CHUNK][N], rows_dy[CHUNK][N], rows_removed[CHUNK][N], rows_dremoved[CHUNK][N];
    const Span span = span_of_block(tokens, heads, documents, cu_seqlens, order);
    if (span.document == documents) {
        clear_rows(dr, heads, span);
        clear_rows(dlog_decay, heads, span);
        clear_rows(dk, heads, span);
        clear_rows(dv, heads, span);
        clear_rows(da, heads, span);
        clear_rows(db, heads, span);
        return;
    }
    const Place row = place_by_rows(), column = place_by_columns();
    const int64 state = (span.document * heads + span.head) * N * N;
    Tile g, h;  // the gradient of the state, by rows and by columns
    if (dfinal_state) {
        load_by_rows(g, dfinal_state + state, row);
        load_by_columns(h, dfinal_state + state, column);
    } else {
        clear(g);
        clear(h);
    }
    const int64 last = span.start + (span.stop - span.start - 1) / CHUNK * CHUNK;
    for (int64 chunk = last; span.start < span.stop && chunk >= span.start; chunk -= CHUNK) {
        const int count = static_cast<int>(span.stop - chunk < CHUNK ? span.stop - chunk : CHUNK);
        __syncthreads();  // the chunk after has been read
        load_rows(rows_r, r, heads, span.head, chunk, count);
        load_decays(rows_decay, log_decay, heads, span.head, chunk, count);
        load_rows(rows_k, k, heads, span.head, chunk, count);
        load_rows(rows_v, v, heads, span.head, chunk, count);
        load_rows(rows_a, a, heads, span.head, chunk, count);
        load_rows(rows_b, b, heads, span.head, chunk, count);
        load_rows(rows_dy, dy, heads, span.head, chunk, count);
        load_rows(rows_removed, removed, heads, span.head, chunk, count);
        __syncthreads();
        if (chunk > span.start) {
            fetch_rows_ahead(r, heads, span.head, chunk - CHUNK, CHUNK);
            fetch_rows_ahead(log_decay, heads, span.head, chunk - CHUNK, CHUNK);
            fetch_rows_ahead(k, heads, span.head, chunk - CHUNK, CHUNK);
            fetch_rows_ahead(v, heads, span.head, chunk - CHUNK, CHUNK);
            fetch_rows_ahead(a, heads, span.head, chunk - CHUNK, CHUNK);
            fetch_rows_ahead(b, heads, span.head, chunk - CHUNK, CHUNK);
            fetch_rows_ahead(dy, heads, span.head, chunk - CHUNK, CHUNK);
            fetch_rows_ahead(removed, heads, span.head, chunk - CHUNK, CHUNK);
        }
        for (int t = count - 1; t >= 0; --t) {
            const Two dy_t = two(&rows_dy[t][row.across]);
            float dremoved_t[SHORT], dv_t[SHORT];
            add_outer(g, dy_t.at, rows_r[t], row);
            multiply(g, rows_b[t], row, dremoved_t);
            multiply(g, rows_k[t], row, dv_t);
            apply_decay(g, rows_decay[t], row);
            add_outer(g, dremoved_t, rows_a[t], row);
            if (row.part == 0) store_two(dv + ((chunk + t) * heads + span.head) * N + row.across, dv_t);
            if (row.part == 1) store_two_floats(&rows_dremoved[t][row.across], dremoved_t);
        }
        Tile s;
        load_by_columns(s, chunk == last ? final_state + state : states + saved_state_of(span, heads, chunk + CHUNK),
                        column);
        __syncthreads();  // dremoved is there
        for (int t = count - 1; t >= 0; --t) {
            const Two r_t = two(&rows_r[t][column.across]), decay_t = two(&rows_decay[t][column.across]),
                      k_t = two(&rows_k[t][column.across]), a_t = two(&rows_a[t][column.across]),
                      b_t = two(&rows_b[t][column.across]);
            float undo[SHORT], sums[5 * SHORT] = {};  // dr, ddecay, dk, da, db
#pragma unroll
            for (int j = 0; j < SHORT; ++j) undo[j] = 1.0f / (1.0f + decay_t.at[j]);
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                const Four dy_t = four(&rows_dy[t][column.along(q)]), v_t = four(&rows_v[t][column.along(q)]),
                           removed_t = four(&rows_removed[t][column.along(q)]),
                           dremoved_t = four(&rows_dremoved[t][column.along(q)]);
#pragma unroll
                for (int e = 0; e < 4; ++e)
#pragma unroll
                    for (int j = 0; j < SHORT; ++j) {
                        float &after = s[j][q * 4 + e], &gradient = h[j][q * 4 + e];
                        sums[j] += after * dy_t.at[e];
                        gradient += dy_t.at[e] * r_t.at[j];
                        const float before = (after - removed_t.at[e] * b_t.at[j] - v_t.at[e] * k_t.at[j]) * undo[j];
                        sums[SHORT + j] += gradient * before;
                        sums[2 * SHORT + j] += gradient * v_t.at[e];
                        sums[3 * SHORT + j] += before * dremoved_t.at[e];
                        sums[4 * SHORT + j] += gradient * removed_t.at[e];
                        gradient += gradient * decay_t.at[j] + dremoved_t.at[e] * a_t.at[j];
                        after = before;
                    }
            }
            sum_across<32 / PARTS>(sums);
            const int64 out = ((chunk + t) * heads + span.head) * N + column.across;
            if (column.part == 0) store_two(dr + out, {sums[0], sums[1]});
            if (column.part == 0)
                store_two(dlog_decay + out, {sums[2] + sums[2] * decay_t.at[0], sums[3] + sums[3] * decay_t.at[1]});
            if (column.part == 1) store_two(dk + out, {sums[4], sums[5]});
            if (column.part == 2) store_two(da + out, {sums[6], sums[7]});
            if (column.part == 3) store_two(db + out, {sums[8], sums[9]});
        }
    }
    if (dinitial_state) store_by_rows(dinitial_state + state, g, row);
}
