// A CUDA runtime on a machine without a GPU: device memory is host memory, streams are in order, no kernel can run.
//
// Preloaded under the name of the driver's library, so that torch finds its own CUDA usable: allocator, copies, events,
// streams and the autograd engine are torch's. Operations run on the CPU; see operations.py.

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

constexpr size_t kAlignment = 512;
constexpr size_t kGibibyte = size_t(1) << 30;

struct Block {
    size_t bytes;
    cudaMemoryType type;
};

struct Event {
    double milliseconds;
};

std::mutex& blocks_mutex() {
    static auto* mutex = new std::mutex; // never destroyed: torch frees memory while the process ends
    return *mutex;
}

std::map<char*, Block>& blocks() {
    static auto* map = new std::map<char*, Block>;
    return *map;
}

cudaError_t allocate(void** pointer, size_t bytes, cudaMemoryType type) {
    *pointer = aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (!*pointer) return cudaErrorMemoryAllocation;
    std::lock_guard<std::mutex> guard(blocks_mutex());
    blocks()[static_cast<char*>(*pointer)] = {bytes, type};
    return cudaSuccess;
}

cudaError_t release(void* pointer) {
    if (pointer) {
        std::lock_guard<std::mutex> guard(blocks_mutex());
        blocks().erase(static_cast<char*>(pointer));
    }
    free(pointer);
    return cudaSuccess;
}

cudaMemoryType type_of(const void* pointer) {
    std::lock_guard<std::mutex> guard(blocks_mutex());
    auto* address = static_cast<char*>(const_cast<void*>(pointer));
    auto found = blocks().upper_bound(address);
    if (found == blocks().begin()) return cudaMemoryTypeUnregistered;
    --found;
    return address < found->first + found->second.bytes ? found->second.type : cudaMemoryTypeUnregistered;
}

int num_gpus() {
    const char* given = getenv("KFAC_DIST_EMULATED_GPUS");
    return given ? atoi(given) : 1;
}

thread_local int current_device = 0;
std::atomic<double> slept{0}; // milliseconds that the device has been told to be busy

double now() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count() + slept.load();
}

cudaError_t refuse(const char* what) {
    fprintf(stderr, "the emulated GPU cannot run a kernel (%s): an operation has not come through operations.py\n", what);
    abort();
}

cudaError_t new_event(cudaEvent_t* event) {
    *event = reinterpret_cast<cudaEvent_t>(new Event{0});
    return cudaSuccess;
}

double& time_of(cudaEvent_t event) { return reinterpret_cast<Event*>(event)->milliseconds; }

cudaError_t new_stream(cudaStream_t* stream) {
    static std::atomic<long> last{256};
    *stream = reinterpret_cast<cudaStream_t>(last += 16);
    return cudaSuccess;
}

} // namespace

extern "C" {
#define EXPORT __attribute__((visibility("default")))
#define CUDA EXPORT cudaError_t

EXPORT void kfac_dist_emulated_sleep(double milliseconds) { slept.store(slept.load() + milliseconds); }

EXPORT int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = *active = 0; }

CUDA cudaGetDeviceCount(int* count) { return *count = num_gpus(), cudaSuccess; }
CUDA cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
CUDA cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
CUDA cudaDeviceSynchronize() { return cudaSuccess; }
CUDA cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
CUDA cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
CUDA cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
CUDA cudaGetLastError() { return cudaSuccess; }
CUDA cudaPeekAtLastError() { return cudaSuccess; }
CUDA cudaDeviceGetPCIBusId(char* name, int length, int device) {
    snprintf(name, length, "0000:%02x:00.0", device);
    return cudaSuccess;
}
CUDA cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrMultiProcessorCount ? 132 : 0;
    return cudaSuccess;
}
CUDA cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "Emulated GPU");
    memcpy(properties->uuid.bytes, "emulated-gpu----", 16);
    properties->uuid.bytes[15] = static_cast<char>('a' + device);
    properties->major = 9;
    properties->totalGlobalMem = 80 * kGibibyte;
    properties->multiProcessorCount = 132;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->regsPerMultiprocessor = 65536;
    properties->sharedMemPerBlock = 49152;
    properties->warpSize = 32;
    return cudaSuccess;
}

CUDA cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes, cudaMemoryTypeDevice); }
CUDA cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
CUDA cudaFree(void* pointer) { return release(pointer); }
CUDA cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }
CUDA cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return allocate(pointer, bytes, cudaMemoryTypeHost); }
CUDA cudaMallocHost(void** pointer, size_t bytes) { return allocate(pointer, bytes, cudaMemoryTypeHost); }
CUDA cudaFreeHost(void* pointer) { return release(pointer); }
CUDA cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    *free_bytes = 70 * kGibibyte;
    *total = 80 * kGibibyte;
    return cudaSuccess;
}
CUDA cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = type_of(pointer);
    attributes->devicePointer = attributes->hostPointer = const_cast<void*>(pointer);
    return cudaSuccess;
}
CUDA cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return memmove(to, from, bytes), cudaSuccess; }
CUDA cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return memmove(to, from, bytes), cudaSuccess;
}
CUDA cudaMemset(void* to, int value, size_t bytes) { return memset(to, value, bytes), cudaSuccess; }
CUDA cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return memset(to, value, bytes), cudaSuccess; }

CUDA cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -1;
    return cudaSuccess;
}
CUDA cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
CUDA cudaStreamCreate(cudaStream_t* stream) { return new_stream(stream); }
CUDA cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return new_stream(stream); }
CUDA cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return new_stream(stream); }
CUDA cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
CUDA cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
CUDA cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
CUDA cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
CUDA cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
CUDA cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

CUDA cudaEventCreate(cudaEvent_t* event) { return new_event(event); }
CUDA cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return new_event(event); }
CUDA cudaEventDestroy(cudaEvent_t event) { return delete reinterpret_cast<Event*>(event), cudaSuccess; }
CUDA cudaEventRecord(cudaEvent_t event, cudaStream_t) { return time_of(event) = now(), cudaSuccess; }
CUDA cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned) { return time_of(event) = now(), cudaSuccess; }
CUDA cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
CUDA cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
CUDA cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    return *milliseconds = static_cast<float>(time_of(end) - time_of(start)), cudaSuccess;
}

CUDA cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) { return function(data), cudaSuccess; }
CUDA cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return refuse("cudaLaunchKernel"); }
CUDA cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return refuse("cudaLaunchKernelExC"); }
}
