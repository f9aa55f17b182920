// The CUDA kernels of layer.cu (SOURCE) as functions that a CPU can run: those that the macros choose.

#include "cuda_on_cpu.h"

#include SOURCE

__shared__ char always_some[1] __attribute__((used));  // a kernel may have no shared memory

// The barrier at this line of this file does nothing from now on; 0: all are there.
extern "C" void leave_out(const char* file, int line) { cuda_on_cpu::leave_out(file, line); }

#define RUN(kernel)                                                                                             \
    extern "C" void run_##kernel(unsigned blocks, unsigned threads, unsigned seed, const int64_t* arguments) { \
        cuda_on_cpu::launch(blocks, threads, seed, kernel, arguments);                                          \
    }
#ifdef NORM_MIX
RUN(norm_mix_forward)
RUN(norm_mix_backward)
#endif
#ifdef WKV7_INPUTS
RUN(wkv7_inputs_forward)
RUN(wkv7_inputs_backward)
#endif
#ifdef WKV7_OUTPUT
RUN(wkv7_output_forward)
RUN(wkv7_output_backward)
#endif
#ifdef RELU_SQUARED
RUN(relu_squared_forward)
RUN(relu_squared_backward)
#endif
#ifdef CROSS_ENTROPY
RUN(cross_entropy)
#endif
#ifdef SUM_BLOCKS
RUN(sum_blocks)
#endif
