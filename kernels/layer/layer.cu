// The element-wise parts of an RWKV-7 layer on the GPU, forward and backward, and the loss of a chunk of logits.
// ../../streaming_rwkv/ops/layer_reference.py defines what each computes, layer.cpp does the same on the CPU.
//
// A block takes a tile of consecutive tokens, a thread groups of four channels at a fixed stride; nothing but sums over
// a token's channels passes between threads. Sums over tokens (gradients of parameters) stay in registers until the tile
// ends and are written per tile; sum_blocks adds the tiles. No atomics, one order: bitwise the same in every run.
//
// Compiled once for each kernel, width and types, which come as macros: the kernel's name (NORM_MIX, …), WIDTH, MIXES,
// BFLOAT16 and RESIDUAL_BFLOAT16. NVRTC needs no header for it; a CPU runs it under tests/ops/cuda_on_cpu.h.

typedef long long int64;

#ifdef BFLOAT16
typedef unsigned short Element;
#else
typedef float Element;
#endif
#ifdef RESIDUAL_BFLOAT16
typedef unsigned short Residual;
#else
typedef float Residual;
#endif

struct alignas(16) Four {
    float at[4];
};
template <class T>
struct alignas(4 * sizeof(T)) Quad {
    T at[4];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(unsigned short x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, unsigned short& out) {  // to nearest, ties to even; a NaN stays a quiet NaN
    const unsigned u = __float_as_uint(x);
    out = static_cast<unsigned short>((x == x ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000) >> 16);
}

template <class T>
__device__ inline Four load(const T* p) {
    const Quad<T> x = *reinterpret_cast<const Quad<T>*>(p);
    return Four{{widen(x.at[0]), widen(x.at[1]), widen(x.at[2]), widen(x.at[3])}};
}

template <class T>
__device__ inline Four load_or_zero(const T* p, int64 offset) {
    return p ? load(p + offset) : Four{};
}

template <class T>
__device__ inline void store(T* p, const Four& x) {
    Quad<T> out;
#pragma unroll
    for (int e = 0; e < 4; ++e) narrow(x.at[e], out.at[e]);
    *reinterpret_cast<Quad<T>*>(p) = out;
}

struct Sigmoid {
    float value, complement;  // σ(x) and 1 - σ(x), each with all its digits
};
__device__ inline Sigmoid sigmoid(float x) {
    const float e = expf(x > 0 ? -x : x), larger = 1.0f / (1.0f + e), smaller = e * larger;
    return x > 0 ? Sigmoid{larger, smaller} : Sigmoid{smaller, larger};
}

// The sum over LANES neighbouring lanes, in all of them.
template <int LANES>
__device__ inline float sum_lanes(float x) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffff, x, mask);
    return x;
}

#ifdef WIDTH
constexpr int QUADS = (WIDTH + 3) / 4;
constexpr int TURNS = (QUADS + 511) / 512;  // groups of four channels that a thread has
constexpr int THREADS = ((QUADS + TURNS - 1) / TURNS + 31) / 32 * 32;
constexpr int WARPS = THREADS / 32;

// This thread's channels; past the width in the last turn of some.
__device__ inline int channel(int turn) { return (threadIdx.x + turn * THREADS) * 4; }
__device__ inline bool has(int turn) { return channel(turn) < WIDTH; }
#endif

// ---- residual + LayerNorm + token shift + mixes ----------------------------------------------------------------------
#ifdef NORM_MIX

#if MIXES == 6
#define EACH(type, name) type name##0, type name##1, type name##2, type name##3, type name##4, type name##5
#define ALL(name) {name##0, name##1, name##2, name##3, name##4, name##5}
#else
#define EACH(type, name) type name##0
#define ALL(name) {name##0}
#endif

// Rows of `row` tokens, each a document, or documents in one row, cu_seqlens[n] to cu_seqlens[n + 1], then padding.
struct DocumentsOf {
    int64 row, documents;
    const int* cu_seqlens;
    int64 at;  // the last boundary that is not after the token

    // `at` for token t, from anywhere.
    __device__ void find(int64 tokens, int64 t) {
        if (!cu_seqlens) return;
        if (cu_seqlens[0] != 0 || cu_seqlens[documents] > tokens) __trap();  // rather than read where nothing is ours
        int64 low = 0, high = documents;
        while (low < high) {
            const int64 middle = (low + high + 1) / 2;
            if (cu_seqlens[middle] <= t)
                low = middle;
            else
                high = middle - 1;
        }
        at = low;
    }
    __device__ void next_to(int64 t) {
        if (cu_seqlens) {
            while (at < documents && cu_seqlens[at + 1] <= t) ++at;
            while (at > 0 && cu_seqlens[at] > t) --at;
        }
    }
    __device__ bool starts(int64 t) const { return cu_seqlens ? cu_seqlens[at] == t : t % row == 0; }
    __device__ bool padding() const { return cu_seqlens && at == documents; }
    __device__ bool ends_row(int64 t) const { return (t + 1) % row == 0; }
};

// The sum over a block in every thread. `slot` alternates from call to call: who is ahead writes what nobody reads.
template <int COUNT>
__device__ inline void sum_block(float (*slot)[WARPS], float (&x)[COUNT]) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
        x[n] = sum_lanes<32>(x[n]);
        if (threadIdx.x % 32 == 0) slot[n][threadIdx.x / 32] = x[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
        x[n] = 0;
        for (int warp = 0; warp < WARPS; ++warp) x[n] += slot[n][warp];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    norm_mix_forward(int64 tokens, int64 row, int64 documents, const int* cu_seqlens, int64 tile, int64 eps_bits,
                     const Residual* x, const Element* branch, const float* weight, const float* bias,
                     const float* mixes, const float* last, Residual* residual, float* stats, float* last_out,
                     EACH(Element*, mixed)) {
    __shared__ float slots[2][1][WARPS];
    Element* const mixed[MIXES] = ALL(mixed);
    const float eps = __uint_as_float(static_cast<unsigned>(eps_bits));
    const int64 first = blockIdx.x * tile, stop = first + tile < tokens ? first + tile : tokens;
    DocumentsOf documents_of{row, documents, cu_seqlens, 0};
    documents_of.find(tokens, first);
    Four u[TURNS], previous[TURNS];
    // The token before the tile is normalized again, unless a document starts with the tile.
    const int64 begin = documents_of.padding() || documents_of.starts(first) ? first : first - 1;
    for (int64 t = begin; t < stop; ++t) {
        const bool ours = t >= first;
        if (ours) documents_of.next_to(t);
        if (ours && documents_of.padding()) {
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                if (!has(turn)) continue;
                if (branch) store(residual + t * WIDTH + channel(turn), Four{});
#pragma unroll
                for (int m = 0; m < MIXES; ++m) store(mixed[m] + t * WIDTH + channel(turn), Four{});
            }
            if (threadIdx.x == 0) stats[2 * t] = stats[2 * t + 1] = 0;
            continue;
        }
        float total[1] = {}, squares[1] = {};
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (!has(turn)) continue;
            const int64 n = t * WIDTH + channel(turn);
            Four z = load(x + n);
            if (branch) {
                const Four added = load(branch + n);
                Quad<Residual> stored;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    narrow(z.at[e] + added.at[e], stored.at[e]);
                    z.at[e] = widen(stored.at[e]);
                }
                if (ours) *reinterpret_cast<Quad<Residual>*>(residual + n) = stored;
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) total[0] += z.at[e];
            u[turn] = z;
        }
        sum_block<1>(slots[0], total);
        const float mean = total[0] / WIDTH;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (!has(turn)) continue;
#pragma unroll
            for (int e = 0; e < 4; ++e) squares[0] += (u[turn].at[e] - mean) * (u[turn].at[e] - mean);
        }
        sum_block<1>(slots[1], squares);
        const float rstd = 1.0f / sqrtf(squares[0] / WIDTH + eps);
        if (ours && threadIdx.x == 0) {
            stats[2 * t] = mean;
            stats[2 * t + 1] = rstd;
        }
        const bool starts = ours && documents_of.starts(t);
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (!has(turn)) continue;
            const int c = channel(turn);
            const Four scale = load(weight + c), shift = load(bias + c);
#pragma unroll
            for (int e = 0; e < 4; ++e) u[turn].at[e] = (u[turn].at[e] - mean) * rstd * scale.at[e] + shift.at[e];
            if (ours) {
                if (starts) previous[turn] = load_or_zero(last, t / row * WIDTH + c);
#pragma unroll
                for (int m = 0; m < MIXES; ++m) {
                    const Four mix = load(mixes + m * WIDTH + c);
                    Four out;
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        out.at[e] = u[turn].at[e] + (previous[turn].at[e] - u[turn].at[e]) * mix.at[e];
                    store(mixed[m] + t * WIDTH + c, out);
                }
                if (last_out && documents_of.ends_row(t)) store(last_out + t / row * WIDTH + c, u[turn]);
            }
            previous[turn] = u[turn];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    norm_mix_backward(int64 tokens, int64 row, int64 documents, const int* cu_seqlens, int64 tile,
                      const Residual* residual, const float* stats, const float* weight, const float* bias,
                      const float* mixes, const float* last, const Residual* dresidual, const float* dlast_out,
                      Residual* dx, Element* dbranch, float* dlast, float* partial, EACH(const Element*, dmixed),
                      EACH(Element*, mixed)) {
    __shared__ float slots[2][2][WARPS];
    const Element* const dmixed[MIXES] = ALL(dmixed);
    Element* const mixed[MIXES] = ALL(mixed);
    const int64 first = blockIdx.x * tile, stop = first + tile < tokens ? first + tile : tokens;
    DocumentsOf documents_of{row, documents, cu_seqlens, 0};
    Four to_previous[TURNS], sums[2 + MIXES][TURNS] = {};  // of weight, bias, mixes
    bool later = false;  // the token after is of this document
    int slot = 0;
    if (stop < tokens) {
        documents_of.find(tokens, stop);
        later = !documents_of.padding() && !documents_of.starts(stop);
    } else {
        documents_of.find(tokens, stop - 1);
    }
    const bool crosses = later;
    for (int64 t = stop - 1; t >= first; --t) {
        documents_of.next_to(t);
        if (documents_of.padding()) {
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                if (!has(turn)) continue;
                const int64 n = t * WIDTH + channel(turn);
                store(dx + n, Four{});
                if (dbranch) store(dbranch + n, Four{});
#pragma unroll
                for (int m = 0; m < MIXES; ++m) store(mixed[m] + n, Four{});
            }
            continue;
        }
        const bool starts = documents_of.starts(t), ends_row = documents_of.ends_row(t);
        const float mean = stats[2 * t], rstd = stats[2 * t + 1];
        const float mean_before = starts ? 0 : stats[2 * t - 2], rstd_before = starts ? 0 : stats[2 * t - 1];
        float both[2] = {};
        Four du[TURNS];
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (!has(turn)) continue;
            const int c = channel(turn);
            const int64 n = t * WIDTH + c;
            const Four scale = load(weight + c), shift = load(bias + c);
            const Four z = load(residual + n);
            if (!later) to_previous[turn] = Four{};
            if (t == stop - 1 && crosses) {
                to_previous[turn] = Four{};
#pragma unroll
                for (int m = 0; m < MIXES; ++m) {
                    const Four dm = load(dmixed[m] + n + WIDTH), mix = load(mixes + m * WIDTH + c);
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        to_previous[turn].at[e] = fmaf(dm.at[e], mix.at[e], to_previous[turn].at[e]);
                }
            }
            Four delta, normal;
            if (starts)
                delta = load_or_zero(last, t / row * WIDTH + c);
            else
                delta = load(residual + n - WIDTH);
            du[turn] = to_previous[turn];
            to_previous[turn] = Four{};
            if (dlast_out && ends_row) {
                const Four from_end = load(dlast_out + t / row * WIDTH + c);
#pragma unroll
                for (int e = 0; e < 4; ++e) du[turn].at[e] += from_end.at[e];
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                normal.at[e] = (z.at[e] - mean) * rstd;
                if (!starts)
                    delta.at[e] = (delta.at[e] - mean_before) * rstd_before * scale.at[e] + shift.at[e];
                delta.at[e] -= normal.at[e] * scale.at[e] + shift.at[e];
            }
#pragma unroll
            for (int m = 0; m < MIXES; ++m) {
                const Four mix = load(mixes + m * WIDTH + c), dm = load(dmixed[m] + n);
                Four out;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    du[turn].at[e] += fmaf(-dm.at[e], mix.at[e], dm.at[e]);
                    // fmaf, here and above: where a tile ends must not decide how this rounds.
                    to_previous[turn].at[e] = fmaf(dm.at[e], mix.at[e], to_previous[turn].at[e]);
                    sums[2 + m][turn].at[e] += dm.at[e] * delta.at[e];
                    out.at[e] = normal.at[e] * scale.at[e] + shift.at[e] + delta.at[e] * mix.at[e];
                }
                store(mixed[m] + n, out);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sums[0][turn].at[e] += du[turn].at[e] * normal.at[e];
                sums[1][turn].at[e] += du[turn].at[e];
                du[turn].at[e] *= scale.at[e];
                both[0] += du[turn].at[e];
                both[1] += du[turn].at[e] * normal.at[e];
            }
            if (starts && dlast) store(dlast + t / row * WIDTH + c, to_previous[turn]);
        }
        sum_block<2>(slots[slot ^= 1], both);
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (!has(turn)) continue;
            const int64 n = t * WIDTH + channel(turn);
            const Four z = load(residual + n);
            Four out = load_or_zero(dresidual, n);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float normal = (z.at[e] - mean) * rstd;
                out.at[e] += (du[turn].at[e] - both[0] / WIDTH - normal * (both[1] / WIDTH)) * rstd;
            }
            store(dx + n, out);
            if (dbranch) store(dbranch + n, out);
        }
        later = !starts;
    }
#pragma unroll
    for (int p = 0; p < 2 + MIXES; ++p)
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn)
            if (has(turn))
                store(partial + (static_cast<int64>(blockIdx.x) * (2 + MIXES) + p) * WIDTH + channel(turn), sums[p][turn]);
}
#endif

// ---- what WKV-7 gets, from the projections ---------------------------------------------------------------------------
// A head of 64 channels is half a warp.
#if defined(WKV7_INPUTS) || defined(WKV7_OUTPUT)
static_assert(WIDTH % 64 == 0, "whole heads");
constexpr int HEAD_LANES = 16;
constexpr float HEAD = 64;
#endif

#ifdef WKV7_INPUTS
constexpr float DECAY_SCALE = 0.606530659712633423604f;  // exp(-1/2)
constexpr float NORM_EPS = 1e-12f;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    wkv7_inputs_forward(int64 tokens, int64 tile, const Element* w, const Element* a, const Element* k,
                        const Element* v, const Element* v_lora, const Element* v_first, const float* w0,
                        const float* a0, const float* k_k, const float* k_a, const float* v0, Element* log_decay,
                        Element* k_out, Element* v_out, Element* removal, Element* replacement) {
    const int64 first = blockIdx.x * tile, stop = first + tile < tokens ? first + tile : tokens;
    for (int64 t = first; t < stop; ++t)
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int c = has(turn) ? channel(turn) : 0;  // all lanes take part in the sum
            const int64 n = t * WIDTH + c;
            const Four key = load(k + n), k_k_c = load(k_k + c);
            float squares = 0;
#pragma unroll
            for (int e = 0; e < 4; ++e) squares += key.at[e] * k_k_c.at[e] * (key.at[e] * k_k_c.at[e]);
            const float scale = 1.0f / fmaxf(sqrtf(sum_lanes<HEAD_LANES>(squares)), NORM_EPS);
            if (!has(turn)) continue;
            const Four w_n = load(w + n), a_n = load(a + n), w0_c = load(w0 + c), a0_c = load(a0 + c);
            const Four k_a_c = load(k_a + c);
            Four decays, keys, removals, replacements;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Sigmoid share = sigmoid(a0_c.at[e] + a_n.at[e]);
                const float normal = key.at[e] * k_k_c.at[e] * scale;
                decays.at[e] = -DECAY_SCALE * sigmoid(w0_c.at[e] + w_n.at[e]).value;
                keys.at[e] = key.at[e] - key.at[e] * share.complement * k_a_c.at[e];
                removals.at[e] = -normal;
                replacements.at[e] = normal * share.value;
            }
            store(log_decay + n, decays);
            store(k_out + n, keys);
            store(removal + n, removals);
            store(replacement + n, replacements);
            if (!v_first) continue;
            const Four value = load(v + n), lora = load(v_lora + n), other = load(v_first + n), v0_c = load(v0 + c);
            Four values;
#pragma unroll
            for (int e = 0; e < 4; ++e)
                values.at[e] =
                    value.at[e] + (other.at[e] - value.at[e]) * sigmoid(v0_c.at[e] + lora.at[e]).value;
            store(v_out + n, values);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    wkv7_inputs_backward(int64 tokens, int64 tile, const Element* w, const Element* a, const Element* k,
                         const Element* v, const Element* v_lora, const Element* v_first, const float* w0,
                         const float* a0, const float* k_k, const float* k_a, const float* v0,
                         const Element* dlog_decay, const Element* dk_out, const Element* dv_out,
                         const Element* dremoval, const Element* dreplacement, Element* dw, Element* da, Element* dk,
                         Element* dv, Element* dv_lora, Element* dv_first, float* partial) {
    const int64 first = blockIdx.x * tile, stop = first + tile < tokens ? first + tile : tokens;
    Four sums[5][TURNS] = {};  // of w0, a0, k_k, k_a, v0
    for (int64 t = first; t < stop; ++t)
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int c = has(turn) ? channel(turn) : 0;
            const int64 n = t * WIDTH + c;
            const Four key = load(k + n), k_k_c = load(k_k + c), a_n = load(a + n), a0_c = load(a0 + c);
            const Four g_removal = load(dremoval + n), g_replacement = load(dreplacement + n);
            float squares = 0, product = 0;
            Sigmoid share[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                share[e] = sigmoid(a0_c.at[e] + a_n.at[e]);
                const float q = key.at[e] * k_k_c.at[e];
                squares += q * q;
                product += q * (g_replacement.at[e] * share[e].value - g_removal.at[e]);
            }
            const float norm = sqrtf(sum_lanes<HEAD_LANES>(squares)), scale = 1.0f / fmaxf(norm, NORM_EPS);
            product = sum_lanes<HEAD_LANES>(product);
            // The normal's part in its own gradient; below the bound the divisor is a constant.
            const float own = norm > NORM_EPS ? product * scale * scale : 0.0f;
            if (!has(turn)) continue;
            const Four w_n = load(w + n), w0_c = load(w0 + c), k_a_c = load(k_a + c);
            const Four g_decay_out = load(dlog_decay + n), g_key = load(dk_out + n);
            Four g_w, g_a, g_k;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Sigmoid decay = sigmoid(w0_c.at[e] + w_n.at[e]);
                const float q = key.at[e] * k_k_c.at[e];
                const float g_q =
                    (g_replacement.at[e] * share[e].value - g_removal.at[e] - q * own) * scale;
                g_w.at[e] = g_decay_out.at[e] * -DECAY_SCALE * decay.value * decay.complement;
                g_a.at[e] = (g_replacement.at[e] * q * scale + g_key.at[e] * key.at[e] * k_a_c.at[e]) *
                            share[e].value * share[e].complement;
                g_k.at[e] = g_q * k_k_c.at[e] + g_key.at[e] - g_key.at[e] * share[e].complement * k_a_c.at[e];
                sums[0][turn].at[e] += g_w.at[e];
                sums[1][turn].at[e] += g_a.at[e];
                sums[2][turn].at[e] += g_q * key.at[e];
                sums[3][turn].at[e] -= g_key.at[e] * key.at[e] * share[e].complement;
            }
            store(dw + n, g_w);
            store(da + n, g_a);
            store(dk + n, g_k);
            if (!v_first) continue;
            const Four value = load(v + n), lora = load(v_lora + n), other = load(v_first + n), v0_c = load(v0 + c);
            const Four g_value = load(dv_out + n);
            Four g_v, g_first, g_lora;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Sigmoid residual = sigmoid(v0_c.at[e] + lora.at[e]);
                g_v.at[e] = g_value.at[e] * residual.complement;
                g_first.at[e] = g_value.at[e] * residual.value;
                g_lora.at[e] =
                    g_value.at[e] * (other.at[e] - value.at[e]) * residual.value * residual.complement;
                sums[4][turn].at[e] += g_lora.at[e];
            }
            store(dv + n, g_v);
            store(dv_first + n, g_first);
            store(dv_lora + n, g_lora);
        }
    const int vectors = v_first ? 5 : 4;
#pragma unroll
    for (int p = 0; p < 5; ++p)
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn)
            if (has(turn) && p < vectors)
                store(partial + (static_cast<int64>(blockIdx.x) * vectors + p) * WIDTH + channel(turn), sums[p][turn]);
}
#endif

// ---- GroupNorm + bonus + gate ----------------------------------------------------------------------------------------
#ifdef WKV7_OUTPUT

struct HeadOf {
    float mean, rstd, bonus;
};

__device__ inline HeadOf head_of(const Four& y, const Four& r, const Four& k, const Four& r_k, float eps) {
    float total = 0, squares = 0, bonus = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        total += y.at[e];
        bonus += r.at[e] * k.at[e] * r_k.at[e];
    }
    HeadOf head;
    head.mean = sum_lanes<HEAD_LANES>(total) / HEAD;
    head.bonus = sum_lanes<HEAD_LANES>(bonus);
#pragma unroll
    for (int e = 0; e < 4; ++e) squares += (y.at[e] - head.mean) * (y.at[e] - head.mean);
    head.rstd = 1.0f / sqrtf(sum_lanes<HEAD_LANES>(squares) / HEAD + eps);
    return head;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    wkv7_output_forward(int64 tokens, int64 tile, int64 eps_bits, const Element* y, const Element* r, const Element* k,
                        const Element* v, const Element* gate, const float* weight, const float* bias,
                        const float* r_k, Element* out) {
    const float eps = __uint_as_float(static_cast<unsigned>(eps_bits));
    const int64 first = blockIdx.x * tile, stop = first + tile < tokens ? first + tile : tokens;
    for (int64 t = first; t < stop; ++t)
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int c = has(turn) ? channel(turn) : 0;
            const int64 n = t * WIDTH + c;
            const Four y_n = load(y + n);
            const HeadOf head = head_of(y_n, load(r + n), load(k + n), load(r_k + c), eps);
            if (!has(turn)) continue;
            const Four value = load(v + n), gate_n = load(gate + n), scale = load(weight + c), shift = load(bias + c);
            Four z;
#pragma unroll
            for (int e = 0; e < 4; ++e)
                z.at[e] = ((y_n.at[e] - head.mean) * head.rstd * scale.at[e] + shift.at[e] + head.bonus * value.at[e]) *
                          gate_n.at[e];
            store(out + n, z);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    wkv7_output_backward(int64 tokens, int64 tile, int64 eps_bits, const Element* y, const Element* r,
                         const Element* k, const Element* v, const Element* gate, const float* weight,
                         const float* bias, const float* r_k, const Element* dout, Element* dy, Element* dr,
                         Element* dk, Element* dv, Element* dgate, float* partial) {
    const float eps = __uint_as_float(static_cast<unsigned>(eps_bits));
    const int64 first = blockIdx.x * tile, stop = first + tile < tokens ? first + tile : tokens;
    Four sums[3][TURNS] = {};  // of weight, bias, r_k
    for (int64 t = first; t < stop; ++t)
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int c = has(turn) ? channel(turn) : 0;
            const int64 n = t * WIDTH + c;
            const Four y_n = load(y + n), r_n = load(r + n), k_n = load(k + n), r_k_c = load(r_k + c);
            const Four value = load(v + n), gate_n = load(gate + n), scale = load(weight + c), g = load(dout + n);
            const HeadOf head = head_of(y_n, r_n, k_n, r_k_c, eps);
            float total = 0, product = 0, with_value = 0;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float dz = g.at[e] * gate_n.at[e], dnormal = dz * scale.at[e];
                total += dnormal;
                product += dnormal * ((y_n.at[e] - head.mean) * head.rstd);
                with_value += dz * value.at[e];
            }
            total = sum_lanes<HEAD_LANES>(total) / HEAD;
            product = sum_lanes<HEAD_LANES>(product) / HEAD;
            const float dbonus = sum_lanes<HEAD_LANES>(with_value);
            if (!has(turn)) continue;
            const Four shift = load(bias + c);
            Four g_y, g_r, g_k, g_v, g_gate;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float normal = (y_n.at[e] - head.mean) * head.rstd, dz = g.at[e] * gate_n.at[e];
                g_gate.at[e] = g.at[e] * (normal * scale.at[e] + shift.at[e] + head.bonus * value.at[e]);
                g_y.at[e] = (dz * scale.at[e] - total - normal * product) * head.rstd;
                g_r.at[e] = dbonus * k_n.at[e] * r_k_c.at[e];
                g_k.at[e] = dbonus * r_n.at[e] * r_k_c.at[e];
                g_v.at[e] = head.bonus * dz;
                sums[0][turn].at[e] += dz * normal;
                sums[1][turn].at[e] += dz;
                sums[2][turn].at[e] += dbonus * r_n.at[e] * k_n.at[e];
            }
            store(dy + n, g_y);
            store(dr + n, g_r);
            store(dk + n, g_k);
            store(dv + n, g_v);
            store(dgate + n, g_gate);
        }
#pragma unroll
    for (int p = 0; p < 3; ++p)
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn)
            if (has(turn))
                store(partial + (static_cast<int64>(blockIdx.x) * 3 + p) * WIDTH + channel(turn), sums[p][turn]);
}
#endif

// ---- ReLU² -----------------------------------------------------------------------------------------------------------
#ifdef RELU_SQUARED

__device__ inline float positive(float x) { return x < 0 ? 0.0f : x; }  // a NaN stays

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    relu_squared_forward(int64 tokens, int64 tile, const Element* x, Element* out) {
    const int64 first = blockIdx.x * tile, stop = first + tile < tokens ? first + tile : tokens;
    for (int64 t = first; t < stop; ++t)
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (!has(turn)) continue;
            const int64 n = t * WIDTH + channel(turn);
            Four z = load(x + n);
#pragma unroll
            for (int e = 0; e < 4; ++e) z.at[e] = positive(z.at[e]) * positive(z.at[e]);
            store(out + n, z);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    relu_squared_backward(int64 tokens, int64 tile, const Element* x, Element* gradients, Element* out) {
    const int64 first = blockIdx.x * tile, stop = first + tile < tokens ? first + tile : tokens;
    for (int64 t = first; t < stop; ++t)
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            if (!has(turn)) continue;
            const int64 n = t * WIDTH + channel(turn);
            const Four z = load(x + n), g = load(gradients + n);
            Four gradient, squared;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                gradient.at[e] = 2 * positive(z.at[e]) * g.at[e];
                squared.at[e] = positive(z.at[e]) * positive(z.at[e]);
            }
            store(gradients + n, gradient);
            store(out + n, squared);
        }
}
#endif

// ---- the loss of a chunk of logits, and its gradient in their place --------------------------------------------------
#ifdef CROSS_ENTROPY

#define INFINITE __uint_as_float(0x7f800000)
constexpr float L2WRAP = 1e-4f;
constexpr int64 IGNORED = -100;
constexpr int STEP = WIDTH % 4 == 0 ? 4 : 1;  // columns at a time: other rows begin anywhere

__device__ inline Four load_columns(const Element* p) {
    if constexpr (STEP == 4) return load(p);
    return Four{{widen(*p), -INFINITE, -INFINITE, -INFINITE}};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    cross_entropy(int64 rows, int64 gradient, Element* logits, const int64* targets, const float* scales, float* nll) {
    __shared__ float largest[WARPS], places[WARPS], totals[WARPS];
    const int64 index = blockIdx.x, target = targets[index];
    Element* row = logits + index * WIDTH;
    if (target == IGNORED) {
        if (threadIdx.x == 0) nll[index] = 0;
        for (int c = threadIdx.x * STEP; gradient && c < WIDTH; c += THREADS * STEP)
#pragma unroll
            for (int e = 0; e < STEP; ++e) narrow(0.0f, row[c + e]);
        return;
    }
    if (target < 0 || target >= WIDTH) __trap();
    const float target_logit = widen(row[target]);
    // The largest logit, the first place of it, and the sum of exponentials below it, in one pass.
    float top = -INFINITE, place = 0, total = 0;
    for (int c = threadIdx.x * STEP; c < WIDTH; c += THREADS * STEP) {
        const Four x = load_columns(row + c);
        const float before = top;
#pragma unroll
        for (int e = 0; e < STEP; ++e)
            if (x.at[e] > top) {
                top = x.at[e];
                place = static_cast<float>(c + e);
            }
        if (top > before) total *= expf(before - top);
#pragma unroll
        for (int e = 0; e < STEP; ++e) total += x.at[e] == -INFINITE ? 0.0f : expf(x.at[e] - top);
    }
    const float own_top = top;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        const float other = __shfl_xor_sync(0xffffffff, top, mask), at = __shfl_xor_sync(0xffffffff, place, mask);
        if (other > top || (other == top && at < place)) {
            top = other;
            place = at;
        }
    }
    if (threadIdx.x % 32 == 0) {
        largest[threadIdx.x / 32] = top;
        places[threadIdx.x / 32] = place;
    }
    __syncthreads();
    for (int warp = 0; warp < WARPS; ++warp)
        if (largest[warp] > top || (largest[warp] == top && places[warp] < place)) {
            top = largest[warp];
            place = places[warp];
        }
    total = sum_lanes<32>(own_top == -INFINITE ? total : total * expf(own_top - top));
    if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = total;
    __syncthreads();
    total = 0;
    for (int warp = 0; warp < WARPS; ++warp) total += totals[warp];
    if (threadIdx.x == 0) nll[index] = logf(total) + top - target_logit;
    if (!gradient) return;
    const float scale = scales ? scales[index] : 1.0f, factor = scale / total, wrap = L2WRAP * scale * top;
    for (int c = threadIdx.x * STEP; c < WIDTH; c += THREADS * STEP) {
        const Four x = load_columns(row + c);
        Four out;
#pragma unroll
        for (int e = 0; e < STEP; ++e) {
            out.at[e] = x.at[e] == -INFINITE ? 0.0f : expf(x.at[e] - top) * factor;
            if (c + e == target) out.at[e] -= scale;
            if (c + e == static_cast<int>(place)) out.at[e] += wrap;
        }
        if constexpr (STEP == 4)
            store(row + c, out);
        else
            narrow(out.at[0], row[c]);
    }
}
#endif

// ---- sums over tiles -------------------------------------------------------------------------------------------------
#ifdef SUM_BLOCKS

constexpr int COLUMNS = 64, GROUPS = 8;

// out[column] = Σ partial[tile][column]: groups take turns with the tiles, then their sums are added in order.
extern "C" __global__ void __launch_bounds__(COLUMNS* GROUPS)
    sum_blocks(int64 tiles, int64 columns, const float* partial, float* out) {
    __shared__ float sums[GROUPS][COLUMNS];
    const int group = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
    const int64 at = static_cast<int64>(blockIdx.x) * COLUMNS + column;
    float total = 0;
    for (int64 tile = group; at < columns && tile < tiles; tile += GROUPS) total += partial[tile * columns + at];
    sums[group][column] = total;
    __syncthreads();
    if (group != 0 || at >= columns) return;
    for (int other = 1; other < GROUPS; ++other) total += sums[other][column];
    out[at] = total;
}
#endif
