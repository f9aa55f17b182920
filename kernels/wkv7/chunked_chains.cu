// WKV-7 in chunks: the two passes that follow a document from chunk to chunk. `forward` computes y and the states; its
// twin `backward` computes the gradients of the states, and leaves the inputs' gradients to chunked_gradients.cu. Both
// save a state every 32 tokens for that.
//
// Three shapes of a launch, for many chains and for few. They give the same bits.
//
//     wide      2 warps of 32 value rows, groups of 2 chunks. Each warp prepares a chunk, then takes its rows through both.
//     narrow    4 warps of 16 value rows, groups of 4 chunks, in the same way.
//     split     2 or 4 blocks share a chain's value rows. Warps of 16 rows go through one group of 3 chunks, while 3
//               others prepare the next.

#include "chunk.h"

// A pass takes ROW_WARPS · TILES · 16 value rows per block through groups of CHUNKS chunks.
template <bool FORWARD_, int TILES_, int ROW_WARPS_, int CHUNKS_, bool OVERLAP_>
struct Shape {
    static constexpr bool FORWARD = FORWARD_;    // else backward
    static constexpr int TILES = TILES_;         // of 16 value rows, per warp
    static constexpr int ROW_WARPS = ROW_WARPS_;
    static constexpr int CHUNKS = CHUNKS_;       // per group; as many warps prepare them
    static constexpr bool OVERLAP = OVERLAP_;    // other warps prepare than those that have rows
    static constexpr int PARTS = VALUE_TILES / (TILES * ROW_WARPS);  // blocks per chain
    static constexpr int WARPS = OVERLAP ? ROW_WARPS + CHUNKS : CHUNKS;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int COPY_THREADS = WARPS < 4 ? 64 : 128;
    static constexpr int STAGES = OVERLAP ? 3 : 2;        // groups in shared memory
    static constexpr int SMALL_STAGES = OVERLAP ? 2 : 1;  // those of them that are prepared
    static constexpr int TENSORS = FORWARD ? 6 : 5;
    static constexpr Address CHUNK_BYTES = TENSORS * TILE;
    static constexpr Address GROUP_BYTES = CHUNKS * CHUNK_BYTES;
    static constexpr Address SMALL_BASE = STAGES * GROUP_BYTES;
    static constexpr Address BYTES = SMALL_BASE + SMALL_STAGES * CHUNKS * SMALL;
    static_assert(OVERLAP || ROW_WARPS == CHUNKS, "all warps prepare, all have rows");
};

template <bool FORWARD>
using Wide = Shape<FORWARD, 2, 2, 2, false>;
template <bool FORWARD>
using Narrow = Shape<FORWARD, 1, 4, 4, false>;
template <bool FORWARD>
using SplitInTwo = Shape<FORWARD, 1, 2, 3, true>;
template <bool FORWARD>
using SplitInFour = Shape<FORWARD, 1, 1, 3, true>;

struct Chain {
    int64 heads, head, part;
    Document document;
    const unsigned short* inputs[6];  // in the order of a chunk's tiles
    unsigned short* y;                // forward only
    unsigned short* states;           // or null: nothing is saved
    int* scales;
    __device__ int64 chunks() const { return (document.stop - document.start + CHUNK - 1) / CHUNK; }
};

// Begins to copy a group's rows; those past the document become zeros.
template <class S>
__device__ inline void copy_group(const Chain& chain, int64 group, Address to) {
    constexpr int SEGMENTS = N * 2 / 16, ROWS = S::COPY_THREADS / SEGMENTS;  // at a time
    const int row = threadIdx.x / SEGMENTS, segment = threadIdx.x % SEGMENTS;
    // A block needs only the columns of its rows of the last tensor, V or dY.
    const bool rows_of_this_part = segment / (SEGMENTS / S::PARTS) == chain.part;
    const int64 first = chain.document.start + group * S::CHUNKS * CHUNK + row;
    const int64 safe = (chain.document.start * chain.heads + chain.head) * N;
    int64 offset = (first * chain.heads + chain.head) * N + segment * 8;
    const Address tile = to + in_tile(row, segment);
    static_assert(ROWS == 8 || ROWS == 16, "rows at the same place in their tiles");
    if (S::COPY_THREADS == S::THREADS || threadIdx.x < S::COPY_THREADS)
#pragma unroll
        for (int n = 0; n < S::CHUNKS * CHUNK; n += ROWS) {
            const bool inside = first + n < chain.document.stop;
            const int64 from = inside ? offset : safe;
            const Address to_row = tile + n / CHUNK * S::CHUNK_BYTES + n % CHUNK * 128;
#pragma unroll
            for (int tensor = 0; tensor < S::TENSORS - 1; ++tensor)
                copy_async(to_row + tensor * TILE, chain.inputs[tensor] + from, inside);
            if (rows_of_this_part)
                copy_async(to_row + (S::TENSORS - 1) * TILE, chain.inputs[S::TENSORS - 1] + from, inside);
            offset += ROWS * chain.heads * N;
        }
    commit_copies();
}

template <class S>
__device__ inline void prepare_chunk(const Chain& chain, int64 group, int chunk, Address tiles, Address small) {
    if (group * S::CHUNKS + chunk >= chain.chunks()) return;
    const Address at = tiles + chunk * S::CHUNK_BYTES;
    prepare<S::FORWARD, S::FORWARD>(at, small + chunk * SMALL, at + W);
}

// A warp's rows through a group.
template <class S>
__device__ inline void follow(Rows (&s)[S::TILES], const Chain& chain, int64 group, int first_tile, Address tiles,
                              Address small) {
    const int64 chunks = chain.chunks();
#pragma unroll 1
    for (int n = 0; n < S::CHUNKS; ++n) {
        const int at = S::FORWARD ? n : S::CHUNKS - 1 - n;
        const int64 chunk = group * S::CHUNKS + at;
        if (chunk >= chunks) continue;
        const Address tile = tiles + at * S::CHUNK_BYTES, own = small + at * SMALL;
        constexpr int EVERY = SAVED_EVERY / CHUNK;
        const bool save = chain.states && (S::FORWARD ? chunk % EVERY == 0 : chunk % EVERY == EVERY - 1 || chunk == chunks - 1);
        const int64 slot = chain.document.start / SAVED_EVERY + chain.document.index + chunk / EVERY;
        const auto saved = [=](int i) {
            return saved_rows(chain.states, chain.scales, slot, chain.heads, chain.head, first_tile + i);
        };
        if constexpr (S::FORWARD) {
            ForwardChunk x[S::TILES];
#pragma unroll
            for (int i = 0; i < S::TILES; ++i) {
                begin_forward(x[i], s[i], tile, own, first_tile + i);
                if (save) save_rows(saved(i), x[i].state, x[i].scale);
            }
            forward_chunk<S::TILES, true>(x, s, tile, own);
            const int scale_r = static_cast<int>(load_word(own + EXPONENTS));
#pragma unroll
            for (int i = 0; i < S::TILES; ++i)
                write_tokens(chain.y, chain.heads, chain.head, chain.document.start + chunk * CHUNK,
                             chain.document.stop, first_tile + i, x[i].y, nearest_power_of_two(x[i].scale + scale_r));
        } else {
            BackwardChunk x[S::TILES];
#pragma unroll
            for (int i = 0; i < S::TILES; ++i) {
                begin_backward(x[i], s[i], tile, own, S::CHUNK_BYTES - TILE, first_tile + i);
                if (save) save_rows(saved(i), x[i].state, x[i].scale);
            }
            backward_chunk<S::TILES, false>(x, s, tile, own, 0);
        }
    }
}

template <class S>
__device__ inline void run_chain(const Chain& chain, const float* initial, float* final) {
    const Address tiles = shared_memory(), smalls = tiles + S::SMALL_BASE;
    const int64 groups = (chain.chunks() + S::CHUNKS - 1) / S::CHUNKS;
    const auto group = [=](int64 step) { return S::FORWARD ? step : groups - 1 - step; };
    const auto stage = [=](int64 step) { return tiles + static_cast<Address>(step % S::STAGES) * S::GROUP_BYTES; };
    const auto small = [=](int64 step) {
        return smalls + static_cast<Address>(step % S::SMALL_STAGES) * (S::CHUNKS * SMALL);
    };
    const int first_tile = (static_cast<int>(chain.part) * S::ROW_WARPS + warp()) * S::TILES;
    const bool has_rows = warp() < S::ROW_WARPS;

    Rows s[S::TILES];
#pragma unroll
    for (int i = 0; i < S::TILES; ++i) {
        clear(s[i]);
        if (has_rows && initial) load_rows(s[i], initial, first_tile + i);
    }
    if (groups > 0) copy_group<S>(chain, group(0), stage(0));
    if constexpr (S::OVERLAP) {
        for (int64 step = -1; step < groups; ++step) {
            wait_for_copies();
            __syncthreads();  // group `step` is prepared, the next one is there, the one before has been read
            if (step + 2 < groups) copy_group<S>(chain, group(step + 2), stage(step + 2));
            if (!has_rows && step + 1 < groups)
                prepare_chunk<S>(chain, group(step + 1), warp() - S::ROW_WARPS, stage(step + 1), small(step + 1));
            if (has_rows && step >= 0)
                follow<S>(s, chain, group(step), first_tile, stage(step), small(step));
        }
    } else {
        for (int64 step = 0; step < groups; ++step) {
            wait_for_copies();
            __syncthreads();  // this group is there, the one before has been read
            if (step + 1 < groups) copy_group<S>(chain, group(step + 1), stage(step + 1));
            prepare_chunk<S>(chain, group(step), warp(), stage(step), small(step));
            __syncthreads();  // it is prepared
            follow<S>(s, chain, group(step), first_tile, stage(step), small(step));
        }
    }
#pragma unroll
    for (int i = 0; i < S::TILES; ++i)
        if (has_rows && final) store_rows(final, s[i], first_tile + i);
}

// The chain that a block follows, longest document first, or a head's padding.
template <class S>
__device__ inline Chain chain_of_block(int64 tokens, int64 heads, int64 documents, const int* cu_seqlens,
                                       const int* order) {
    const int64 rank = blockIdx.x / (heads * S::PARTS);
    Chain chain = {};
    chain.heads = heads;
    chain.head = blockIdx.x / S::PARTS % heads;
    chain.part = blockIdx.x % S::PARTS;
    chain.document = document_at(rank < documents ? order[rank] : documents, tokens, documents, cu_seqlens);
    return chain;
}

template <class S>
__device__ inline void forward(int64 tokens, int64 heads, int64 documents, const int* cu_seqlens, const int* order,
                               const unsigned short* r, const unsigned short* log_decay, const unsigned short* k,
                               const unsigned short* v, const unsigned short* a, const unsigned short* b,
                               const float* initial_state, unsigned short* y, float* final_state,
                               unsigned short* states, int* scales) {
    Chain chain = chain_of_block<S>(tokens, heads, documents, cu_seqlens, order);
    if (chain.document.index == documents) {
        if (chain.part == 0) clear_padding(y, tokens, heads, chain.head, chain.document.start);
        return;
    }
    const unsigned short* inputs[6] = {log_decay, r, a, b, k, v};
    for (int n = 0; n < 6; ++n) chain.inputs[n] = inputs[n];
    chain.y = y;
    chain.states = states;
    chain.scales = scales;
    const int64 state = (chain.document.index * heads + chain.head) * STATE;
    run_chain<S>(chain, initial_state ? initial_state + state : nullptr, final_state + state);
}

template <class S>
__device__ inline void backward(int64 tokens, int64 heads, int64 documents, const int* cu_seqlens, const int* order,
                                const unsigned short* r, const unsigned short* log_decay, const unsigned short* a,
                                const unsigned short* b, const unsigned short* dy, const float* dfinal_state,
                                float* dinitial_state, unsigned short* dstates, int* scales) {
    Chain chain = chain_of_block<S>(tokens, heads, documents, cu_seqlens, order);
    if (chain.document.index == documents) return;
    const unsigned short* inputs[5] = {log_decay, r, a, b, dy};
    for (int n = 0; n < 5; ++n) chain.inputs[n] = inputs[n];
    chain.states = dstates;
    chain.scales = scales;
    const int64 state = (chain.document.index * heads + chain.head) * STATE;
    run_chain<S>(chain, dfinal_state ? dfinal_state + state : nullptr,
                 dinitial_state ? dinitial_state + state : nullptr);
}

// initial_state, dfinal_state: (documents, heads, N, N) [value, key], or null for zeros. dinitial_state: null where
// nobody asks. states, dstates: (tokens / 32 + documents, heads, N, N) halves and scales (…, heads, 4), as saved_rows()
// has them: S before each group of 32 tokens, E after it; null in the forward pass if there will be no backward pass.
#define WKV7_CHAINS(SHAPE, NAME, BLOCKS)                                                                              \
    extern "C" __global__ void __launch_bounds__(SHAPE<true>::THREADS, BLOCKS) wkv7_chunked_forward_##NAME(           \
        int64 tokens, int64 heads, int64 documents, const int* cu_seqlens, const int* order, const unsigned short* r, \
        const unsigned short* log_decay, const unsigned short* k, const unsigned short* v, const unsigned short* a,   \
        const unsigned short* b, const float* initial_state, unsigned short* y, float* final_state,                   \
        unsigned short* states, int* scales) {                                                                     \
        forward<SHAPE<true>>(tokens, heads, documents, cu_seqlens, order, r, log_decay, k, v, a, b, initial_state, y, \
                             final_state, states, scales);                                                         \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(SHAPE<false>::THREADS, BLOCKS) wkv7_chunked_backward_##NAME(         \
        int64 tokens, int64 heads, int64 documents, const int* cu_seqlens, const int* order, const unsigned short* r, \
        const unsigned short* log_decay, const unsigned short* a, const unsigned short* b, const unsigned short* dy,  \
        const float* dfinal_state, float* dinitial_state, unsigned short* dstates, int* scales) {                  \
        backward<SHAPE<false>>(tokens, heads, documents, cu_seqlens, order, r, log_decay, a, b, dy, dfinal_state,     \
                               dinitial_state, dstates, scales);                                                   \
    }

WKV7_CHAINS(Wide, wide, 4)
WKV7_CHAINS(Narrow, narrow, 2)
WKV7_CHAINS(SplitInTwo, split_in_two, 1)
WKV7_CHAINS(SplitInFour, split_in_four, 1)
