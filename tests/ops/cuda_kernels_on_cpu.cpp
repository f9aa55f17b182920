// The CUDA kernels of SOURCE as functions that a CPU can run; compiled by test_cuda_source.py.

#include "cuda_on_cpu.h"

#include SOURCE

extern "C" {
void run_wkv7_forward(unsigned blocks, unsigned threads, unsigned seed, const int64_t* arguments) {
    cuda_on_cpu::launch(blocks, threads, seed, wkv7_forward, arguments);
}
void run_wkv7_backward(unsigned blocks, unsigned threads, unsigned seed, const int64_t* arguments) {
    cuda_on_cpu::launch(blocks, threads, seed, wkv7_backward, arguments);
}
}
