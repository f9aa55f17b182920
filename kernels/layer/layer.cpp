// The element-wise parts of an RWKV-7 layer on the CPU, forward and backward, and the loss of a chunk of logits.
// ../../streaming_rwkv/ops/layer_reference.py defines what each computes.
//
// A unit of work is a tile of consecutive tokens; threads take tiles from one queue. Numbers of a token depend on its
// document alone. Sums over tokens (gradients of parameters) are made per tile, and tiles are added in their order: the
// result is the same for any number of threads.
//
// R is the type of the residual stream, E of everything else; parameters, their gradients and all sums are float.
// Widths are multiples of 64. A tensor that is not there is a null pointer.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../wkv7/threads.h"
#include "../wkv7/vectors.h"

namespace {

struct Work {
    Threads threads;
    int64_t blocks, width;
};

// f(block) for all blocks.
template <class F>
void for_blocks(const Work& work, int64_t floats, const F& f) {
    std::atomic<int64_t> next{0};
    const int64_t worth = floats >> 14;  // threads that have more to do than to start
    on_threads(work.threads, std::min(work.blocks, worth), [&] {
        const FlushSubnormals flush;
        for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < work.blocks;) f(block);
    });
}

inline vec select(ivec mask, vec yes, vec no) { return mask ? yes : no; }

inline vec exp(vec x) {  // as expm1 of vectors.h, for x ≤ 0
    const vec low = broadcast(-87.0f);
    x = x < low ? low : x;
    const vec shifted = x * 1.44269504088896341f + 12582912.0f;
    const vec n = shifted - 12582912.0f;
    const vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = f * (1.0f / 5040) + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f * f + f;
    return bits<vec>((bits<ivec>(shifted) + 127) << 23) * (p + 1.0f);  // n stands in the low bits of `shifted`
}

struct Sigmoid {
    vec value, complement;  // σ(x) and 1 - σ(x), each with all its digits
    explicit Sigmoid(vec x) {
        const vec e = exp(bits<vec>(bits<uvec>(x) | 0x80000000u));  // of -|x|
        const vec larger = 1.0f / (1.0f + e), smaller = e * larger;
        value = select(x > 0.0f, larger, smaller);
        complement = select(x > 0.0f, smaller, larger);
    }
};

inline float sum(vec x) {
    float total = 0;
    for (int l = 0; l < LANES; ++l) total += x[l];
    return total;
}

template <class T>
inline vec load_or_zero(const T* p, int64_t offset) {
    return p ? load(p + offset) : vec{};
}

inline void add_to(float* p, vec x) { store(p, load(p) + x); }

// The value that x has after it was stored as T.
template <class T>
inline vec rounded(vec x) {
    T stored[LANES];
    store(stored, x);
    return load(stored);
}
template <>
inline vec rounded<float>(vec x) { return x; }

// Tokens in a row, or documents in one; see DocumentsOf in layer.cu.
struct Documents {
    int64_t tokens, row, documents;
    const int32_t* cu_seqlens;

    bool starts(int64_t t) const {
        if (!cu_seqlens) return t % row == 0;
        return *(std::upper_bound(cu_seqlens, cu_seqlens + documents + 1, t) - 1) == t;
    }
    bool padding(int64_t t) const { return cu_seqlens && t >= cu_seqlens[documents]; }
    bool ends_row(int64_t t) const { return (t + 1) % row == 0; }
};

// out[column] = Σ partial[block][column], in the order of the blocks.
void sum_blocks(const Work& work, int64_t blocks, int64_t columns, const float* partial, float* out) {
    const Work across{work.threads, columns / 64, 0};
    for_blocks(across, blocks * columns, [&](int64_t part) {
        vec total[64 / LANES] = {};
        for (int64_t block = 0; block < blocks; ++block)
            for (int l = 0; l < 64 / LANES; ++l) total[l] += load(partial + block * columns + part * 64 + l * LANES);
        for (int l = 0; l < 64 / LANES; ++l) store(out + part * 64 + l * LANES, total[l]);
    });
}

// ---- residual + LayerNorm + token shift + M mixes -------------------------------------------------------------------

template <int M, class R, class E>
struct NormMixForward {
    Documents d;
    int64_t tile;
    const R* x;
    const E* branch;
    const float *weight, *bias, *mixes, *last;
    float eps;
    R* residual;
    E* mixed[M];
    float *stats, *last_out;

    // The normalized token t into u, its statistics; residual is written if `write`.
    void normalize(int64_t t, int64_t width, float* u, bool write) const {
        vec total{};
        for (int64_t c = 0; c < width; c += LANES) {
            vec z = load(x + t * width + c);
            if (branch) {
                z = rounded<R>(z + load(branch + t * width + c));
                if (write) store(residual + t * width + c, z);
            }
            store(u + c, z);
            total += z;
        }
        const float mean = sum(total) / width;
        vec squares{};
        for (int64_t c = 0; c < width; c += LANES) {
            const vec z = load(u + c) - mean;
            squares += z * z;
        }
        const float rstd = 1.0f / std::sqrt(sum(squares) / width + eps);
        for (int64_t c = 0; c < width; c += LANES)
            store(u + c, (load(u + c) - mean) * rstd * load(weight + c) + load(bias + c));
        if (write) {
            stats[2 * t] = mean;
            stats[2 * t + 1] = rstd;
        }
    }

    void run(const Work& work) const {
        const int64_t width = work.width;
        for_blocks(work, d.tokens * width, [&](int64_t block) {
            std::vector<float> memory(2 * width);
            float *u = memory.data(), *previous = u + width;
            const int64_t first = block * tile, stop = std::min(first + tile, d.tokens);
            for (int64_t t = first; t < stop; ++t) {
                if (d.padding(t)) {
                    for (int64_t c = 0; c < width; c += LANES) {
                        if (branch) store(residual + t * width + c, vec{});
                        for (int m = 0; m < M; ++m) store(mixed[m] + t * width + c, vec{});
                    }
                    stats[2 * t] = stats[2 * t + 1] = 0;
                    continue;
                }
                if (d.starts(t)) {
                    for (int64_t c = 0; c < width; c += LANES)
                        store(previous + c, load_or_zero(last, t / d.row * width + c));
                } else if (t == first) {
                    normalize(t - 1, width, previous, false);
                }
                normalize(t, width, u, true);
                for (int64_t c = 0; c < width; c += LANES) {
                    const vec now = load(u + c), delta = load(previous + c) - now;
                    for (int m = 0; m < M; ++m)
                        store(mixed[m] + t * width + c, now + delta * load(mixes + m * width + c));
                }
                if (last_out && d.ends_row(t)) std::copy(u, u + width, last_out + t / d.row * width);
                std::swap(u, previous);
            }
        });
    }
};

template <int M, class R, class E>
struct NormMixBackward {
    Documents d;
    int64_t tile;
    const R* residual;
    const float *stats, *weight, *bias, *mixes, *last;
    const R* dresidual;
    const E* dmixed[M];
    const float* dlast_out;
    R* dx;
    E* dbranch;
    E* mixed[M];
    float *dlast, *partial;

    void normalize(int64_t t, int64_t width, float* u) const {
        const float mean = stats[2 * t], rstd = stats[2 * t + 1];
        for (int64_t c = 0; c < width; c += LANES)
            store(u + c, (load(residual + t * width + c) - mean) * rstd * load(weight + c) + load(bias + c));
    }

    void run(const Work& work) const {
        const int64_t width = work.width;
        for_blocks(work, d.tokens * width, [&](int64_t block) {
            std::vector<float> memory(4 * width);
            float *u = memory.data(), *previous = u + width, *du = previous + width, *to_previous = du + width;
            float* sums = partial + block * (2 + M) * width;  // of weight, bias, mixes
            std::fill(sums, sums + (2 + M) * width, 0.0f);
            const int64_t first = block * tile, stop = std::min(first + tile, d.tokens);
            for (int64_t t = stop - 1; t >= first; --t) {
                if (d.padding(t)) {
                    for (int64_t c = 0; c < width; c += LANES) {
                        store(dx + t * width + c, vec{});
                        if (dbranch) store(dbranch + t * width + c, vec{});
                        for (int m = 0; m < M; ++m) store(mixed[m] + t * width + c, vec{});
                    }
                    continue;
                }
                const bool starts = d.starts(t);
                const bool next_is_ours = t + 1 < d.tokens && !d.padding(t + 1) && !d.starts(t + 1);
                if (t == stop - 1 || !next_is_ours) {  // else they are there
                    normalize(t, width, u);
                    for (int64_t c = 0; c < width; c += LANES) {
                        vec g{};
                        for (int m = 0; m < M && next_is_ours; ++m)
                            g += load(dmixed[m] + (t + 1) * width + c) * load(mixes + m * width + c);
                        store(to_previous + c, g);
                    }
                }
                if (starts)
                    for (int64_t c = 0; c < width; c += LANES)
                        store(previous + c, load_or_zero(last, t / d.row * width + c));
                else
                    normalize(t - 1, width, previous);
                const float mean = stats[2 * t], rstd = stats[2 * t + 1];
                const float* from_row_end = dlast_out && d.ends_row(t) ? dlast_out + t / d.row * width : nullptr;
                vec total{}, product{};
                for (int64_t c = 0; c < width; c += LANES) {
                    const vec now = load(u + c), delta = load(previous + c) - now;
                    vec g = load(to_previous + c) + load_or_zero(from_row_end, c), backward{};
                    for (int m = 0; m < M; ++m) {
                        const vec mix = load(mixes + m * width + c), dm = load(dmixed[m] + t * width + c);
                        g += dm - dm * mix;
                        backward += dm * mix;
                        add_to(sums + (2 + m) * width + c, dm * delta);
                        store(mixed[m] + t * width + c, now + delta * mix);
                    }
                    store(to_previous + c, backward);
                    const vec normal = (load(residual + t * width + c) - mean) * rstd;
                    add_to(sums + c, g * normal);
                    add_to(sums + width + c, g);
                    g *= load(weight + c);
                    store(du + c, g);
                    total += g;
                    product += g * normal;
                }
                const float a = sum(total) / width, b = sum(product) / width;
                for (int64_t c = 0; c < width; c += LANES) {
                    const vec normal = (load(residual + t * width + c) - mean) * rstd;
                    const vec g = (load(du + c) - a - normal * b) * rstd + load_or_zero(dresidual, t * width + c);
                    store(dx + t * width + c, g);
                    if (dbranch) store(dbranch + t * width + c, g);
                }
                if (starts && dlast)
                    std::copy(to_previous, to_previous + width, dlast + t / d.row * width);
                std::swap(u, previous);
            }
        });
    }
};

// ---- what WKV-7 gets, from the projections ---------------------------------------------------------------------------

constexpr float DECAY_SCALE = 0.606530659712633423604f;  // exp(-1/2)
constexpr float NORM_EPS = 1e-12f;

template <class E>
struct Wkv7InputsForward {
    int64_t tokens, tile;
    const E *w, *a, *k, *v, *v_lora, *v_first;
    const float *w0, *a0, *k_k, *k_a, *v0;
    E *log_decay, *k_out, *v_out, *removal, *replacement;

    void run(const Work& work) const {
        const int64_t width = work.width;
        for_blocks(work, tokens * width, [&](int64_t block) {
            for (int64_t t = block * tile; t < std::min(block * tile + tile, tokens); ++t)
                for (int64_t head = 0; head < width; head += N) {
                    vec squares{};
                    for (int64_t c = head; c < head + N; c += LANES) {
                        const vec q = load(k + t * width + c) * load(k_k + c);
                        squares += q * q;
                    }
                    const float scale = 1.0f / std::max(std::sqrt(sum(squares)), NORM_EPS);
                    for (int64_t c = head; c < head + N; c += LANES) {
                        const int64_t n = t * width + c;
                        store(log_decay + n, -DECAY_SCALE * Sigmoid(load(w0 + c) + load(w + n)).value);
                        const Sigmoid share(load(a0 + c) + load(a + n));
                        const vec key = load(k + n), normal = key * load(k_k + c) * scale;
                        store(k_out + n, key - key * share.complement * load(k_a + c));
                        store(removal + n, -normal);
                        store(replacement + n, normal * share.value);
                        if (v_first) {
                            const vec value = load(v + n);
                            const Sigmoid residual(load(v0 + c) + load(v_lora + n));
                            store(v_out + n, value + (load(v_first + n) - value) * residual.value);
                        }
                    }
                }
        });
    }
};

template <class E>
struct Wkv7InputsBackward {
    int64_t tokens, tile;
    const E *w, *a, *k, *v, *v_lora, *v_first;
    const float *w0, *a0, *k_k, *k_a, *v0;
    const E *dlog_decay, *dk_out, *dv_out, *dremoval, *dreplacement;
    E *dw, *da, *dk, *dv, *dv_lora, *dv_first;
    float* partial;

    void run(const Work& work) const {
        const int64_t width = work.width;
        const int vectors = v_first ? 5 : 4;
        for_blocks(work, 2 * tokens * width, [&](int64_t block) {
            float* sums = partial + block * vectors * width;  // of w0, a0, k_k, k_a, v0
            std::fill(sums, sums + vectors * width, 0.0f);
            for (int64_t t = block * tile; t < std::min(block * tile + tile, tokens); ++t)
                for (int64_t head = 0; head < width; head += N) {
                    vec squares{}, product{};
                    for (int64_t c = head; c < head + N; c += LANES) {
                        const int64_t n = t * width + c;
                        const vec q = load(k + n) * load(k_k + c);
                        squares += q * q;
                        const Sigmoid share(load(a0 + c) + load(a + n));
                        product += q * (load(dreplacement + n) * share.value - load(dremoval + n));
                    }
                    const float norm = std::sqrt(sum(squares)), scale = 1.0f / std::max(norm, NORM_EPS);
                    // The normal's part in its own gradient; below the bound the divisor is a constant.
                    const float own = norm > NORM_EPS ? sum(product) * scale * scale : 0.0f;
                    for (int64_t c = head; c < head + N; c += LANES) {
                        const int64_t n = t * width + c;
                        const Sigmoid decay(load(w0 + c) + load(w + n)), share(load(a0 + c) + load(a + n));
                        const vec g_decay = load(dlog_decay + n) * -DECAY_SCALE * decay.value * decay.complement;
                        const vec key = load(k + n), k_k_c = load(k_k + c), k_a_c = load(k_a + c), q = key * k_k_c;
                        const vec g_key = load(dk_out + n), g_replacement = load(dreplacement + n);
                        const vec g_q = (g_replacement * share.value - load(dremoval + n) - q * own) * scale;
                        const vec g_share =
                            (g_replacement * q * scale + g_key * key * k_a_c) * share.value * share.complement;
                        store(dw + n, g_decay);
                        store(da + n, g_share);
                        store(dk + n, g_q * k_k_c + g_key - g_key * share.complement * k_a_c);
                        add_to(sums + c, g_decay);
                        add_to(sums + width + c, g_share);
                        add_to(sums + 2 * width + c, g_q * key);
                        add_to(sums + 3 * width + c, -g_key * key * share.complement);
                        if (v_first) {
                            const Sigmoid residual(load(v0 + c) + load(v_lora + n));
                            const vec g_value = load(dv_out + n);
                            const vec g_residual = g_value * (load(v_first + n) - load(v + n)) * residual.value *
                                                   residual.complement;
                            store(dv + n, g_value * residual.complement);
                            store(dv_first + n, g_value * residual.value);
                            store(dv_lora + n, g_residual);
                            add_to(sums + 4 * width + c, g_residual);
                        }
                    }
                }
        });
    }
};

// ---- GroupNorm + bonus + gate ----------------------------------------------------------------------------------------

struct Head {
    float mean, rstd, bonus;
};

template <class E>
inline Head head_of(const E* y, const E* r, const E* k, const float* r_k, float eps) {
    vec total{}, squares{}, bonus{};
    for (int c = 0; c < N; c += LANES) {
        total += load(y + c);
        bonus += load(r + c) * load(k + c) * load(r_k + c);
    }
    Head head{sum(total) / N, 0, sum(bonus)};
    for (int c = 0; c < N; c += LANES) {
        const vec z = load(y + c) - head.mean;
        squares += z * z;
    }
    head.rstd = 1.0f / std::sqrt(sum(squares) / N + eps);
    return head;
}

template <class E>
struct Wkv7OutputForward {
    int64_t tokens, tile;
    const E *y, *r, *k, *v, *gate;
    const float *weight, *bias, *r_k;
    float eps;
    E* out;

    void run(const Work& work) const {
        const int64_t width = work.width;
        for_blocks(work, tokens * width, [&](int64_t block) {
            for (int64_t t = block * tile; t < std::min(block * tile + tile, tokens); ++t)
                for (int64_t c = 0; c < width; c += N) {
                    const int64_t n = t * width + c;
                    const Head head = head_of(y + n, r + n, k + n, r_k + c, eps);
                    for (int l = 0; l < N; l += LANES) {
                        const vec normal = (load(y + n + l) - head.mean) * head.rstd;
                        const vec z = normal * load(weight + c + l) + load(bias + c + l) + head.bonus * load(v + n + l);
                        store(out + n + l, z * load(gate + n + l));
                    }
                }
        });
    }
};

template <class E>
struct Wkv7OutputBackward {
    int64_t tokens, tile;
    const E *y, *r, *k, *v, *gate;
    const float *weight, *bias, *r_k;
    float eps;
    const E* dout;
    E *dy, *dr, *dk, *dv, *dgate;
    float* partial;

    void run(const Work& work) const {
        const int64_t width = work.width;
        for_blocks(work, 2 * tokens * width, [&](int64_t block) {
            float* sums = partial + block * 3 * width;  // of weight, bias, r_k
            std::fill(sums, sums + 3 * width, 0.0f);
            for (int64_t t = block * tile; t < std::min(block * tile + tile, tokens); ++t)
                for (int64_t c = 0; c < width; c += N) {
                    const int64_t n = t * width + c;
                    const Head head = head_of(y + n, r + n, k + n, r_k + c, eps);
                    vec total{}, product{}, with_value{};
                    for (int l = 0; l < N; l += LANES) {
                        const vec normal = (load(y + n + l) - head.mean) * head.rstd;
                        const vec dz = load(dout + n + l) * load(gate + n + l), g = dz * load(weight + c + l);
                        total += g;
                        product += g * normal;
                        with_value += dz * load(v + n + l);
                    }
                    const float a = sum(total) / N, b = sum(product) / N, dbonus = sum(with_value);
                    for (int l = 0; l < N; l += LANES) {
                        const vec normal = (load(y + n + l) - head.mean) * head.rstd;
                        const vec value = load(v + n + l), g = load(dout + n + l);
                        const vec z = normal * load(weight + c + l) + load(bias + c + l) + head.bonus * value;
                        const vec dz = g * load(gate + n + l);
                        const vec r_ = load(r + n + l), k_ = load(k + n + l), r_k_ = load(r_k + c + l);
                        store(dgate + n + l, g * z);
                        store(dy + n + l, (dz * load(weight + c + l) - a - normal * b) * head.rstd);
                        store(dr + n + l, dbonus * k_ * r_k_);
                        store(dk + n + l, dbonus * r_ * r_k_);
                        store(dv + n + l, head.bonus * dz);
                        add_to(sums + c + l, dz * normal);
                        add_to(sums + width + c + l, dz);
                        add_to(sums + 2 * width + c + l, dbonus * r_ * k_);
                    }
                }
        });
    }
};

// ---- ReLU² -----------------------------------------------------------------------------------------------------------

template <class E>
void relu_squared_forward(const Work& work, int64_t tokens, int64_t tile, const E* x, E* out) {
    for_blocks(work, tokens * work.width, [&](int64_t block) {
        const int64_t stop = std::min(block * tile + tile, tokens) * work.width;
        for (int64_t n = block * tile * work.width; n < stop; n += LANES) {
            const vec z = load(x + n), positive = select(z < 0.0f, vec{}, z);  // a NaN stays
            store(out + n, positive * positive);
        }
    });
}

template <class E>
void relu_squared_backward(const Work& work, int64_t tokens, int64_t tile, const E* x, E* gradient, E* out) {
    for_blocks(work, tokens * work.width, [&](int64_t block) {
        const int64_t stop = std::min(block * tile + tile, tokens) * work.width;
        for (int64_t n = block * tile * work.width; n < stop; n += LANES) {
            const vec z = load(x + n), positive = select(z < 0.0f, vec{}, z);
            store(gradient + n, 2.0f * positive * load(gradient + n));
            store(out + n, positive * positive);
        }
    });
}

// ---- the loss of a chunk of logits, and its gradient in their place --------------------------------------------------

constexpr float L2WRAP = 1e-4f;
constexpr int64_t IGNORED = -100;

// f(column, logits) along a row; the last vector is filled up with -inf and `finish`ed by a partial store.
template <class E, class F>
inline void along(E* row, int64_t width, bool write, const F& f) {
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
        const vec out = f(c, load(row + c));
        if (write) store(row + c, out);
    }
    if (c == width) return;
    E rest[LANES];
    store(rest, broadcast(-INFINITY));
    std::copy(row + c, row + width, rest);
    store(rest, f(c, load(rest)));
    if (write) std::copy(rest, rest + (width - c), row + c);
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, bf16& out) {
    bf16 all[LANES];
    store(all, broadcast(x));
    out = all[0];
}

// The first column with the largest logit, `top`.
template <class E>
int64_t column_of(const E* row, int64_t width, float top) {
    int64_t c = 0;
    for (; c + N <= width; c += N) {
        ivec found{};
        for (int l = 0; l < N; l += LANES) found |= load(row + c + l) == top;
        int any = 0;
        for (int l = 0; l < LANES; ++l) any |= found[l];
        if (any) break;
    }
    while (c + 1 < width && !(widen(row[c]) == top)) ++c;
    return c;
}

template <class E>
void cross_entropy(const Work& work, int64_t rows, int64_t gradient, E* logits, const int64_t* targets,
                   const float* scales, float* nll) {
    for_blocks(work, rows * work.width, [&](int64_t r) {
        E* row = logits + r * work.width;
        if (targets[r] == IGNORED) {
            nll[r] = 0;
            if (gradient) along(row, work.width, true, [](int64_t, vec) { return vec{}; });
            return;
        }
        vec largest = broadcast(-INFINITY);
        along(row, work.width, false, [&](int64_t, vec x) {
            largest = select(x > largest, x, largest);
            return x;
        });
        float top = -INFINITY;
        for (int l = 0; l < LANES; ++l) top = std::max(top, static_cast<float>(largest[l]));
        const float target = widen(row[targets[r]]);
        const int64_t top_index = gradient ? column_of(row, work.width, top) : 0;
        // A row of floats keeps the exponentials that it sums; narrower ones are computed again from the logits.
        const bool keeps = gradient && std::is_same_v<E, float>;
        const auto exponential = [&](vec x) { return select(x == -INFINITY, vec{}, exp(x - top)); };
        double total = 0;
        vec partial{};
        along(row, work.width, keeps, [&](int64_t c, vec x) {
            const vec e = exponential(x);
            partial += e;
            if (c % 1024 == 0) {
                total += sum(partial);
                partial = vec{};
            }
            return e;
        });
        total += sum(partial);
        nll[r] = static_cast<float>(std::log(total) + top - target);
        if (!gradient) return;
        const float scale = scales ? scales[r] : 1.0f, factor = static_cast<float>(scale / total);
        const float wrap = L2WRAP * scale * top;
        const auto probability = [&](vec x) { return (keeps ? x : exponential(x)) * factor; };
        const auto probability_at = [&](int64_t c) {
            return static_cast<float>(probability(broadcast(widen(row[c])))[0]);
        };
        const float at_target = probability_at(targets[r]) - scale + (targets[r] == top_index ? wrap : 0.0f);
        const float at_top = probability_at(top_index) + wrap;
        along(row, work.width, true, [&](int64_t, vec x) { return probability(x); });
        if (top_index != targets[r]) narrow(at_top, row[top_index]);
        narrow(at_target, row[targets[r]]);
    });
}

// ---- arguments, as layer.cu's kernels take them: integers and pointers -----------------------------------------------

struct Arguments {
    const int64_t* next;
    int64_t integer() { return *next++; }
    float real() { return bits<float>(static_cast<uint32_t>(*next++)); }
    template <class T>
    void pointer(T*& out) { out = reinterpret_cast<T*>(*next++); }
    Documents documents() {
        Documents d{integer(), integer(), integer(), nullptr};
        pointer(d.cu_seqlens);
        return d;
    }
};

template <class... T>
void pointers(Arguments& from, T*&... out) { (from.pointer(out), ...); }

template <int M, class R, class E>
void norm_mix_forward(const Work& work, Arguments from) {
    NormMixForward<M, R, E> op;
    op.d = from.documents();
    op.tile = from.integer();
    op.eps = from.real();
    pointers(from, op.x, op.branch, op.weight, op.bias, op.mixes, op.last, op.residual, op.stats, op.last_out);
    for (auto& p : op.mixed) from.pointer(p);
    op.run(work);
}

template <int M, class R, class E>
void norm_mix_backward(const Work& work, Arguments from) {
    NormMixBackward<M, R, E> op;
    op.d = from.documents();
    op.tile = from.integer();
    pointers(from, op.residual, op.stats, op.weight, op.bias, op.mixes, op.last, op.dresidual, op.dlast_out, op.dx,
             op.dbranch, op.dlast, op.partial);
    for (auto& p : op.dmixed) from.pointer(p);
    for (auto& p : op.mixed) from.pointer(p);
    op.run(work);
}

template <class E>
void wkv7_inputs_forward(const Work& work, Arguments from) {
    Wkv7InputsForward<E> op;
    op.tokens = from.integer();
    op.tile = from.integer();
    pointers(from, op.w, op.a, op.k, op.v, op.v_lora, op.v_first, op.w0, op.a0, op.k_k, op.k_a, op.v0, op.log_decay,
             op.k_out, op.v_out, op.removal, op.replacement);
    op.run(work);
}

template <class E>
void wkv7_inputs_backward(const Work& work, Arguments from) {
    Wkv7InputsBackward<E> op;
    op.tokens = from.integer();
    op.tile = from.integer();
    pointers(from, op.w, op.a, op.k, op.v, op.v_lora, op.v_first, op.w0, op.a0, op.k_k, op.k_a, op.v0, op.dlog_decay,
             op.dk_out, op.dv_out, op.dremoval, op.dreplacement, op.dw, op.da, op.dk, op.dv, op.dv_lora, op.dv_first,
             op.partial);
    op.run(work);
}

template <class E>
void wkv7_output_forward(const Work& work, Arguments from) {
    Wkv7OutputForward<E> op;
    op.tokens = from.integer();
    op.tile = from.integer();
    op.eps = from.real();
    pointers(from, op.y, op.r, op.k, op.v, op.gate, op.weight, op.bias, op.r_k, op.out);
    op.run(work);
}

template <class E>
void wkv7_output_backward(const Work& work, Arguments from) {
    Wkv7OutputBackward<E> op;
    op.tokens = from.integer();
    op.tile = from.integer();
    op.eps = from.real();
    pointers(from, op.y, op.r, op.k, op.v, op.gate, op.weight, op.bias, op.r_k, op.dout, op.dy, op.dr, op.dk, op.dv,
             op.dgate, op.partial);
    op.run(work);
}

}  // namespace

// One function for each kernel and types, called as name_R_E(work, arguments).
#define EXPORT(name, implementation)                                                            \
    extern "C" void name(const Work* work, const int64_t* arguments) {                          \
        implementation(*work, Arguments{arguments});                                            \
    }
#define EXPORT_NORM_MIX(direction, mixes, suffix, R, E) \
    EXPORT(norm_mix_##direction##_##mixes##_##suffix, (norm_mix_##direction<mixes, R, E>))
#define EXPORT_ALL_NORM_MIX(direction, mixes)                                \
    EXPORT_NORM_MIX(direction, mixes, float32_float32, float, float)         \
    EXPORT_NORM_MIX(direction, mixes, float32_bfloat16, float, bf16)         \
    EXPORT_NORM_MIX(direction, mixes, bfloat16_bfloat16, bf16, bf16)
EXPORT_ALL_NORM_MIX(forward, 1)
EXPORT_ALL_NORM_MIX(forward, 6)
EXPORT_ALL_NORM_MIX(backward, 1)
EXPORT_ALL_NORM_MIX(backward, 6)

#define EXPORT_BOTH(name)                      \
    EXPORT(name##_float32, (name<float>))      \
    EXPORT(name##_bfloat16, (name<bf16>))
EXPORT_BOTH(wkv7_inputs_forward)
EXPORT_BOTH(wkv7_inputs_backward)
EXPORT_BOTH(wkv7_output_forward)
EXPORT_BOTH(wkv7_output_backward)

#define EXPORT_REST(suffix, E)                                                                         \
    extern "C" void relu_squared_forward_##suffix(const Work* work, const int64_t* a) {                \
        Arguments from{a + 2};                                                                         \
        const E* x;                                                                                    \
        E* out;                                                                                        \
        pointers(from, x, out);                                                                        \
        relu_squared_forward(*work, a[0], a[1], x, out);                                               \
    }                                                                                                  \
    extern "C" void relu_squared_backward_##suffix(const Work* work, const int64_t* a) {               \
        Arguments from{a + 2};                                                                         \
        const E* x;                                                                                    \
        E *gradient, *out;                                                                             \
        pointers(from, x, gradient, out);                                                              \
        relu_squared_backward(*work, a[0], a[1], x, gradient, out);                                    \
    }                                                                                                  \
    extern "C" void cross_entropy_##suffix(const Work* work, const int64_t* a) {                       \
        Arguments from{a + 2};                                                                         \
        E* logits;                                                                                     \
        const int64_t* targets;                                                                        \
        const float* scales;                                                                           \
        float* nll;                                                                                    \
        pointers(from, logits, targets, scales, nll);                                                  \
        cross_entropy(*work, a[0], a[1], logits, targets, scales, nll);                                \
    }
EXPORT_REST(float32, float)
EXPORT_REST(bfloat16, bf16)

extern "C" void sum_blocks(const Work* work, const int64_t* a) {
    Arguments from{a + 2};
    const float* partial;
    float* out;
    pointers(from, partial, out);
    sum_blocks(*work, a[0], a[1], partial, out);
}
