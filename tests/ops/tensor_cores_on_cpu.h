// kernels/wkv7/tensor_cores.h for a CPU: the same functions, on the fibers of cuda_on_cpu.h. Include both before the
// kernel's source, whose own tensor_cores.h then has only its types left to say.
//
// What is wrong is recorded (the first of a launch: cuda_on_cpu::first_error):
// - a warp-wide instruction that not all 32 lanes reach, or from different lines;
// - shared memory that is read while a copy into it is under way, or beyond its end;
// - races: shared memory that one thread writes and another reads or writes, without __syncthreads() between the two,
//   or __syncwarp() where they are lanes of one warp. An mma or a shuffle is no barrier.
// Bank conflicts are counted from the addresses: cuda_on_cpu::bank_conflicts, the worst at each line of the source.

#pragma once

#include "tensor_cores.h"

#include <algorithm>
#include <array>

#ifndef HAS_STORE_MATRICES
#define HAS_STORE_MATRICES 1
#endif

#define HERE int line = __builtin_LINE()

namespace cuda_on_cpu {

// --- halves ---

inline float decode_half(unsigned short h) {
    static const std::vector<float> table = [] {
        std::vector<float> t(1 << 16);
        for (int n = 0; n < 1 << 16; ++n) {
            const int exponent = n >> 10 & 31, mantissa = n & 1023;
            const float sign = n >> 15 ? -1.0f : 1.0f;
            if (exponent == 31)
                t[n] = mantissa ? NAN : sign * INFINITY;
            else
                t[n] = sign * std::ldexp(float(exponent ? mantissa + 1024 : mantissa), std::max(exponent, 1) - 25);
        }
        return t;
    }();
    return table[h];
}

inline unsigned short encode_half(float x) {  // to nearest, ties to even
    const unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude >= 0x38800000) return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return sign | static_cast<unsigned short>(std::nearbyint(std::ldexp(__uint_as_float(magnitude), 24)));
}

inline unsigned short encode_bfloat16(float x) {
    const unsigned u = __float_as_uint(x);
    return (x == x ? u + 0x7fff + (u >> 16 & 1) : u | 0x400000) >> 16;
}

inline float decode_bfloat16(unsigned short x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }

inline unsigned join(unsigned short low, unsigned short high) { return low | static_cast<unsigned>(high) << 16; }

// --- shared memory ---

struct Cell {  // of two bytes
    unsigned write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;  // barriers passed by who did it
    short writer = -1, reader = -1;                                          // threads; reader -2: several
    unsigned char warps = 0;                                                 // that read it since read_block
    bool pending = false;                                                    // a copy is under way
};

static std::vector<unsigned char> memory;
static std::vector<Cell> cells;

struct Access {
    int line, bytes;
    Address at;
};

struct Copy {
    Address to;
    bool copy;
    unsigned char content[16];
    int line;
};

struct Lane {
    std::vector<Access> accesses;  // since the warp last met
    std::vector<Copy> copies;      // not waited for; the first `committed` belong to a group
    size_t committed = 0;
    // A warp-wide instruction: what goes in, what comes out.
    int line = 0, operation = 0;
    unsigned in[8];
    float sums[4];
    unsigned out[4];
    float out_sums[4];
    bool done = false;
};
static std::vector<Lane> lanes;

inline void touch(Address at, int bytes, bool write, int line) {
    if (at % std::min(bytes, 16) || at + bytes > memory.size()) {
        record("thread %d: %d bytes of shared memory at %u, line %d", current, bytes, at, line);
        fail("shared memory beyond its end, or misaligned");
    }
    const unsigned block = fibers[current].block_barriers, warp = fibers[current].warp_barriers;
    for (Cell* c = &cells[at / 2]; c < &cells[(at + bytes + 1) / 2]; ++c) {
        if (c->pending && !write) record("thread %d reads a copy that it has not waited for, line %d", current, line);
        if (c->writer >= 0 && c->writer != current && c->write_block == block &&
            (c->writer / WARP != current / WARP || c->write_warp == warp))
            record("thread %d %s what thread %d wrote, with no barrier between, line %d", current,
                   write ? "overwrites" : "reads", c->writer, line);
        const unsigned char mine = 1 << current / WARP;
        if (write) {
            if (c->read_block == block &&
                ((c->warps & ~mine) || (c->warps && c->read_warp == warp && c->reader != current)))
                record("thread %d overwrites what others may still read, with no barrier between, line %d", current,
                       line);
            c->writer = static_cast<short>(current);
            c->write_block = block;
            c->write_warp = warp;
        } else {
            if (c->read_block != block) c->warps = 0, c->reader = -1;
            c->reader = c->reader == -1 || c->reader == current || (c->warps == mine && c->read_warp != warp)
                            ? static_cast<short>(current)
                            : -2;
            c->warps |= mine;
            c->read_block = block;
            c->read_warp = warp;
        }
    }
}

// What a thread's own accesses have in common with its warp's is seen when the warp meets again.
inline void log_access(Address at, int bytes, int line) { lanes[current].accesses.push_back({line, bytes, at}); }

inline int wavefronts(const std::vector<Address>& at, int bytes) {  // of lanes that go together
    std::array<std::vector<Address>, 32> banks;
    size_t worst = 0;
    for (const Address first : at)
        for (Address word = first / 4; word <= (first + bytes - 1) / 4; ++word) {
            auto& bank = banks[word % 32];
            if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
            worst = std::max(worst, bank.size());
        }
    return static_cast<int>(worst);
}

inline void count_conflicts(int line, const std::vector<Address>& at, int bytes) {
    int& worst = bank_conflicts[line];
    worst = std::max(worst, wavefronts(at, bytes));
}

// The k-th access at a line is the same instruction for all lanes. 32 lanes go together with 4 bytes each, 16 with 8,
// 8 with 16.
inline void settle_accesses(size_t first_lane) {
    struct Together {
        std::vector<Address> at[4];
        int bytes;
    };
    bool any = false;
    for (size_t n = first_lane; n < first_lane + WARP; ++n) any |= !lanes[n].accesses.empty();
    if (!any) return;
    std::map<std::pair<int, int>, Together> all;
    for (size_t n = first_lane; n < first_lane + WARP; ++n) {
        std::map<int, int> seen;
        for (const Access& x : lanes[n].accesses) {
            Together& t = all[{x.line, seen[x.line]++}];
            t.bytes = x.bytes;
            t.at[(n - first_lane) * std::max(x.bytes, 4) / 128].push_back(x.at);
        }
        lanes[n].accesses.clear();
    }
    for (auto& [key, together] : all)
        for (auto& at : together.at)
            if (!at.empty()) count_conflicts(key.first, at, together.bytes);
}

template <class T>
T load_shared(Address from, int line) {
    touch(from, sizeof(T), false, line);
    log_access(from, sizeof(T), line);
    T x;
    std::memcpy(&x, &memory[from], sizeof(T));
    return x;
}

template <class T>
void store_shared(Address to, T x, int line) {
    touch(to, sizeof(T), true, line);
    log_access(to, sizeof(T), line);
    std::memcpy(&memory[to], &x, sizeof(T));
}

// --- warp-wide instructions ---

// Deposits a lane's operands, waits for the warp; the first lane to go on computes for all of them.
template <class Compute>
Lane& together(int operation, int line, Compute compute) {
    Lane& self = lanes[current];
    self.operation = operation;
    self.line = line;
    self.done = false;
    wait(Waits::warp);
    if (!self.done) {
        const size_t first = current / WARP * WARP;
        for (size_t n = first; n < first + WARP; ++n) {
            if (lanes[n].operation != operation || lanes[n].line != line || lanes[n].done) {
                record("lanes %d and %zu of a warp are at lines %d and %d", current, n, line, lanes[n].line);
                fail("a warp-wide instruction that its lanes do not share");
            }
            lanes[n].done = true;
        }
        settle_accesses(first);
        compute(&lanes[first]);
    }
    return self;
}

inline unsigned short part(unsigned x, int half) { return static_cast<unsigned short>(x >> 16 * half); }

template <float decode(unsigned short)>
void multiply_for(Lane* warp) {
    float a[16][16], b[16][8];
    for (int l = 0; l < WARP; ++l)
        for (int half = 0; half < 2; ++half) {
            const int g = l / 4, c = l % 4 * 2 + half;
            for (int q = 0; q < 4; ++q) a[g + q % 2 * 8][c + q / 2 * 8] = decode(part(warp[l].in[q], half));
            for (int q = 0; q < 2; ++q) b[c + q * 8][g] = decode(part(warp[l].in[4 + q], half));
        }
    float d[16][8] = {};
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    for (int l = 0; l < WARP; ++l)
        for (int e = 0; e < 4; ++e) warp[l].out_sums[e] = warp[l].sums[e] + d[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
}

template <float decode(unsigned short)>
void multiply(Sums& d, const Fragment& a, unsigned b0, unsigned b1, int line) {
    Lane& self = lanes[current];
    std::copy(a.x, a.x + 4, self.in);
    self.in[4] = b0, self.in[5] = b1;
    std::copy(d.x, d.x + 4, self.sums);
    together(1, line, multiply_for<decode>);
    std::copy(self.out_sums, self.out_sums + 4, d.x);
}

// Row r of matrix i begins at what lane 8 i + r gave.
inline Fragment load_matrices(Address row, bool transposed, int line) {
    touch(row, 16, false, line);
    Lane& self = lanes[current];
    self.in[0] = row;
    together(2 + transposed, line, [=](Lane* warp) {
        for (int i = 0; i < 4; ++i) {
            unsigned short matrix[8][8];
            std::vector<Address> rows;
            for (int r = 0; r < 8; ++r) {
                rows.push_back(warp[8 * i + r].in[0]);
                std::memcpy(matrix[r], &memory[rows.back()], 16);
            }
            count_conflicts(line, rows, 16);
            for (int l = 0; l < WARP; ++l) {
                const int g = l / 4, c = l % 4 * 2;
                warp[l].out[i] = transposed ? join(matrix[c][g], matrix[c + 1][g]) : join(matrix[g][c], matrix[g][c + 1]);
            }
        }
    });
    Fragment f;
    std::copy(self.out, self.out + 4, f.x);
    return f;
}

inline void store_matrices(Address row, const Fragment& f, bool transposed, int line) {
    touch(row, 16, true, line);
    Lane& self = lanes[current];
    std::copy(f.x, f.x + 4, self.in);
    self.in[4] = row;
    together(4 + transposed, line, [=](Lane* warp) {
        for (int i = 0; i < 4; ++i) {
            unsigned short matrix[8][8];
            for (int l = 0; l < WARP; ++l)
                for (int half = 0; half < 2; ++half) {
                    const int g = l / 4, c = l % 4 * 2 + half;
                    (transposed ? matrix[c][g] : matrix[g][c]) = part(warp[l].in[i], half);
                }
            std::vector<Address> rows;
            for (int r = 0; r < 8; ++r) {
                rows.push_back(warp[8 * i + r].in[4]);
                std::memcpy(&memory[rows.back()], matrix[r], 16);
            }
            count_conflicts(line, rows, 16);
        }
    });
}

inline void finish_copies() {
    Lane& self = lanes[current];
    for (size_t n = 0; n < self.committed; ++n) {
        const Copy& copy = self.copies[n];
        for (Cell* c = &cells[copy.to / 2]; c < &cells[copy.to / 2 + 8]; ++c) c->pending = false;
        touch(copy.to, 16, true, copy.line);
        std::memcpy(&memory[copy.to], copy.content, 16);
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<long>(self.committed));
    self.committed = 0;
}

// `exchange` for shuffles and reductions of one 32-bit number: out[0] of every lane from in[0] of all.
template <class Exchange>
unsigned exchange(int operation, int line, unsigned x, Exchange of_lane) {
    lanes[current].in[0] = x;
    return together(operation, line, [=](Lane* warp) {
        for (int l = 0; l < WARP; ++l) warp[l].out[0] = of_lane(warp, l);
    }).out[0];
}

// All blocks of a grid, each with so many bytes of shared memory.
template <class Kernel>
void launch_with_shared_memory(unsigned blocks, unsigned threads, size_t shared_bytes, unsigned seed, Kernel kernel,
                               const int64_t* arguments) {
    first_error.clear();
    memory.assign(shared_bytes, 0xff);
    cells.assign(shared_bytes / 2, {});
    lanes.assign(threads, {});
    before_block = [] {
        std::fill(memory.begin(), memory.end(), 0xff);
        for (Cell& c : cells) c = {};
        for (Lane& lane : lanes) lane = {};
    };
    after_block = [] {
        for (size_t n = 0; n < lanes.size(); n += WARP) settle_accesses(n);
        for (const Lane& lane : lanes)
            for (const Copy& copy : lane.copies)
                record("a copy that nobody waits for, line %d%s", copy.line, "");
    };
    launch(blocks, threads, seed, kernel, arguments);
    before_block = after_block = nullptr;
}

}  // namespace cuda_on_cpu

inline void multiply_halves(Sums& d, const Fragment& a, unsigned b0, unsigned b1, HERE) {
    cuda_on_cpu::multiply<cuda_on_cpu::decode_half>(d, a, b0, b1, line);
}
inline Sums product_of_halves(const Fragment& a, unsigned b0, unsigned b1, HERE) {
    Sums d = {};
    cuda_on_cpu::multiply<cuda_on_cpu::decode_half>(d, a, b0, b1, line);
    return d;
}
inline void multiply_bfloat16s(Sums& d, const Fragment& a, unsigned b0, unsigned b1, HERE) {
    cuda_on_cpu::multiply<cuda_on_cpu::decode_bfloat16>(d, a, b0, b1, line);
}
inline Sums product_of_bfloat16s(const Fragment& a, unsigned b0, unsigned b1, HERE) {
    Sums d = {};
    cuda_on_cpu::multiply<cuda_on_cpu::decode_bfloat16>(d, a, b0, b1, line);
    return d;
}
inline Fragment load_matrices(Address row, HERE) { return cuda_on_cpu::load_matrices(row, false, line); }
inline Fragment load_matrices_transposed(Address row, HERE) { return cuda_on_cpu::load_matrices(row, true, line); }
inline void store_matrices(Address row, const Fragment& f, HERE) { cuda_on_cpu::store_matrices(row, f, false, line); }
inline void store_matrices_transposed(Address row, const Fragment& f, HERE) {
    cuda_on_cpu::store_matrices(row, f, true, line);
}
inline unsigned transpose(unsigned x, HERE) {
    using namespace cuda_on_cpu;
    return exchange(6, line, x, [](Lane* warp, int l) {
        const int g = l / 4, c = l % 4 * 2;  // matrix[row][column] is with lane 4 row + column / 2
        const auto at = [&](int row, int column) { return part(warp[4 * row + column / 2].in[0], column % 2); };
        return join(at(c, g), at(c + 1, g));
    });
}

inline void copy_async(Address to, const void* from, bool copy, HERE) {
    using namespace cuda_on_cpu;
    touch(to, 16, true, line);
    log_access(to, 16, line);
    Copy c{to, copy, {}, line};
    if (copy) std::memcpy(c.content, from, 16);
    std::memset(&memory[to], 0xff, 16);
    for (Cell* cell = &cells[to / 2]; cell < &cells[to / 2 + 8]; ++cell) cell->pending = true;
    lanes[current].copies.push_back(c);
}
inline void commit_copies(const char* file = __builtin_FILE(), HERE) {
    using namespace cuda_on_cpu;
    if (!is_left_out(file, line)) lanes[current].committed = lanes[current].copies.size();
}
inline void wait_for_copies(const char* file = __builtin_FILE(), HERE) {
    if (!cuda_on_cpu::is_left_out(file, line)) cuda_on_cpu::finish_copies();
}

inline Address shared_memory() { return 0; }
inline void store_half(Address to, unsigned x, HERE) {
    cuda_on_cpu::store_shared(to, static_cast<unsigned short>(x), line);
}
inline void store_word(Address to, unsigned x, HERE) { cuda_on_cpu::store_shared(to, x, line); }
inline unsigned load_word(Address from, HERE) { return cuda_on_cpu::load_shared<unsigned>(from, line); }
inline void store_pair(Address to, FloatPair p, bool store = true, HERE) {
    if (store) cuda_on_cpu::store_shared(to, p, line);
}
inline FloatPair load_pair(Address from, HERE) { return cuda_on_cpu::load_shared<FloatPair>(from, line); }
inline FloatQuad load_quad(Address from, HERE) { return cuda_on_cpu::load_shared<FloatQuad>(from, line); }

inline unsigned pack_halves(float low, float high) {
    return cuda_on_cpu::join(cuda_on_cpu::encode_half(low), cuda_on_cpu::encode_half(high));
}
inline unsigned pack_bfloat16s(float low, float high) {
    return cuda_on_cpu::join(cuda_on_cpu::encode_bfloat16(low), cuda_on_cpu::encode_bfloat16(high));
}
inline FloatPair widen_halves(unsigned x) {
    using namespace cuda_on_cpu;
    return {decode_half(part(x, 0)), decode_half(part(x, 1))};
}
inline unsigned scale_halves(unsigned x, unsigned by) {
    const FloatPair p = widen_halves(x), q = widen_halves(by);
    return pack_halves(p.x * q.x, p.y * q.y);
}
inline unsigned larger_bfloat16s(unsigned x, unsigned y) {
    using namespace cuda_on_cpu;
    const auto max = [&](int half) {
        return encode_bfloat16(std::fmax(decode_bfloat16(part(x, half)), std::fabs(decode_bfloat16(part(y, half)))));
    };
    return join(max(0), max(1));
}
inline float exp2_approximate(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}

inline void __syncwarp(unsigned = ~0u, const char* file = __builtin_FILE(), HERE) {
    using namespace cuda_on_cpu;
    if (is_left_out(file, line)) return;
    together(7, line, [](Lane*) {});
    ++fibers[current].warp_barriers;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x, HERE) {
    using namespace cuda_on_cpu;
    return exchange(8, line, x, [](Lane* warp, int) {
        unsigned most = 0;
        for (int l = 0; l < WARP; ++l) most = std::max(most, warp[l].in[0]);
        return most;
    });
}
inline unsigned __ballot_sync(unsigned, bool x, HERE) {
    using namespace cuda_on_cpu;
    return exchange(9, line, x, [](Lane* warp, int) {
        unsigned all = 0;
        for (int l = 0; l < WARP; ++l) all |= warp[l].in[0] << l;
        return all;
    });
}
inline float __shfl_sync(unsigned, float x, int from, HERE) {
    using namespace cuda_on_cpu;
    lanes[current].in[1] = static_cast<unsigned>(from) % WARP;
    return __uint_as_float(
        exchange(10, line, __float_as_uint(x), [](Lane* warp, int l) { return warp[warp[l].in[1]].in[0]; }));
}
inline float __shfl_down_sync(unsigned, float x, int by, HERE) {
    using namespace cuda_on_cpu;
    return __uint_as_float(exchange(11, line, __float_as_uint(x), [=](Lane* warp, int l) {
        return warp[l + by < WARP ? l + by : l].in[0];
    }));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

#undef HERE
