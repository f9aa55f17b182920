// The CUDA kernels of SOURCE as functions that a CPU can run; compiled by conftest.py, with SOURCE's name as a macro.

#include "cuda_on_cpu.h"
#ifndef wkv7
#include "tensor_cores_on_cpu.h"
#endif

#include SOURCE

#define RUN(KERNEL)                                                                                                  \
    void run_##KERNEL(unsigned blocks, unsigned threads, unsigned shared_bytes, unsigned seed,                       \
                      const int64_t* arguments) {                                                                    \
        cuda_on_cpu::LAUNCH(blocks, threads, shared_bytes, seed, KERNEL, arguments);                                 \
    }

extern "C" {
#if defined(wkv7)
#define LAUNCH launch_without_shared_memory
RUN(wkv7_forward)
RUN(wkv7_backward)
#elif defined(chunked_chains)
#define LAUNCH launch_with_shared_memory
RUN(wkv7_chunked_forward_wide)
RUN(wkv7_chunked_forward_narrow)
RUN(wkv7_chunked_forward_split_in_two)
RUN(wkv7_chunked_forward_split_in_four)
RUN(wkv7_chunked_backward_wide)
RUN(wkv7_chunked_backward_narrow)
RUN(wkv7_chunked_backward_split_in_two)
RUN(wkv7_chunked_backward_split_in_four)
#elif defined(chunked_gradients)
#define LAUNCH launch_with_shared_memory
RUN(wkv7_chunked_gradients)
#endif

// The barrier, commit or wait at this line of this file does nothing from now on; 0: all are there.
void leave_out(const char* file, int line) { cuda_on_cpu::leave_out(file, line); }

// Of the last launch, or "".
const char* first_error() { return cuda_on_cpu::first_error.c_str(); }

// Of all launches: "line wavefronts" for each line that accesses shared memory through tensor_cores.h.
const char* bank_conflicts() {
    static std::string text;
    text.clear();
    for (const auto& [line, worst] : cuda_on_cpu::bank_conflicts)
        text += std::to_string(line) + " " + std::to_string(worst) + "\n";
    return text.c_str();
}
}
