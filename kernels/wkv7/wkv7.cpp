// WKV-7 on the CPU, forward and backward, for any number of documents of any length. ../README.md derives the maths.
//
// Units of work, a document × a few heads each, are taken from one queue by as many threads as there may be. A unit
// writes what no other writes and computes the same whatever its neighbours, so results are bitwise equal for any
// number of threads, in any pack, in any order of documents. A unit goes through its document in chunks:
//
//     forward    step by step; some of the states are saved, and so is `removed`, S_{t-1} a_t, of every token
//     backward   against time. First step by step, for dv and the gradient of `removed`. With both of these known,
//                no sum is left inside a recurrence: dr, da, db, dk are dense products with the state before the
//                chunk and the gradient after it, and what the chunk's own tokens add, pair by pair.
//
// Nothing is ever divided by a decay, so the gradients are as good for fast decays as for slow ones.

#include "threads.h"
#include "vectors.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

// Mirrored field by field in streaming_rwkv/ops/cpp.py. Tensors are (tokens, heads, N) and contiguous.
struct Wkv7Call {
    int64_t tokens, heads, documents;
    Threads threads;
    const int32_t* cu_seqlens;                  // (documents + 1,)
    const void *r, *log_decay, *k, *v, *a, *b;  // float or bfloat16
    const float* initial_state;                 // (documents, heads, N, N) [value, key], or null for zeros
    void* y;
    float* final_state;
    float* removed;  // for the backward pass, as `states`; null where there will be none
    float* states;   // (tokens / SAVED + documents, heads, N, N) [value, key]
    const void* dy;
    const float* dfinal_state;              // or null for zeros
    void *dr, *dlog_decay, *dk, *dv, *da, *db;
    float* dinitial_state;  // or null where nobody asks
};

namespace {

constexpr int CHUNK = 16;  // tokens that the backward pass takes together
constexpr int SAVED = 64;  // tokens between saved states
constexpr int GROUP = 4;   // most heads in a unit

struct Unit {
    int64_t document, start, stop, head, heads;
};

inline int64_t state_of(const Wkv7Call& c, const Unit& u, int64_t head) {
    return (u.document * c.heads + head) * N * N;
}

// A document's saved states begin at slot start / SAVED + document: room for all of them, whatever the lengths.
inline int64_t saved_state_of(const Wkv7Call& c, const Unit& u, int64_t head, int64_t token) {
    return ((u.start / SAVED + u.document + (token - u.start) / SAVED) * c.heads + head) * N * N;
}

inline int64_t row_of(const Wkv7Call& c, int64_t head, int64_t token) { return (token * c.heads + head) * N; }

// f(unit, workspace) for all.
template <class Workspace, class F>
void for_each_unit(const Wkv7Call& c, F f) {
    std::vector<int64_t> order(c.documents);
    std::iota(order.begin(), order.end(), 0);
    const auto length = [&](int64_t d) { return c.cu_seqlens[d + 1] - c.cu_seqlens[d]; };
    // Longest first, so that no thread is left alone with a long one at the end.
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return length(x) > length(y); });
    // Heads are adjacent in memory: alone, each would make the caches fetch its neighbours for nothing.
    int64_t group = GROUP;
    while (group > 1 && (c.heads % group || c.documents * c.heads / group < (group > 2 ? 2 : 1) * c.threads.count)) group /= 2;
    const int64_t groups = c.heads / group, units = c.documents * groups;
    std::atomic<int64_t> next{0};
    const int64_t worth = c.cu_seqlens[c.documents] * c.heads / 64;  // threads that have more to do than to start
    on_threads(c.threads, std::min(units, worth), [&] {
        const FlushSubnormals flush;
        const std::unique_ptr<Workspace> workspace(new Workspace);
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
            const int64_t document = order[unit / groups];
            f(Unit{document, c.cu_seqlens[document], c.cu_seqlens[document + 1], unit % groups * group, group},
              *workspace);
        }
        end_of_stream();
    });
}

template <int COUNT>
struct Vectors {
    vec at[COUNT];
};
typedef Vectors<ACROSS> Lanes;  // WIDTH numbers side by side, in registers

template <int COUNT = ACROSS, class T>
inline Vectors<COUNT> load_lanes(const T* p) {
    Vectors<COUNT> x;
#pragma GCC unroll 4
    for (int u = 0; u < COUNT; ++u) x.at[u] = load(p + u * LANES);
    return x;
}

template <int COUNT, class T>
inline void store_lanes(T* p, const Vectors<COUNT>& x) {
#pragma GCC unroll 4
    for (int u = 0; u < COUNT; ++u) store(p + u * LANES, x.at[u]);
}

template <class T>
inline void stream_lanes(T* p, const Lanes& x) {
#pragma GCC unroll 4
    for (int u = 0; u < ACROSS; ++u) stream(p + u * LANES, x.at[u]);
}

// e (1 + decay) + x · c + y · d, all but the factors c and d over lanes
template <int COUNT>
inline Vectors<COUNT> advance(Vectors<COUNT> e, const Vectors<COUNT>& decay, const Vectors<COUNT>& x, float c,
                              const Vectors<COUNT>& y, float d) {
#pragma GCC unroll 4
    for (int u = 0; u < COUNT; ++u) {
        e.at[u] += e.at[u] * decay.at[u];
        e.at[u] += x.at[u] * c;
        e.at[u] += y.at[u] * d;
    }
    return e;
}

// A row each of what a step reads, side by side so that one pointer finds them all.
struct Token {
    Row decay, p, q, m, n;
};

// One step of either recurrence, for WIDTH value rows of S [key][value]:
//     S ← S diag(1 + decay) + x pᵀ + y qᵀ, then S m and S n.
// Values are along the lanes, so that no sum runs across them and p, q, m, n are numbers to broadcast. The products
// that the next step starts from ride on the pass that makes S. `meanwhile` is called QUARTERS times.
constexpr int QUARTERS = 4;

template <class Meanwhile>
inline void step(float* __restrict s, const Token& __restrict token, Lanes x, Lanes y, Lanes& s_m, Lanes& s_n,
                 const Meanwhile& meanwhile) {
    Lanes sum_m{}, sum_n{};
    for (int start = 0; start < N; start += N / QUARTERS) {
        meanwhile();
#pragma GCC unroll 2
        for (int j = start; j < start + N / QUARTERS; ++j, s += N) {
#pragma GCC unroll 4
            for (int u = 0; u < ACROSS; ++u) {
                vec e = load(s + u * LANES);
                e += e * token.decay[j];
                e += x.at[u] * token.p[j];
                e += y.at[u] * token.q[j];
                store(s + u * LANES, e);
                sum_m.at[u] += e * token.m[j];
                sum_n.at[u] += e * token.n[j];
            }
        }
    }
    s_m = sum_m;
    s_n = sum_n;
}

inline Row* rows(float* state) { return reinterpret_cast<Row*>(state); }

inline const Row* rows(const float* state) { return reinterpret_cast<const Row*>(state); }

template <class T>
inline void load_decay(float* out, const T* log_decay) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n += LANES) store(out + n, expm1(load(log_decay + n)));
}

// Rows that memory is asked for while something else is computed, one at each call.
template <class T, int OF_T, int OF_FLOAT>
struct Fetch {
    static constexpr int KINDS = OF_T + OF_FLOAT;
    const char* at[KINDS];  // the next row of each kind
    int64_t step[KINDS];    // bytes to the one after it
    int64_t left = 0;       // rows of all kinds
    int next = 0;

    // `apart`: numbers from a token's row to the next one's.
    void begin(int64_t tokens, const T* const (&rows)[OF_T], int64_t apart) {
        for (int n = 0; n < OF_T; ++n) {
            at[n] = reinterpret_cast<const char*>(rows[n]);
            step[n] = apart * sizeof(T);
        }
        left = tokens * KINDS;
        next = 0;
    }

    void floats(int n, const float* row, int64_t apart) {
        at[OF_T + n] = reinterpret_cast<const char*>(row);
        step[OF_T + n] = apart * sizeof(float);
    }

    [[gnu::always_inline]] void operator()() {
        if (left == 0) return;
        --left;
        const char* row = at[next];
        at[next] += step[next];
        if (next < OF_T)
            will_read(reinterpret_cast<const T*>(row));
        else
            will_read(reinterpret_cast<const float*>(row));
        if (++next == KINDS) next = 0;
    }
};

template <class T>
struct Forward {
    struct Head {
        Row s[N], removed;  // S [key][value], and S a for the next token
    };
    struct alignas(64) Workspace {
        Head heads[GROUP];
        Token tokens[CHUNK];  // p = b, q = k, m = r, n = the next token's a
        Row across[N];        // a state on its way to be saved
    };

    const Wkv7Call& c;
    const T *r = (const T*)c.r, *log_decay = (const T*)c.log_decay, *k = (const T*)c.k, *v = (const T*)c.v,
            *a = (const T*)c.a, *b = (const T*)c.b;
    T* y = (T*)c.y;

    void operator()(const Unit& u, Workspace& w) const {
        for (int64_t h = 0; h < u.heads; ++h) begin(u, u.head + h, w.heads[h], w.tokens[0]);
        for (int64_t chunk = u.start; chunk < u.stop; chunk += CHUNK)
            for (int64_t h = 0; h < u.heads; ++h) run(u, u.head + h, chunk, w.heads[h], w);
        for (int64_t h = 0; h < u.heads; ++h)
            transpose<N, N>(w.heads[h].s, rows(c.final_state + state_of(c, u, u.head + h)));
    }

    void begin(const Unit& u, int64_t head, Head& now, Token& token) const {
        clear(now.removed);
        if (!c.initial_state) {
            std::memset(now.s, 0, sizeof(now.s));
            return;
        }
        transpose<N, N>(rows(c.initial_state + state_of(c, u, head)), now.s);
        if (u.start == u.stop) return;
        std::memset(&token, 0, sizeof(token));
        copy(token.m, a + row_of(c, head, u.start));
        for (int first = 0; first < N; first += WIDTH) {
            Lanes removed, unused;
            step(&now.s[0][first], token, {}, {}, removed, unused, [] {});
            store_lanes(now.removed + first, removed);
        }
    }

    void run(const Unit& u, int64_t head, int64_t chunk, Head& now, Workspace& w) const {
        Token* const tokens = w.tokens;
        const int length = static_cast<int>(std::min<int64_t>(CHUNK, u.stop - chunk));
        for (int t = 0; t < length; ++t) {
            const int64_t at = row_of(c, head, chunk + t);
            load_decay(tokens[t].decay, log_decay + at);
            copy(tokens[t].p, b + at);
            copy(tokens[t].q, k + at);
            copy(tokens[t].m, r + at);
            if (chunk + t + 1 < u.stop)
                copy(tokens[t].n, a + row_of(c, head, chunk + t + 1));
            else
                clear(tokens[t].n);
        }
        if (c.states && (chunk - u.start) % SAVED == 0) {
            transpose<N, N>(now.s, w.across);
            for (int i = 0; i < N; ++i) stream_row(c.states + saved_state_of(c, u, head, chunk) + i * N, w.across[i]);
        }
        // Meanwhile, what comes after this chunk is fetched: the next head's, or the first one's next.
        const bool last = head + 1 == u.head + u.heads;
        const int64_t next_head = last ? u.head : head + 1, next_chunk = last ? chunk + CHUNK : chunk;
        Fetch<T, 6, 0> fetch;
        const int64_t next = row_of(c, next_head, next_chunk);
        fetch.begin(std::clamp<int64_t>(u.stop - next_chunk, 0, CHUNK),
                    {r + next, log_decay + next, k + next, v + next, a + next, b + next}, c.heads * N);
        const auto meanwhile = [&] {
            fetch();
            fetch();
        };
        for (int first = 0; first < N; first += WIDTH) {
            Lanes removed = load_lanes(now.removed + first), out;
            for (int t = 0; t < length; ++t) {
                const int64_t at = row_of(c, head, chunk + t) + first;
                if (c.removed) stream_lanes(c.removed + at, removed);
                step(&now.s[0][first], tokens[t], removed, load_lanes(v + at), out, removed, meanwhile);
                stream_lanes(y + at, out);
            }
            store_lanes(now.removed + first, removed);
        }
    }
};

template <class T>
struct Backward {
    typedef float Pair[2 * CHUNK];  // two things of each token
    struct Head {
        Row g[N];  // gradient of the state after the segment [key][value]
        Row sum;   // Σ_value gradient ∘ state there
    };
    struct Chunk {
        Token tokens[CHUNK + 1];  // what token t - 1 needs of itself and of its successor: decay and p = a of token t,
                                  // q = r, m = b, n = k of token t - 1
        Row removed_v[2 * CHUNK], dy_dremoved[2 * CHUNK];
        Row before[N];  // the state [value][key]

        float* decay(int t) { return tokens[t].decay; }
        float* a(int t) { return tokens[t].p; }
        float* r(int t) { return tokens[t + 1].q; }
        float* b(int t) { return tokens[t + 1].m; }
        float* k(int t) { return tokens[t + 1].n; }
    };
    struct alignas(64) Workspace {
        Head heads[GROUP];
        Chunk chunks[SAVED / CHUNK];
        Row dr_da[2 * CHUNK], db[CHUNK], dk[CHUNK], dlog_decay[CHUNK];
        Pair values[N];            // removed | v, [value][token]
        Pair products[2 * CHUNK];  // dy_t and, below, dremoved_t · removed_s | v_s
        Pair db_dk[N];             // [key][token]
        Row across[N];             // a state [key][value]
    };
    // Memory traffic during computation, row by row: a segment of a head that will be next is fetched, and the results
    // of the chunk before are stored.
    struct Background {
        Fetch<T, 7, 2> fetch;  // inputs and dy; removed, and the token's share of the saved state
        struct {
            const float* from;
            T* to;
        } results[5];
        int64_t to_write = 0, apart = 0;
        int next = 0;

        [[gnu::always_inline]] void write() {
            if (to_write == 0) return;
            --to_write;
            auto& row = results[next];
            stream_row(row.to, row.from);
            row.from += N;
            row.to += apart;
            if (++next == 5) next = 0;
        }
    };

    const Wkv7Call& c;

    void operator()(const Unit& u, Workspace& w) const {
        for (int64_t h = 0; h < u.heads; ++h) begin(state_of(c, u, u.head + h), w.heads[h]);
        Background background;
        const int64_t last = u.start + (u.stop - u.start - 1) / SAVED * SAVED;
        for (int64_t segment = last; u.start < u.stop && segment >= u.start; segment -= SAVED)
            for (int64_t h = 0; h < u.heads; ++h) {
                if (h + 1 < u.heads)
                    fetch(u, u.head + h + 1, segment, std::min(segment + SAVED, u.stop), background.fetch);
                else
                    fetch(u, u.head, std::max(segment - SAVED, u.start), segment, background.fetch);
                run(u, u.head + h, segment, w.heads[h], w, background);
            }
        while (background.to_write) background.write();
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

    void run(const Unit& u, int64_t head, int64_t segment, Head& now, Workspace& w, Background& background) const {
        const int64_t stop = std::min(segment + SAVED, u.stop);
        std::memcpy(w.chunks[0].before, c.states + saved_state_of(c, u, head, segment), sizeof(w.chunks[0].before));
        int chunks = 0;
        for (int64_t first = segment; first < stop; first += CHUNK, ++chunks) {
            load_chunk(head, first, stop, w.chunks[chunks]);
            if (first + CHUNK < stop) replay(w.chunks[chunks], w.chunks[chunks + 1].before);
        }
        while (chunks-- > 0) run_chunk(head, segment + chunks * CHUNK, stop, now, w.chunks[chunks], w, background);
        add_up_state(now, w);
    }

    // Past the document's end: tokens that do nothing.
    void load_chunk(int64_t head, int64_t first, int64_t stop, Chunk& x) const {
        for (int t = 0; t < CHUNK; ++t) {
            if (first + t >= stop) {
                for (float* row : {x.decay(t), x.a(t), x.r(t), x.b(t), x.k(t), x.removed_v[t], x.removed_v[CHUNK + t],
                                   x.dy_dremoved[t], x.dy_dremoved[CHUNK + t]})
                    clear(row);
                continue;
            }
            const int64_t at = row_of(c, head, first + t);
            load_decay(x.decay(t), (const T*)c.log_decay + at);
            copy(x.a(t), (const T*)c.a + at);
            copy(x.r(t), (const T*)c.r + at);
            copy(x.b(t), (const T*)c.b + at);
            copy(x.k(t), (const T*)c.k + at);
            copy(x.removed_v[t], c.removed + at);
            copy(x.removed_v[CHUNK + t], (const T*)c.v + at);
            copy(x.dy_dremoved[t], (const T*)c.dy + at);
        }
        clear(x.decay(CHUNK));  // the gradient after the chunk has all that later tokens owe
        clear(x.a(CHUNK));
    }

    // The state after a whole chunk; with `removed` known, each of its numbers is a recurrence of its own.
    void replay(Chunk& x, Row* after) const {
        constexpr int VALUES = 4;  // at once, to hide the latency of each
        for (int i = 0; i < N; i += VALUES)
            for (int first = 0; first < N; first += WIDTH) {
                Lanes s[VALUES];
                for (int n = 0; n < VALUES; ++n) s[n] = load_lanes(x.before[i + n] + first);
                for (int t = 0; t < CHUNK; ++t) {
                    const Lanes decay = load_lanes(x.decay(t) + first), b = load_lanes(x.b(t) + first),
                                k = load_lanes(x.k(t) + first);
                    const float *removed = x.removed_v[t], *v = x.removed_v[CHUNK + t];
#pragma GCC unroll 4
                    for (int n = 0; n < VALUES; ++n) s[n] = advance(s[n], decay, b, removed[i + n], k, v[i + n]);
                }
                for (int n = 0; n < VALUES; ++n) store_lanes(after[i + n] + first, s[n]);
            }
    }

    void run_chunk(int64_t head, int64_t chunk, int64_t stop, Head& now, Chunk& x, Workspace& w,
                   Background& background) const {
        const auto meanwhile = [&] {
            background.fetch();
            background.write();
        };
        const auto fetch_alone = [&] { background.fetch(); };  // while the next results to write are made
        const int length = static_cast<int>(std::min<int64_t>(CHUNK, stop - chunk));
        transpose<2 * CHUNK, N>(x.removed_v, w.values);
        multiply<N, 2 * CHUNK>(now.g, w.values, w.db_dk, meanwhile);
        step_back(head, chunk, length, now, x, meanwhile);
        multiply<2 * CHUNK, 2 * CHUNK>(x.dy_dremoved, w.values, w.products, meanwhile);
        while (background.to_write) background.write();
        multiply<2 * CHUNK, N>(x.dy_dremoved, x.before, w.dr_da, fetch_alone);
        transpose<N, CHUNK>(w.db_dk, w.db);
        transpose<N, CHUNK>((const Pair*)&w.db_dk[0][CHUNK], w.dk);
        for (int first = 0; first < N; first += KEYS) {
            add_earlier(first, x, w, fetch_alone);
            add_later(first, x, w, fetch_alone);
        }
        add_up_decays(length, now, x, w);
        write(row_of(c, head, chunk), length, w, background);
        settle(now, x);
    }

    // dv and dremoved. now.g goes from the gradient after the chunk to that after its first token: step() brings a
    // token's decay and a ⊗ dremoved with the one before it.
    template <class Meanwhile>
    void step_back(int64_t head, int64_t chunk, int length, Head& now, Chunk& x, const Meanwhile& meanwhile) const {
        for (int first = 0; first < N; first += WIDTH) {
            Lanes dremoved{}, dv;
            for (int t = length - 1; t >= 0; --t) {
                step(&now.g[0][first], x.tokens[t + 1], dremoved, load_lanes(x.dy_dremoved[t] + first), dremoved, dv,
                     meanwhile);
                store_lanes(x.dy_dremoved[CHUNK + t] + first, dremoved);
                stream_lanes((T*)c.dv + row_of(c, head, chunk + t) + first, dv);
            }
        }
    }

    // The first token's decay and a ⊗ dremoved: now.g becomes the gradient of the state before the chunk.
    void settle(Head& now, Chunk& x) const {
        const float *decay = x.decay(0), *a = x.a(0);
        for (int first = 0; first < N; first += WIDTH) {
            const Lanes dremoved = load_lanes(x.dy_dremoved[CHUNK] + first);
            for (int j = 0; j < N; ++j) {
                Lanes g = load_lanes(now.g[j] + first);
#pragma GCC unroll 4
                for (int u = 0; u < ACROSS; ++u) {
                    g.at[u] += g.at[u] * decay[j];
                    g.at[u] += dremoved.at[u] * a[j];
                }
                store_lanes(now.g[j] + first, g);
            }
        }
    }

    // Σ_value gradient ∘ state before the segment.
    void add_up_state(Head& now, Workspace& w) const {
        float sums[N][LANES];
        transpose<N, N>(w.chunks[0].before, w.across);
        for (int j = 0; j < N; ++j) {
            vec sum{};
#pragma GCC unroll 4
            for (int i = 0; i < N; i += LANES) sum += load(&now.g[j][i]) * load(&w.across[j][i]);
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

    // Contributions of tokens s ≤ t of one chunk to each other, as the recurrences themselves: that of the state times dy_t or
    // dremoved_t, from the product with the state before the chunk, and that of the gradient times removed_s or v_s,
    // from the product with the gradient after it. Some tokens at a time, for some keys: what registers hold.
    static constexpr int TOGETHER = DOWN / 2, KEYS = 2 * LANES;
    typedef Vectors<2> Keys;

    template <class Meanwhile>
    void add_earlier(int first, Chunk& x, Workspace& w, const Meanwhile& meanwhile) const {
        for (int from = 0; from < CHUNK; from += TOGETHER) {
            Keys dr[TOGETHER], da[TOGETHER];
            Row* const dr_rows = w.dr_da + from;
            Row* const da_rows = w.dr_da + CHUNK + from;
#pragma GCC unroll 4
            for (int n = 0; n < TOGETHER; ++n) {
                dr[n] = load_lanes<2>(dr_rows[n] + first);
                da[n] = load_lanes<2>(da_rows[n] + first);
            }
            const auto add = [&](Keys& e, int row, int s) {
                const float* product = w.products[row];
                e = advance(e, load_lanes<2>(x.decay(s) + first), load_lanes<2>(x.b(s) + first), product[s],
                            load_lanes<2>(x.k(s) + first), product[CHUNK + s]);
            };
            for (int s = 0; s < from; ++s) {
                meanwhile();
#pragma GCC unroll 4
                for (int n = 0; n < TOGETHER; ++n) {
                    add(dr[n], from + n, s);
                    add(da[n], CHUNK + from + n, s);
                }
            }
#pragma GCC unroll 4
            for (int m = 0; m < TOGETHER; ++m)
#pragma GCC unroll 4
                for (int n = m; n < TOGETHER; ++n) {
                    add(dr[n], from + n, from + m);
                    if (n > m) add(da[n], CHUNK + from + n, from + m);  // da meets the state before its token
                }
#pragma GCC unroll 4
            for (int n = 0; n < TOGETHER; ++n) {
                store_lanes(dr_rows[n] + first, dr[n]);
                store_lanes(da_rows[n] + first, da[n]);
            }
        }
    }

    template <class Meanwhile>
    void add_later(int first, Chunk& x, Workspace& w, const Meanwhile& meanwhile) const {
        for (int from = CHUNK - TOGETHER; from >= 0; from -= TOGETHER) {
            Keys db[TOGETHER], dk[TOGETHER];
#pragma GCC unroll 4
            for (int n = 0; n < TOGETHER; ++n) {
                db[n] = load_lanes<2>(w.db[from + n] + first);
                dk[n] = load_lanes<2>(w.dk[from + n] + first);
            }
            const auto add_own = [&](Keys& e, int t, int column) {
                const Keys r = load_lanes<2>(x.r(t) + first);
#pragma GCC unroll 2
                for (int u = 0; u < 2; ++u) e.at[u] += r.at[u] * w.products[t][column];
            };
            const auto go_back = [&](Keys& e, int t, int column) {
                const Keys decay = load_lanes<2>(x.decay(t) + first), a = load_lanes<2>(x.a(t) + first);
#pragma GCC unroll 2
                for (int u = 0; u < 2; ++u) {
                    e.at[u] += e.at[u] * decay.at[u];
                    e.at[u] += a.at[u] * w.products[CHUNK + t][column];
                }
            };
            for (int t = CHUNK - 1; t >= from + TOGETHER; --t) {
                meanwhile();
#pragma GCC unroll 4
                for (int n = 0; n < TOGETHER; ++n) {
                    add_own(db[n], t, from + n);
                    add_own(dk[n], t, CHUNK + from + n);
                    go_back(db[n], t, from + n);
                    go_back(dk[n], t, CHUNK + from + n);
                }
            }
#pragma GCC unroll 4
            for (int m = TOGETHER - 1; m >= 0; --m)
#pragma GCC unroll 4
                for (int n = 0; n <= m; ++n) {
                    add_own(db[n], from + m, from + n);
                    add_own(dk[n], from + m, CHUNK + from + n);
                    if (n == m) continue;
                    go_back(db[n], from + m, from + n);
                    go_back(dk[n], from + m, CHUNK + from + n);
                }
#pragma GCC unroll 4
            for (int n = 0; n < TOGETHER; ++n) {
                store_lanes(w.db[from + n] + first, db[n]);
                store_lanes(w.dk[from + n] + first, dk[n]);
            }
        }
    }

    // dlog_decay needs no product of its own. With u_t = Σ_i G_t ∘ S_t (G_t with token t's own share), the terms of
    // S_t and of G_{t-1} give dlog_decay_t = u_t - b_t db_t - k_t dk_t and u_{t-1} = dlog_decay_t + a_t da_t +
    // r_{t-1} dr_{t-1}. Each chunk starts afresh from the states, lest rounding adds up along a document.
    void add_up_decays(int length, Head& now, Chunk& x, Workspace& w) const {
        for (int t = length - 1; t >= 0; --t)
#pragma GCC unroll 4
            for (int j = 0; j < N; j += LANES) {
                const vec sum = load(now.sum + j) + load(w.dr_da[t] + j) * load(x.r(t) + j) -
                                load(w.db[t] + j) * load(x.b(t) + j) - load(w.dk[t] + j) * load(x.k(t) + j);
                store(w.dlog_decay[t] + j, sum);
                store(now.sum + j, sum + load(w.dr_da[CHUNK + t] + j) * load(x.a(t) + j));
            }
    }

    // Tokens first … stop - 1 of a head, and the state before them.
    void fetch(const Unit& u, int64_t head, int64_t first, int64_t stop, Fetch<T, 7, 2>& x) const {
        const int64_t at = row_of(c, head, first), apart = c.heads * N;
        const auto row = [&](const void* tensor) { return static_cast<const T*>(tensor) + at; };
        x.begin(stop - first, {row(c.r), row(c.log_decay), row(c.k), row(c.v), row(c.a), row(c.b), row(c.dy)}, apart);
        x.floats(0, c.removed + at, apart);
        x.floats(1, c.states + saved_state_of(c, u, head, first), N);
    }

    void write(int64_t at, int length, const Workspace& w, Background& x) const {
        const float* const from[] = {w.dr_da[0], w.dlog_decay[0], w.dk[0], w.dr_da[CHUNK], w.db[0]};
        void* const to[] = {c.dr, c.dlog_decay, c.dk, c.da, c.db};
        for (int n = 0; n < 5; ++n) x.results[n] = {from[n], static_cast<T*>(to[n]) + at};
        x.apart = c.heads * N;
        x.to_write = 5 * length;
        x.next = 0;
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
