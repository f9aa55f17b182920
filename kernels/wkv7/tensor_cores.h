// One warp's instructions on tensor cores and shared memory (sm_80 and newer), as functions. ../README.md has the
// layouts. All of a kernel's shared memory is dynamic and goes through here, by 32-bit addresses in bytes.
//
// A CPU has its own version of everything between the #if and the #endif: tests/ops/tensor_cores_on_cpu.h. That one
// also checks what a GPU does not tell: races, copies that nobody waited for, bank conflicts.

#pragma once

typedef long long int64;
typedef unsigned Address;

// 16 × 16 halves as mma's operand A, or the operands B of two neighbouring mma: four 8 × 8 matrices, lane l with
// columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 in each, the lower column in the lower half.
struct Fragment {
    unsigned x[4];
};
// 16 × 8 floats: lane l has columns 2 (l % 4), + 1 of row l / 4 in x[0], x[1], and of row l / 4 + 8 in x[2], x[3].
struct Sums {
    float x[4];
};
struct FloatPair {
    float x, y;
};
struct FloatQuad {
    float x, y, z, w;
};

#ifdef __CUDACC__

// d += a b, with b0, b1 the two registers of an operand B; or d = a b
__device__ inline void multiply_halves(Sums& d, const Fragment& a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d.x[0]), "+f"(d.x[1]), "+f"(d.x[2]), "+f"(d.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}
__device__ inline Sums product_of_halves(const Fragment& a, unsigned b0, unsigned b1) {
    Sums d;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
        : "=f"(d.x[0]), "=f"(d.x[1]), "=f"(d.x[2]), "=f"(d.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1), "f"(0.0f));
    return d;
}
__device__ inline void multiply_bfloat16s(Sums& d, const Fragment& a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d.x[0]), "+f"(d.x[1]), "+f"(d.x[2]), "+f"(d.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}
__device__ inline Sums product_of_bfloat16s(const Fragment& a, unsigned b0, unsigned b1) {
    Sums d;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
        : "=f"(d.x[0]), "=f"(d.x[1]), "=f"(d.x[2]), "=f"(d.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1), "f"(0.0f));
    return d;
}

// Four 8 × 8 matrices of halves; lanes 8 i … 8 i + 7 give the addresses of matrix i's rows, 16 bytes each.
__device__ inline Fragment load_matrices(Address row) {
    Fragment f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3])
                 : "r"(row)
                 : "memory");
    return f;
}
__device__ inline Fragment load_matrices_transposed(Address row) {
    Fragment f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3])
                 : "r"(row)
                 : "memory");
    return f;
}

#if __CUDA_ARCH__ >= 900
#define HAS_STORE_MATRICES 1
__device__ inline void store_matrices(Address row, const Fragment& f) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(row), "r"(f.x[0]), "r"(f.x[1]),
                 "r"(f.x[2]), "r"(f.x[3])
                 : "memory");
}
__device__ inline void store_matrices_transposed(Address row, const Fragment& f) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(row), "r"(f.x[0]),
                 "r"(f.x[1]), "r"(f.x[2]), "r"(f.x[3])
                 : "memory");
}
#else
#define HAS_STORE_MATRICES 0
#endif

// An 8 × 8 matrix of halves within a warp's registers.
__device__ inline unsigned transpose(unsigned x) {
    unsigned y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
    return y;
}

// 16 bytes from global to shared memory, or 16 bytes of zeros, for which nothing is read. They are there for this
// thread after wait_for_copies(), for others after a barrier behind that.
__device__ inline void copy_async(Address to, const void* from, bool copy) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(copy ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ inline Address shared_memory() {
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
    return static_cast<Address>(__cvta_generic_to_shared(dynamic_shared_memory));
}
__device__ inline void store_half(Address to, unsigned low_half) {
    asm volatile("st.shared.u16 [%0],%1;" ::"r"(to), "h"(static_cast<unsigned short>(low_half)) : "memory");
}
__device__ inline void store_word(Address to, unsigned x) {
    asm volatile("st.shared.u32 [%0],%1;" ::"r"(to), "r"(x) : "memory");
}
__device__ inline unsigned load_word(Address from) {
    unsigned x;
    asm volatile("ld.shared.u32 %0,[%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}
__device__ inline void store_pair(Address to, FloatPair p, bool store = true) {  // without a branch
    asm volatile("{.reg .pred p; setp.ne.u32 p,%3,0; @p st.shared.v2.f32 [%0],{%1,%2};}" ::"r"(to), "f"(p.x), "f"(p.y),
                 "r"(static_cast<unsigned>(store))
                 : "memory");
}
__device__ inline FloatPair load_pair(Address from) {
    FloatPair p;
    asm volatile("ld.shared.v2.f32 {%0,%1},[%2];" : "=f"(p.x), "=f"(p.y) : "r"(from) : "memory");
    return p;
}
__device__ inline FloatQuad load_quad(Address from) {
    FloatQuad q;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3},[%4];"
                 : "=f"(q.x), "=f"(q.y), "=f"(q.z), "=f"(q.w)
                 : "r"(from)
                 : "memory");
    return q;
}

// Arithmetic on pairs of halves, and conversions; "low" goes to the lower half.
__device__ inline unsigned pack_halves(float low, float high) {
    unsigned x;
    asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
__device__ inline unsigned pack_bfloat16s(float low, float high) {
    unsigned x;
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
__device__ inline FloatPair widen_halves(unsigned x) {
    FloatPair p;
    asm("{.reg .f16 a,b; mov.b32 {a,b},%2; cvt.f32.f16 %0,a; cvt.f32.f16 %1,b;}" : "=f"(p.x), "=f"(p.y) : "r"(x));
    return p;
}
__device__ inline unsigned scale_halves(unsigned x, unsigned by) {
    unsigned y;
    asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(y) : "r"(x), "r"(by));
    return y;
}
__device__ inline unsigned larger_bfloat16s(unsigned x, unsigned y) {  // of x and |y|
    unsigned z;
    asm("{.reg .b32 t; abs.bf16x2 t,%2; max.bf16x2 %0,%1,t;}" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
__device__ inline float exp2_approximate(float x) {  // error 2^-22; subnormal results are 0
    float y;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
