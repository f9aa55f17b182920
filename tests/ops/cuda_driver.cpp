// A CUDA driver (libcuda.so.1) without a GPU: two devices, whose kernels' launches it hands to the program that uses it.
//
// It keeps each thread's current context; hooks keep and decide the rest. A call that it does not answer returns
// CUDA_ERROR_NOT_SUPPORTED and is named on stderr.

#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <utility>

extern "C" int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status);

namespace {

constexpr int SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_FOUND = 500,
              NOT_SUPPORTED = 801;
constexpr int DEVICES = 2, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76;  // attributes

// CUlaunchConfig of cuda.h.
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    void* attributes;
    unsigned attribute_count;
};

struct Hooks {
    int64_t (*load)(const void* code);                                     // → library
    int64_t (*find)(int64_t library, const char* name);                    // → kernel, 0 for none
    int (*set_attribute)(int64_t kernel, int attribute, int value, int device);  // → CUresult
    int (*launch)(int64_t kernel, const LaunchConfig* config, int device, void** arguments);  // → CUresult
};
Hooks hooks;

char contexts[DEVICES];  // their addresses are the devices' primary contexts
thread_local void* current = nullptr;

int device_of(const void* context) {
    return context ? static_cast<int>(static_cast<const char*>(context) - contexts) : -1;
}

// One function for each call that is not answered, to name it.
constexpr size_t MOST_UNANSWERED = 1000;
std::array<std::string, MOST_UNANSWERED> unanswered_names;
template <size_t N>
int unanswered() {
    std::fprintf(stderr, "cuda_driver.cpp: %s is not answered\n", unanswered_names[N].c_str());
    return NOT_SUPPORTED;
}
template <size_t... N>
constexpr std::array<int (*)(), sizeof...(N)> all_unanswered(std::index_sequence<N...>) {
    return {unanswered<N>...};
}
constexpr auto UNANSWERED = all_unanswered(std::make_index_sequence<MOST_UNANSWERED>());

int get_attribute(int* value, int attribute, int) {
    *value = attribute == CAPABILITY_MAJOR ? 9 : attribute == CAPABILITY_MINOR ? 0 : 1;
    return SUCCESS;
}
int get_device(int* device, int ordinal) {
    *device = ordinal;
    return ordinal < DEVICES ? SUCCESS : INVALID_DEVICE;
}
int retain_context(void** context, int device) {
    *context = &contexts[device];
    return SUCCESS;
}
int get_context(void** context) {
    *context = current;
    return SUCCESS;
}
int set_context(void* context) {
    current = context;
    return SUCCESS;
}
int get_context_device(int* device) {
    *device = device_of(current);
    return current ? SUCCESS : INVALID_CONTEXT;
}
int load_library(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
    *library = reinterpret_cast<void*>(hooks.load(code));
    return SUCCESS;
}
int get_kernel(void** kernel, void* library, const char* name) {
    *kernel = reinterpret_cast<void*>(hooks.find(reinterpret_cast<int64_t>(library), name));
    return *kernel ? SUCCESS : NOT_FOUND;
}
int get_function(void** function, void* kernel) {
    *function = kernel;
    return SUCCESS;
}
int set_kernel_attribute(int attribute, int value, void* kernel, int device) {
    return hooks.set_attribute(reinterpret_cast<int64_t>(kernel), attribute, value, device);
}
int launch(const LaunchConfig* config, void* kernel, void** arguments, void**) {
    if (!current) return INVALID_CONTEXT;
    if (config->attribute_count) return NOT_SUPPORTED;
    return hooks.launch(reinterpret_cast<int64_t>(kernel), config, device_of(current), arguments);
}

const std::map<std::string, void*>& answers() {
    static const std::map<std::string, void*> found = {
        {"cuGetProcAddress", reinterpret_cast<void*>(cuGetProcAddress_v2)},
        {"cuInit", reinterpret_cast<void*>(+[](unsigned) { return SUCCESS; })},
        {"cuDriverGetVersion", reinterpret_cast<void*>(+[](int* version) { *version = 13000; return SUCCESS; })},
        {"cuDeviceGetCount", reinterpret_cast<void*>(+[](int* count) { *count = DEVICES; return SUCCESS; })},
        {"cuDeviceGet", reinterpret_cast<void*>(get_device)},
        {"cuDeviceGetAttribute", reinterpret_cast<void*>(get_attribute)},
        {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(retain_context)},
        {"cuDevicePrimaryCtxRelease", reinterpret_cast<void*>(+[](int) { return SUCCESS; })},
        {"cuCtxGetCurrent", reinterpret_cast<void*>(get_context)},
        {"cuCtxSetCurrent", reinterpret_cast<void*>(set_context)},
        {"cuCtxGetDevice", reinterpret_cast<void*>(get_context_device)},
        {"cuLibraryLoadData", reinterpret_cast<void*>(load_library)},
        {"cuLibraryUnload", reinterpret_cast<void*>(+[](void*) { return SUCCESS; })},
        {"cuLibraryGetKernel", reinterpret_cast<void*>(get_kernel)},
        {"cuKernelGetFunction", reinterpret_cast<void*>(get_function)},
        {"cuKernelSetAttribute", reinterpret_cast<void*>(set_kernel_attribute)},
        {"cuLaunchKernelEx", reinterpret_cast<void*>(launch)},
        {"cuGetErrorName", reinterpret_cast<void*>(+[](int, const char** text) { *text = "error"; return SUCCESS; })},
        {"cuGetErrorString", reinterpret_cast<void*>(+[](int, const char** text) { *text = "error"; return SUCCESS; })},
    };
    return found;
}

}  // namespace

extern "C" {

void set_hooks(const Hooks* given) { hooks = *given; }

int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
    static std::mutex lock;
    static std::map<std::string, size_t> places;
    const std::lock_guard<std::mutex> held(lock);
    if (const auto answer = answers().find(name); answer != answers().end()) {
        *function = answer->second;
    } else {
        const size_t place = places.emplace(name, places.size()).first->second;
        if (place >= MOST_UNANSWERED) return INVALID_VALUE;
        unanswered_names[place] = name;
        *function = reinterpret_cast<void*>(UNANSWERED[place]);
    }
    if (status) *status = 0;
    return SUCCESS;
}
}
