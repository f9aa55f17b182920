// WKV-7 on the CPU, forward and backward, for any number of documents of any length. ../README.md derives the maths.
//
// Units of work, a document × a few heads each, are taken from one queue by as many threads as there may be. A unit
// writes what no other writes and computes the same whatever its neighbours, so results are bitwise equal for any
// number of threads, in any pack, in any order of documents. A unit goes through its document in chunks:
//
//     forward    step by step; some of the states are saved, and so is `removed`, S_{t-1} a_t, of every token
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
    float* states;   // (tokens / SAVED + documents, heads, N, N) [key, value]
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
        end_of_stream();
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

template <class T>
inline void stream_lanes(T* p, const Lanes& x) {
    for (int u = 0; u < ACROSS; ++u) stream(p + u * LANES, x.at[u]);
}

inline void decay_lanes(Lanes& x, const Lanes& decay) {
    for (int u = 0; u < ACROSS; ++u) x.at[u] = decayed(x.at[u], decay.at[u]);
}

// A row each of what a step reads, side by side so that one pointer finds them all.
struct Token {
    Row decay, p, q, m, n;
};

// One step of either recurrence, for WIDTH value rows of S [key][value]:
//     S ← S diag(1 + decay) + x pᵀ + y qᵀ, then S m and S n.
// Values lie along the lanes, so that no sum runs across them and p, q, m, n are numbers to broadcast. The products
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

template <class T>
struct Forward {
    struct Head {
        Row s[N], removed;  // S [key][value], and S a for the next token
    };
    struct alignas(64) Workspace {
        Head heads[GROUP];
        Token tokens[CHUNK];  // p = b, q = k, m = r, n = the next token's a
    };

    const Wkv7Call& c;
    const T *r = (const T*)c.r, *log_decay = (const T*)c.log_decay, *k = (const T*)c.k, *v = (const T*)c.v,
            *a = (const T*)c.a, *b = (const T*)c.b;
    T* y = (T*)c.y;

    void operator()(const Unit& u, Workspace& w) const {
        for (int64_t h = 0; h < u.heads; ++h) begin(u, u.head + h, w.heads[h], w.tokens[0]);
        for (int64_t chunk = u.start; chunk < u.stop; chunk += CHUNK)
            for (int64_t h = 0; h < u.heads; ++h) run(u, u.head + h, chunk, w.heads[h], w.tokens);
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

    void run(const Unit& u, int64_t head, int64_t chunk, Head& now, Token* tokens) const {
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
        if (c.states && (chunk - u.start) % SAVED == 0)
            for (int j = 0; j < N; ++j) stream_row(c.states + saved_state_of(c, u, head, chunk) + j * N, now.s[j]);
        // Meanwhile, what comes after this chunk is fetched: the next head's, or the first one's next.
        const bool last = head + 1 == u.head + u.heads;
        const int64_t next_head = last ? u.head : head + 1, next_chunk = last ? chunk + CHUNK : chunk;
        for (int first = 0; first < N; first += WIDTH) {
            Lanes removed = load_lanes(now.removed + first), out;
            for (int t = 0; t < length; ++t) {
                const int64_t at = row_of(c, head, chunk + t) + first, next = row_of(c, next_head, next_chunk + t);
                const T* const ahead[QUARTERS + 2] = {r + next, log_decay + next, k + next, v + next, a + next, b + next};
                int quarter = next_chunk + t < u.stop && first == 0 ? 0 : QUARTERS;
                if (c.removed) stream_lanes(c.removed + at, removed);
                step(&now.s[0][first], tokens[t], removed, load_lanes(v + at), out, removed, [&] {
                    if (quarter == QUARTERS) return;
                    will_read(ahead[quarter]);
                    if (quarter < 2) will_read(ahead[QUARTERS + quarter]);
                    ++quarter;
                });
                stream_lanes(y + at, out);
            }
            store_lanes(now.removed + first, removed);
        }
    }
};

// out += x · c + y · d
inline void accumulate(float* out, const Lanes& x, float c, const Lanes& y, float d) {
    const vec c_all = broadcast(c), d_all = broadcast(d);  // once: for all the compiler knows, `out` is their source
#pragma GCC unroll 4
    for (int u = 0; u < ACROSS; ++u)
        store(out + u * LANES, load(out + u * LANES) + x.at[u] * c_all + y.at[u] * d_all);
}

inline void scale(float* out, const Lanes& by) {
    for (int u = 0; u < ACROSS; ++u) store(out + u * LANES, load(out + u * LANES) * by.at[u]);
}

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
        Row before[N];  // the state [key][value]

        float* decay(int t) { return tokens[t].decay; }
        float* a(int t) { return tokens[t].p; }
        float* r(int t) { return tokens[t + 1].q; }
        float* b(int t) { return tokens[t + 1].m; }
        float* k(int t) { return tokens[t + 1].n; }
    };
    struct alignas(64) Workspace {
        Head heads[GROUP];
        Chunk chunks[SAVED / CHUNK];
        // `apart`: loads wait for stores that differ from them by a multiple of 4096 bytes.
        Row dr[CHUNK], dlog_decay[CHUNK], dk[CHUNK], apart[5], da[CHUNK], db[CHUNK];
        Pair values[N], gradients[N];  // removed | v and dy | dremoved, [value][token]
        Pair products[2 * CHUNK];      // removed_s and, below, v_s · dy_t | dremoved_t
        Pair dr_da[N], db_dk[N];       // [key][token]
    };
    // What memory does while something is computed, row by row: it brings a segment of a head that will be next, and
    // takes the results of the chunk before.
    struct Background {
        int64_t fetch_head, fetch_first, fetch_stop, fetched;  // none if first == stop
        int64_t write_head, write_first, write_stop, written;
    };

    const Wkv7Call& c;

    void operator()(const Unit& u, Workspace& w) const {
        for (int64_t h = 0; h < u.heads; ++h) begin(state_of(c, u, u.head + h), w.heads[h]);
        Background background{};
        const int64_t last = u.start + (u.stop - u.start - 1) / SAVED * SAVED;
        for (int64_t segment = last; u.start < u.stop && segment >= u.start; segment -= SAVED)
            for (int64_t h = 0; h < u.heads; ++h) {
                const bool more = h + 1 < u.heads;
                background.fetch_head = more ? u.head + h + 1 : u.head;
                background.fetch_first = more ? segment : std::max(segment - SAVED, u.start);
                background.fetch_stop = more ? std::min(segment + SAVED, u.stop) : segment;
                background.fetched = 0;
                run(u, u.head + h, segment, w.heads[h], w, background);
            }
        finish_writing(w, background);
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
        while (chunks-- > 0) run_chunk(u, head, segment + chunks * CHUNK, stop, now, w.chunks[chunks], w, background);
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
        constexpr int KEYS = 4;  // at once, to hide the latency of each
        for (int j = 0; j < N; j += KEYS)
            for (int first = 0; first < N; first += WIDTH) {
                Lanes s[KEYS];
                for (int n = 0; n < KEYS; ++n) s[n] = load_lanes(x.before[j + n] + first);
                for (int t = 0; t < CHUNK; ++t) {
                    const Lanes removed = load_lanes(x.removed_v[t] + first),
                                v = load_lanes(x.removed_v[CHUNK + t] + first);
                    const float *decay = x.decay(t), *b = x.b(t), *k = x.k(t);
#pragma GCC unroll 4
                    for (int n = 0; n < KEYS; ++n)
#pragma GCC unroll 4
                        for (int u = 0; u < ACROSS; ++u) {
                            vec e = s[n].at[u];
                            e += e * decay[j + n];
                            e += removed.at[u] * b[j + n];
                            e += v.at[u] * k[j + n];
                            s[n].at[u] = e;
                        }
                }
                for (int n = 0; n < KEYS; ++n) store_lanes(after[j + n] + first, s[n]);
            }
    }

    void run_chunk(const Unit& u, int64_t head, int64_t chunk, int64_t stop, Head& now, Chunk& x, Workspace& w,
                   Background& background) const {
        const auto meanwhile = [&] {
            fetch_row(u, background);
            write_row(w, background);
        };
        const int length = static_cast<int>(std::min<int64_t>(CHUNK, stop - chunk));
        transpose<2 * CHUNK, N>(x.removed_v, w.values);
        multiply<N, 2 * CHUNK>(now.g, w.values, w.db_dk, meanwhile);
        step_back(head, chunk, length, now, x, meanwhile);
        transpose<2 * CHUNK, N>(x.dy_dremoved, w.gradients);
        multiply<N, 2 * CHUNK>(x.before, w.gradients, w.dr_da, meanwhile);
        multiply<2 * CHUNK, 2 * CHUNK>(x.removed_v, w.gradients, w.products, meanwhile);
        finish_writing(w, background);
        transpose<N, CHUNK>(w.dr_da, w.dr);
        transpose<N, CHUNK>((const Pair*)&w.dr_da[0][CHUNK], w.da);
        transpose<N, CHUNK>(w.db_dk, w.db);
        transpose<N, CHUNK>((const Pair*)&w.db_dk[0][CHUNK], w.dk);
        for (int first = 0; first < N; first += WIDTH) add_pairs(first, x, w, [&] { fetch_row(u, background); });
        add_up_decays(length, now, x, w);
        background.write_head = head;
        background.write_first = chunk;
        background.write_stop = chunk + length;
        background.written = 0;
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
        float sums[N][LANES];
        const float *decay = x.decay(0), *a = x.a(0), *dremoved = x.dy_dremoved[CHUNK];
        for (int j = 0; j < N; ++j) {
            vec sum{};
#pragma GCC unroll 4
            for (int i = 0; i < N; i += LANES) {
                const vec g = load(&now.g[j][i]);
                const vec out = g + g * decay[j] + load(dremoved + i) * a[j];
                store(&now.g[j][i], out);
                sum += out * load(&x.before[j][i]);
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

    // What tokens s ≤ t of one chunk owe each other, for WIDTH keys. Token s travels to t with the decays between.
    template <class Meanwhile>
    void add_pairs(int first, Chunk& x, Workspace& w, const Meanwhile& meanwhile) const {
        Lanes since_start, to_end;  // decays from the chunk's start to t, from t to its end
        for (int u = 0; u < ACROSS; ++u) since_start.at[u] = to_end.at[u] = broadcast(1.0f);
        for (int t = 0; t < CHUNK; ++t) {
            scale(w.da[t] + first, since_start);
            decay_lanes(since_start, load_lanes(x.decay(t) + first));
            scale(w.dr[t] + first, since_start);
        }
        for (int t = CHUNK - 1; t >= 0; --t) {
            scale(w.dk[t] + first, to_end);
            scale(w.db[t] + first, to_end);
            decay_lanes(to_end, load_lanes(x.decay(t) + first));
        }
        for (int s = 0; s < CHUNK; ++s) {
            meanwhile();
            Lanes b = load_lanes(x.b(s) + first), k = load_lanes(x.k(s) + first);
            const float *with_removed = w.products[s], *with_v = w.products[CHUNK + s];
            accumulate(w.dr[s] + first, b, with_removed[s], k, with_v[s]);
            for (int t = s + 1; t < CHUNK; ++t) {
                accumulate(w.da[t] + first, b, with_removed[CHUNK + t], k, with_v[CHUNK + t]);
                const Lanes decay = load_lanes(x.decay(t) + first);
                decay_lanes(b, decay);
                decay_lanes(k, decay);
                accumulate(w.dr[t] + first, b, with_removed[t], k, with_v[t]);
            }
        }
        for (int t = CHUNK - 1; t >= 0; --t) {
            meanwhile();
            Lanes r = load_lanes(x.r(t) + first), a = load_lanes(x.a(t) + first);
            accumulate(w.db[t] + first, r, w.products[t][t], a, 0.0f);
            accumulate(w.dk[t] + first, r, w.products[CHUNK + t][t], a, 0.0f);
            decay_lanes(r, load_lanes(x.decay(t) + first));
            for (int s = t - 1; s >= 0; --s) {
                const float *with_removed = w.products[s], *with_v = w.products[CHUNK + s];
                accumulate(w.db[s] + first, r, with_removed[t], a, with_removed[CHUNK + t]);
                accumulate(w.dk[s] + first, r, with_v[t], a, with_v[CHUNK + t]);
                const Lanes decay = load_lanes(x.decay(s) + first);
                decay_lanes(r, decay);
                decay_lanes(a, decay);
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
                const vec sum = load(now.sum + j) + load(w.dr[t] + j) * load(x.r(t) + j) -
                                load(w.db[t] + j) * load(x.b(t) + j) - load(w.dk[t] + j) * load(x.k(t) + j);
                store(w.dlog_decay[t] + j, sum);
                store(now.sum + j, sum + load(w.da[t] + j) * load(x.a(t) + j));
            }
    }

    [[gnu::always_inline]] void fetch_row(const Unit& u, Background& background) const {
        constexpr int EACH = 9;  // rows of a token, the ninth being its share of the saved state
        const int64_t token = background.fetch_first + background.fetched / EACH;
        if (token >= background.fetch_stop) return;
        const int64_t at = row_of(c, background.fetch_head, token), row = background.fetched++ % EACH;
        const void* const inputs[] = {c.r, c.log_decay, c.k, c.v, c.a, c.b, c.dy};
        if (row < 7)
            will_read((const T*)inputs[row] + at);
        else if (row == 7)
            will_read(c.removed + at);
        else
            will_read(c.states + saved_state_of(c, u, background.fetch_head, background.fetch_first) +
                      background.fetched / EACH * N - N);
    }

    [[gnu::always_inline]] void write_row(const Workspace& w, Background& background) const {
        constexpr int EACH = 5;
        const int64_t t = background.written / EACH, row = background.written % EACH;
        if (background.write_first + t >= background.write_stop) return;
        ++background.written;
        const Row* const from[] = {w.dr, w.dlog_decay, w.dk, w.da, w.db};
        void* const to[] = {c.dr, c.dlog_decay, c.dk, c.da, c.db};
        stream_row((T*)to[row] + row_of(c, background.write_head, background.write_first + t), from[row][t]);
    }

    void finish_writing(const Workspace& w, Background& background) const {
        for (int n = 0; n < 5 * CHUNK; ++n) write_row(w, background);
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
