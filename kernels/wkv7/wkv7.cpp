// WKV-7 on the CPU, forward and backward, for any number of documents of any length. ../README.md derives the maths.
//
// Units of work, a document × a few heads each, are taken from one queue by as many threads as there may be. A unit
// writes what no other writes and computes the same whatever its neighbours, so results are bitwise equal for any
// number of threads, in any pack, in any order of documents. A unit goes through its document in chunks:
//
//     forward    step by step; the state before each chunk is saved, and so is `removed`, S_{t-1} a_t
//     backward   against time. First step by step, for dv and the gradient of `removed`. With both of these known,
//                the rest has no recurrence left: dr, da, db, dk are dense products with the state before the chunk
//                and the gradient after it, plus the chunk's own tokens pair by pair.
//
// Nothing is ever divided by a decay, so the gradients are as good for fast decays as for slow ones.

#include "vectors.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

// Mirrored field by field in streaming_rwkv/ops/cpp.py. Tensors are (tokens, heads, N) and contiguous.
struct Wkv7Call {
    int64_t tokens, heads, documents, threads;
    const int32_t* cu_seqlens;                  // (documents + 1,)
    const void *r, *log_decay, *k, *v, *a, *b;  // float or bfloat16
    const float* initial_state;                 // (documents, heads, N, N) [value, key], or null for zeros
    void* y;
    float* final_state;
    float* removed;  // for the backward pass, as `states`; null where there will be none
    float* states;   // (tokens / CHUNK + documents, heads, N, N) [key, value]
    const void* dy;
    const float* dfinal_state;              // or null for zeros
    void *dr, *dlog_decay, *dk, *dv, *da, *db;
    float* dinitial_state;  // or null where nobody asks
};

namespace {

constexpr int CHUNK = 16;  // tokens between saved states
constexpr int GROUP = 4;   // most heads in a unit

struct Unit {
    int64_t document, start, stop, head, heads;
};

inline int64_t state_of(const Wkv7Call& c, const Unit& u, int64_t head) {
    return (u.document * c.heads + head) * N * N;
}

// A document's chunks begin at slot start / CHUNK + document: room for every partial chunk, whatever the lengths.
inline int64_t saved_state_of(const Wkv7Call& c, const Unit& u, int64_t head, int64_t token) {
    return ((u.start / CHUNK + u.document + (token - u.start) / CHUNK) * c.heads + head) * N * N;
}

// f(unit, workspace) for all, on threads that live for this call only: their start costs some 20 µs against
// milliseconds of work, and with no pool there is nothing that a fork could break or torch's OpenMP clash with.
template <class Workspace, class F>
void for_each_unit(const Wkv7Call& c, F f) {
    std::vector<int64_t> order(c.documents);
    std::iota(order.begin(), order.end(), 0);
    const auto length = [&](int64_t d) { return c.cu_seqlens[d + 1] - c.cu_seqlens[d]; };
    // Longest first, so that no thread is left alone with a long one at the end.
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return length(x) > length(y); });
    // Heads lie side by side in memory: alone, each would have the caches fetch its neighbours for nothing.
    int64_t group = GROUP;
    while (group > 1 && (c.heads % group || c.documents * c.heads / group < (group > 2 ? 2 : 1) * c.threads)) group /= 2;
    const int64_t groups = c.heads / group, units = c.documents * groups;
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        const FlushSubnormals flush;
        const std::unique_ptr<Workspace> workspace(new Workspace);
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
            const int64_t document = order[unit / groups];
            f(Unit{document, c.cu_seqlens[document], c.cu_seqlens[document + 1], unit % groups * group, group},
              *workspace);
        }
    };
    const int64_t worth = c.cu_seqlens[c.documents] * c.heads / 64;  // threads that have more to do than to start
    const int64_t helpers = std::min({c.threads, units, std::max<int64_t>(worth, 1)}) - 1;
    std::vector<std::thread> threads;
    try {
        for (int64_t n = 0; n < helpers; ++n) threads.emplace_back(work);
    } catch (const std::system_error&) {
        // The system gives no more threads; those that run share the work.
    }
    work();
    for (auto& thread : threads) thread.join();
}

struct Lanes {  // WIDTH numbers side by side, in registers
    vec at[ACROSS];
};

template <class T>
inline Lanes load_lanes(const T* p) {
    Lanes x;
    for (int u = 0; u < ACROSS; ++u) x.at[u] = load(p + u * LANES);
    return x;
}

template <class T>
inline void store_lanes(T* p, const Lanes& x) {
    for (int u = 0; u < ACROSS; ++u) store(p + u * LANES, x.at[u]);
}

inline void decay_lanes(Lanes& x, const Lanes& decay) {
    for (int u = 0; u < ACROSS; ++u) x.at[u] = decayed(x.at[u], decay.at[u]);
}

// One step of either recurrence, for WIDTH value rows of S [key][value]:
//     S ← S diag(1 + decay) + x pᵀ + y qᵀ, then S m and S n.
// Values lie along the lanes, so that no sum runs across them and p, q, m, n are numbers to broadcast. The products
// that the next step starts from ride on the pass that makes S.
inline void step(float* __restrict s, const float* __restrict decay, Lanes x, const float* __restrict p, Lanes y,
                 const float* __restrict q, const float* __restrict m, const float* __restrict n, Lanes& s_m,
                 Lanes& s_n) {
    Lanes sum_m{}, sum_n{};
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j, s += N) {
#pragma GCC unroll 4
        for (int u = 0; u < ACROSS; ++u) {
            vec e = load(s + u * LANES);
            e += e * decay[j];
            e += x.at[u] * p[j];
            e += y.at[u] * q[j];
            store(s + u * LANES, e);
            sum_m.at[u] += e * m[j];
            sum_n.at[u] += e * n[j];
        }
    }
    s_m = sum_m;
    s_n = sum_n;
}

alignas(64) const Row ZEROS = {};

inline Row* rows(float* state) { return reinterpret_cast<Row*>(state); }

inline const Row* rows(const float* state) { return reinterpret_cast<const Row*>(state); }

template <class T>
struct Forward {
    struct Head {
        Row s[N], removed, a;  // S [key][value]; S a and a for the next token
    };
    struct alignas(64) Workspace {
        Head heads[GROUP];
        Row r[CHUNK], decay[CHUNK], k[CHUNK], a[CHUNK], b[CHUNK];
    };

    const Wkv7Call& c;
    const T *r = (const T*)c.r, *log_decay = (const T*)c.log_decay, *k = (const T*)c.k, *v = (const T*)c.v,
            *a = (const T*)c.a, *b = (const T*)c.b;
    T* y = (T*)c.y;

    void operator()(const Unit& u, Workspace& w) const {
        for (int64_t h = 0; h < u.heads; ++h) begin(u, u.head + h, w.heads[h]);
        for (int64_t chunk = u.start; chunk < u.stop; chunk += CHUNK)
            for (int64_t h = 0; h < u.heads; ++h) run(u, u.head + h, chunk, w.heads[h], w);
        for (int64_t h = 0; h < u.heads; ++h)
            transpose<N, N>(w.heads[h].s, rows(c.final_state + state_of(c, u, u.head + h)));
    }

    void begin(const Unit& u, int64_t head, Head& now) const {
        if (c.initial_state)
            transpose<N, N>(rows(c.initial_state + state_of(c, u, head)), now.s);
        else
            std::memset(now.s, 0, sizeof(now.s));
        clear(now.removed);
        if (u.start == u.stop) return;
        copy(now.a, a + (u.start * c.heads + head) * N);
        for (int first = 0; c.initial_state && first < N; first += WIDTH) {
            Lanes removed, unused;
            step(&now.s[0][first], ZEROS, {}, ZEROS, {}, ZEROS, now.a, ZEROS, removed, unused);
            store_lanes(now.removed + first, removed);
        }
    }

    void run(const Unit& u, int64_t head, int64_t chunk, Head& now, Workspace& w) const {
        const int length = static_cast<int>(std::min<int64_t>(CHUNK, u.stop - chunk));
        const int64_t origin = (chunk * c.heads + head) * N, stride = c.heads * N;
        for (int t = 0; t < length; ++t) {
            const int64_t at = origin + t * stride;
            copy(w.r[t], r + at);
            copy(w.k[t], k + at);
            copy(w.b[t], b + at);
#pragma GCC unroll 4
            for (int n = 0; n < N; n += LANES) store(w.decay[t] + n, expm1(load(log_decay + at + n)));
            if (chunk + t + 1 < u.stop)
                copy(w.a[t], a + at + stride);  // the next token's
            else
                clear(w.a[t]);
        }
        if (c.states) std::memcpy(c.states + saved_state_of(c, u, head, chunk), now.s, sizeof(now.s));
        for (int first = 0; first < N; first += WIDTH) {
            Lanes removed = load_lanes(now.removed + first), out;
            for (int t = 0; t < length; ++t) {
                const int64_t at = origin + t * stride;
                if (chunk + t + CHUNK < u.stop) fetch_ahead(at + CHUNK * stride);
                if (c.removed) store_lanes(c.removed + at + first, removed);
                step(&now.s[0][first], w.decay[t], removed, w.b[t], load_lanes(v + at + first), w.k[t], w.r[t], w.a[t],
                     out, removed);
                store_lanes(y + at + first, out);
            }
            store_lanes(now.removed + first, removed);
        }
    }

    void fetch_ahead(int64_t at) const {
        for (const T* x : {r, log_decay, k, v, a, b}) will_read(x + at);
        will_write(y + at);
        if (c.removed) will_write(c.removed + at);
    }
};

// out += x · c + y · d
inline void accumulate(float* out, const Lanes& x, float c, const Lanes& y, float d) {
    const vec c_all = broadcast(c), d_all = broadcast(d);  // once: for all the compiler knows, `out` is their source
#pragma GCC unroll 4
    for (int u = 0; u < ACROSS; ++u)
        store(out + u * LANES, load(out + u * LANES) + x.at[u] * c_all + y.at[u] * d_all);
}

template <class T>
struct Backward {
    typedef float Pair[2 * CHUNK];  // two things of each token
    struct Head {
        Row g[N];  // gradient of the state after the chunk [key][value]
        Row sum;   // Σ_value gradient ∘ state there
    };
    struct alignas(64) Workspace {
        Head heads[GROUP];
        Row r[CHUNK], decay[CHUNK], k[CHUNK], a[CHUNK], b[CHUNK], removed_v[2 * CHUNK], dy_dremoved[2 * CHUNK];
        Row dr[CHUNK], da[CHUNK], db[CHUNK], dk[CHUNK];
        Pair values[N], gradients[N];  // removed | v and dy | dremoved, [value][token]
        Pair products[2 * CHUNK];      // removed_s and, below, v_s · dy_t | dremoved_t
        Pair dr_da[N], db_dk[N];       // [key][token]
    };

    const Wkv7Call& c;

    void operator()(const Unit& u, Workspace& w) const {
        for (int64_t h = 0; h < u.heads; ++h) begin(state_of(c, u, u.head + h), w.heads[h]);
        const int64_t last = u.start + (u.stop - u.start - 1) / CHUNK * CHUNK;
        for (int64_t chunk = last; u.start < u.stop && chunk >= u.start; chunk -= CHUNK)
            for (int64_t h = 0; h < u.heads; ++h) run(u, u.head + h, chunk, w.heads[h], w);
        for (int64_t h = 0; c.dinitial_state && h < u.heads; ++h)
            transpose<N, N>(w.heads[h].g, rows(c.dinitial_state + state_of(c, u, u.head + h)));
    }

    void begin(int64_t state, Head& now) const {
        clear(now.sum);
        if (!c.dfinal_state) {
            std::memset(now.g, 0, sizeof(now.g));
            return;
        }
        const Row *s = rows(c.final_state + state), *g = rows(c.dfinal_state + state);
        transpose<N, N>(g, now.g);
        for (int i = 0; i < N; ++i)
            for (int j = 0; j < N; j += LANES) store(now.sum + j, load(now.sum + j) + load(g[i] + j) * load(s[i] + j));
    }

    void run(const Unit& u, int64_t head, int64_t chunk, Head& now, Workspace& w) const {
        const int length = static_cast<int>(std::min<int64_t>(CHUNK, u.stop - chunk));
        const int64_t origin = (chunk * c.heads + head) * N, stride = c.heads * N;
        const Row* const before = rows(c.states + saved_state_of(c, u, head, chunk));
        load_chunk(origin, stride, length, w);
        transpose<2 * CHUNK, N>(w.removed_v, w.values);
        multiply<N, 2 * CHUNK>(now.g, w.values, w.db_dk);
        step_back(u, head, chunk, length, now, w);
        transpose<2 * CHUNK, N>(w.dy_dremoved, w.gradients);
        multiply<N, 2 * CHUNK>(before, w.gradients, w.dr_da);
        multiply<2 * CHUNK, 2 * CHUNK>(w.removed_v, w.gradients, w.products);
        transpose<N, CHUNK>(w.dr_da, w.dr);
        transpose<N, CHUNK>((const Pair*)&w.dr_da[0][CHUNK], w.da);
        transpose<N, CHUNK>(w.db_dk, w.db);
        transpose<N, CHUNK>((const Pair*)&w.db_dk[0][CHUNK], w.dk);
        for (int first = 0; first < N; first += WIDTH) add_pairs(first, w);
        store_chunk(origin, stride, length, now, w);
        settle(before, now, w);
    }

    // Past the document's end: tokens that do nothing.
    void load_chunk(int64_t origin, int64_t stride, int length, Workspace& w) const {
        for (int t = 0; t < length; ++t) {
            const int64_t at = origin + t * stride;
            copy(w.r[t], (const T*)c.r + at);
            copy(w.k[t], (const T*)c.k + at);
            copy(w.a[t], (const T*)c.a + at);
            copy(w.b[t], (const T*)c.b + at);
            copy(w.removed_v[t], c.removed + at);
            copy(w.removed_v[CHUNK + t], (const T*)c.v + at);
            copy(w.dy_dremoved[t], (const T*)c.dy + at);
#pragma GCC unroll 4
            for (int n = 0; n < N; n += LANES)
                store(w.decay[t] + n, expm1(load((const T*)c.log_decay + at + n)));
        }
        for (int t = length; t < CHUNK; ++t)
            for (Row* x : {w.r, w.decay, w.k, w.a, w.b, w.removed_v, w.removed_v + CHUNK, w.dy_dremoved,
                           w.dy_dremoved + CHUNK})
                clear(x[t]);
    }

    // dv and dremoved. now.g goes from the gradient after the chunk to that before its second token, before the
    // first one's decay and a ⊗ dremoved: step() brings these with the token that comes next.
    void step_back(const Unit& u, int64_t head, int64_t chunk, int length, Head& now, Workspace& w) const {
        const int64_t origin = (chunk * c.heads + head) * N, stride = c.heads * N;
        for (int first = 0; first < N; first += WIDTH) {
            Lanes dremoved{}, dv;
            const float *decay = ZEROS, *a = ZEROS;
            for (int t = length - 1; t >= 0; --t) {
                const int64_t at = origin + t * stride;
                if (chunk > u.start) fetch_ahead(at - CHUNK * stride, saved_state_of(c, u, head, chunk - CHUNK), t);
                step(&now.g[0][first], decay, dremoved, a, load_lanes(w.dy_dremoved[t] + first), w.r[t], w.b[t],
                     w.k[t], dremoved, dv);
                store_lanes(w.dy_dremoved[CHUNK + t] + first, dremoved);
                store_lanes((T*)c.dv + at + first, dv);
                decay = w.decay[t];
                a = w.a[t];
            }
        }
    }

    // The first token's decay and a ⊗ dremoved: now.g becomes the gradient of the state before the chunk.
    void settle(const Row* before, Head& now, const Workspace& w) const {
        float sums[N][LANES];
        for (int j = 0; j < N; ++j) {
            vec sum{};
#pragma GCC unroll 4
            for (int i = 0; i < N; i += LANES) {
                const vec g = load(&now.g[j][i]);
                const vec out = g + g * w.decay[0][j] + load(w.dy_dremoved[CHUNK] + i) * w.a[0][j];
                store(&now.g[j][i], out);
                sum += out * load(&before[j][i]);
            }
            store(sums[j], sum);
        }
        Row across[LANES];
        transpose<N, LANES>(sums, across);
        for (int j = 0; j < N; j += LANES) {
            vec sum{};
            for (int l = 0; l < LANES; ++l) sum += load(across[l] + j);
            store(now.sum + j, sum);
        }
    }

    void fetch_ahead(int64_t at, int64_t state, int t) const {
        for (const void* x : {c.r, c.log_decay, c.k, c.v, c.a, c.b, c.dy}) will_read((const T*)x + at);
        will_read(c.removed + at);
        for (int n = 0; n < N / CHUNK; ++n) will_read(c.states + state + (t * N / CHUNK + n) * N);
    }

    // What tokens s ≤ t of one chunk owe each other, for WIDTH keys. Token s travels to t with the decays between.
    void add_pairs(int first, Workspace& w) const {
        Lanes since_start, to_end;  // decays from the chunk's start to t, from t to its end
        for (int u = 0; u < ACROSS; ++u) since_start.at[u] = to_end.at[u] = broadcast(1.0f);
        const auto scale = [&](float* out, const Lanes& by) {
            for (int u = 0; u < ACROSS; ++u) store(out + u * LANES, load(out + u * LANES) * by.at[u]);
        };
        for (int t = 0; t < CHUNK; ++t) {
            scale(w.da[t] + first, since_start);
            decay_lanes(since_start, load_lanes(w.decay[t] + first));
            scale(w.dr[t] + first, since_start);
        }
        for (int t = CHUNK - 1; t >= 0; --t) {
            scale(w.dk[t] + first, to_end);
            scale(w.db[t] + first, to_end);
            decay_lanes(to_end, load_lanes(w.decay[t] + first));
        }
        for (int s = 0; s < CHUNK; ++s) {
            Lanes b = load_lanes(w.b[s] + first), k = load_lanes(w.k[s] + first);
            const float *with_removed = w.products[s], *with_v = w.products[CHUNK + s];
            accumulate(w.dr[s] + first, b, with_removed[s], k, with_v[s]);
            for (int t = s + 1; t < CHUNK; ++t) {
                accumulate(w.da[t] + first, b, with_removed[CHUNK + t], k, with_v[CHUNK + t]);
                const Lanes decay = load_lanes(w.decay[t] + first);
                decay_lanes(b, decay);
                decay_lanes(k, decay);
                accumulate(w.dr[t] + first, b, with_removed[t], k, with_v[t]);
            }
        }
        for (int t = CHUNK - 1; t >= 0; --t) {
            Lanes r = load_lanes(w.r[t] + first), a = load_lanes(w.a[t] + first);
            accumulate(w.db[t] + first, r, w.products[t][t], a, 0.0f);
            accumulate(w.dk[t] + first, r, w.products[CHUNK + t][t], a, 0.0f);
            decay_lanes(r, load_lanes(w.decay[t] + first));
            for (int s = t - 1; s >= 0; --s) {
                const float *with_removed = w.products[s], *with_v = w.products[CHUNK + s];
                accumulate(w.db[s] + first, r, with_removed[t], a, with_removed[CHUNK + t]);
                accumulate(w.dk[s] + first, r, with_v[t], a, with_v[CHUNK + t]);
                const Lanes decay = load_lanes(w.decay[s] + first);
                decay_lanes(r, decay);
                decay_lanes(a, decay);
            }
        }
    }

    // dlog_decay needs no product of its own. With u_t = Σ_i G_t ∘ S_t (G_t with token t's own share), the terms of
    // S_t and of G_{t-1} give dlog_decay_t = u_t - b_t db_t - k_t dk_t and u_{t-1} = dlog_decay_t + a_t da_t +
    // r_{t-1} dr_{t-1}. Each chunk starts afresh from the states, lest rounding adds up along a document.
    void store_chunk(int64_t origin, int64_t stride, int length, Head& now, const Workspace& w) const {
        for (int t = length - 1; t >= 0; --t) {
            const int64_t at = origin + t * stride;
#pragma GCC unroll 4
            for (int j = 0; j < N; j += LANES) {
                const vec sum = load(now.sum + j) + load(w.dr[t] + j) * load(w.r[t] + j) -
                                load(w.db[t] + j) * load(w.b[t] + j) - load(w.dk[t] + j) * load(w.k[t] + j);
                store((T*)c.dlog_decay + at + j, sum);
                store(now.sum + j, sum + load(w.da[t] + j) * load(w.a[t] + j));
            }
            copy((T*)c.dr + at, w.dr[t]);
            copy((T*)c.da + at, w.da[t]);
            copy((T*)c.db + at, w.db[t]);
            copy((T*)c.dk + at, w.dk[t]);
        }
    }
};

template <class T>
void clear_padding(const Wkv7Call& c, void* p) {
    const int64_t first = c.cu_seqlens[c.documents] * c.heads * N, last = c.tokens * c.heads * N;
    std::memset((T*)p + first, 0, (last - first) * sizeof(T));
}

template <class T>
void forward(const Wkv7Call& c) {
    for_each_unit<typename Forward<T>::Workspace>(c, Forward<T>{c});
    clear_padding<T>(c, c.y);
}

template <class T>
void backward(const Wkv7Call& c) {
    for_each_unit<typename Backward<T>::Workspace>(c, Backward<T>{c});
    for (void* gradient : {c.dr, c.dlog_decay, c.dk, c.dv, c.da, c.db}) clear_padding<T>(c, gradient);
}

}  // namespace

extern "C" {
void wkv7_forward_float32(const Wkv7Call* c) { forward<float>(*c); }
void wkv7_forward_bfloat16(const Wkv7Call* c) { forward<bf16>(*c); }
void wkv7_backward_float32(const Wkv7Call* c) { backward<float>(*c); }
void wkv7_backward_bfloat16(const Wkv7Call* c) { backward<bf16>(*c); }
}
