// libcuda.so.1 without a GPU: device memory is memory, a stream's work is done at once, and kernels are those of
// kernels/*.so.
//
// Only what cudarc and this project call is here. Mistakes that a GPU punishes late or never stop the program: memory
// beyond the end of a buffer, memory that was freed, a launch that a real device would refuse.
#include "driver.h"
#include "block.h"

#include <dlfcn.h>
#include <glob.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <regex>
#include <string>
#include <vector>

using namespace software;

namespace {

std::recursive_mutex mutex; // the host may call from several threads

// ---- memory

constexpr size_t PAGE = 4096, ALIGNMENT = 256, TOTAL = size_t(16) << 30;
constexpr unsigned char POISON = 0xff; // not a number, in every floating-point type

struct Buffer {
    size_t bytes;
    char *base; // closed page, data up to its end, closed page
    size_t mapped;
};
std::map<char *, Buffer> buffers;
std::deque<Buffer> closed; // freed, and kept unreadable for a while
size_t used;

// The end of the data, rounded up to the alignment, is the end of a page; the next page is closed.
CUresult allocate(CUdeviceptr *out, size_t bytes) {
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    if (used + bytes > TOTAL) return CUDA_ERROR_OUT_OF_MEMORY;
    size_t whole = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, pages = (whole + PAGE - 1) / PAGE * PAGE;
    auto base = static_cast<char *>(
        mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED || mprotect(base + PAGE, pages, PROT_READ | PROT_WRITE)) return CUDA_ERROR_OUT_OF_MEMORY;
    char *data = base + PAGE + pages - whole;
    memset(data, POISON, whole);
    buffers[data] = {bytes, base, pages + 2 * PAGE};
    used += bytes;
    *out = reinterpret_cast<CUdeviceptr>(data);
    return CUDA_SUCCESS;
}

void release(CUdeviceptr pointer) {
    auto data = reinterpret_cast<char *>(pointer);
    auto found = buffers.find(data);
    if (found == buffers.end()) misuse("freed what is no buffer, or no longer: %p", static_cast<void *>(data));
    Buffer buffer = found->second;
    for (char *p = data + buffer.bytes; p < buffer.base + buffer.mapped - PAGE; p++)
        if (static_cast<unsigned char>(*p) != POISON)
            misuse("something wrote %zd bytes behind a buffer of %zu bytes", p - data - buffer.bytes, buffer.bytes);
    buffers.erase(found);
    used -= buffer.bytes;
    mmap(buffer.base, buffer.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    closed.push_back(buffer);
    if (closed.size() > 4096) {
        munmap(closed.front().base, closed.front().mapped);
        closed.pop_front();
    }
}

// ---- streams and graphs

struct Graph {
    std::vector<std::function<void()>> work;
    std::vector<CUdeviceptr> freed; // by the captured work: its memory belongs to the graph as long as that lives
    ~Graph() {
        for (auto pointer : freed) release(pointer);
    }
};
using SharedGraph = std::shared_ptr<Graph>;

struct Stream {
    SharedGraph capture;
    bool spoiled = false; // by a call that cannot be captured
    CUstreamCaptureMode mode;
};
// Captures that forbid calls outside of their stream: of any thread, or of this one.
unsigned captures_of_all;
thread_local unsigned captures_of_this;
unsigned &captures(CUstreamCaptureMode mode) {
    static unsigned relaxed;
    return mode == CU_STREAM_CAPTURE_MODE_GLOBAL         ? captures_of_all
           : mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL ? captures_of_this
                                                         : relaxed;
}

Stream &stream_of(CUstream handle) {
    static Stream legacy;
    static thread_local Stream own;
    if (handle == nullptr || handle == CU_STREAM_LEGACY) return legacy;
    if (handle == CU_STREAM_PER_THREAD) return own;
    return *reinterpret_cast<Stream *>(handle);
}

CUresult refuse(CUresult code, const char *why) {
    fprintf(stderr, "software GPU: refused: %s\n", why);
    return code;
}

#define NOT_WHILE_CAPTURING(what)                                                                                      \
    if (captures_of_all + captures_of_this)                                                                            \
    return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, what " while a stream is captured")

// ---- kernels

// Of each library of kernels, by name. Two modules may have kernels of the same name.
using Library = std::map<std::string, Kernel>;
std::map<std::string, Library> &libraries() {
    static std::map<std::string, Library> all;
    return all;
}

struct Function {
    Kernel kernel;
    unsigned most_threads = 1024;
    size_t static_shared = 0, most_dynamic = 0; // of dynamic shared memory, where a limit was asked for
};
struct Module {
    std::string text;
    const Library *library = nullptr;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

// The library compiled from the source of this PTX: the one that has all of its kernels.
const Library *library_of(const std::string &text) {
    static const std::regex entry(R"(\.entry (\w+)\()");
    std::sregex_iterator first(text.begin(), text.end(), entry), none;
    for (auto &[file, library] : libraries())
        if (std::all_of(first, none, [&](auto &name) { return library.count(name[1]); })) return &library;
    return nullptr;
}

// What the PTX says of a kernel: the threads it is compiled for, its static shared memory.
void read_ptx(const std::string &text, Function &function) {
    size_t begin = text.find(".entry " + std::string(function.kernel.name) + "(");
    size_t end = text.find("\n}", begin);
    std::string body = text.substr(begin, end - begin);
    std::smatch match;
    if (std::regex_search(body, match, std::regex(R"(\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?)"))) {
        function.most_threads = 1;
        for (int i = 1; i <= 3; i++)
            if (match[i].matched) function.most_threads *= std::stoul(match[i]);
    }
    static const std::regex shared(R"(\.shared \.align \d+ \.b(\d+) ([\w$]+)(?:\[(\d+)\])?)");
    for (std::sregex_iterator variable(text.begin(), text.end(), shared), none; variable != none; ++variable)
        if (body.find((*variable)[2]) != std::string::npos)
            function.static_shared +=
                std::stoul((*variable)[1]) / 8 * ((*variable)[3].matched ? std::stoul((*variable)[3]) : 1);
}

void open_kernels() {
    static bool done;
    if (done) return;
    done = true;
    Dl_info self;
    dladdr(reinterpret_cast<void *>(open_kernels), &self);
    std::string folder = self.dli_fname;
    folder.resize(folder.rfind('/'));
    glob_t found;
    if (glob((folder + "/kernels/*.so").c_str(), 0, nullptr, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc; i++)
            if (!dlopen(found.gl_pathv[i], RTLD_NOW | RTLD_LOCAL)) misuse("%s", dlerror());
    fprintf(stderr, "software GPU: kernels of %zu files in %s\n", libraries().size(), folder.c_str());
}

CUresult launch(CUfunction handle, dim3 blocks, dim3 threads, size_t shared, CUstream stream, void **arguments) {
    auto &function = *reinterpret_cast<Function *>(handle);
    size_t count = size_t(threads.x) * threads.y * threads.z;
    char why[200];
    if (!count || !blocks.x || !blocks.y || !blocks.z) {
        snprintf(why, sizeof why, "`%s` launched with no blocks or no threads", function.kernel.name);
        return refuse(CUDA_ERROR_INVALID_VALUE, why);
    }
    if (blocks.x > 2147483647 || blocks.y > 65535 || blocks.z > 65535 || threads.z > 64 ||
        count > function.most_threads) {
        snprintf(
            why, sizeof why,
            "`%s` launched with (%u, %u, %u) blocks of %zu threads; it takes %u threads, and 65535 blocks in y and z",
            function.kernel.name, blocks.x, blocks.y, blocks.z, count, function.most_threads);
        return refuse(CUDA_ERROR_INVALID_VALUE, why);
    }
    if (function.most_dynamic ? shared > function.most_dynamic : shared + function.static_shared > 48 << 10) {
        snprintf(
            why, sizeof why,
            "`%s` launched with %zu + %zu bytes of shared memory; 49152 in all, or as much as was asked for before",
            function.kernel.name, function.static_shared, shared);
        return refuse(CUDA_ERROR_INVALID_VALUE, why);
    }
    Launch launch{function.kernel.name,           blocks, threads, shared, function.kernel.shared,
                  function.kernel.bind(arguments)};
    submit(stream, [launch] { run(launch); });
    return CUDA_SUCCESS;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Device {
} device;
thread_local CUcontext context;
auto only_context = reinterpret_cast<CUcontext>(&device);

} // namespace

namespace software {

Announce::Announce(Kernel kernel) {
    Dl_info library;
    dladdr(reinterpret_cast<void *>(kernel.bind), &library);
    libraries()[library.dli_fname].emplace(kernel.name, kernel);
}

void submit(CUstream handle, std::function<void()> work) {
    std::lock_guard guard(mutex);
    Stream &stream = stream_of(handle);
    if (stream.capture)
        stream.capture->work.push_back(std::move(work));
    else
        work();
}

void check(const void *memory, size_t bytes, const char *what) {
    std::lock_guard guard(mutex);
    if (!bytes) return;
    auto data = static_cast<char *>(const_cast<void *>(memory));
    auto after = buffers.upper_bound(data);
    if (after == buffers.begin()) misuse("%s: %p is no device memory", what, memory);
    auto &[begin, buffer] = *--after;
    if (data + bytes > begin + buffer.bytes)
        misuse("%s: %zu bytes at %p, but the buffer of %zu bytes begins at %p", what, bytes, memory, buffer.bytes,
               static_cast<void *>(begin));
}

} // namespace software

extern "C" {

CUresult cuInit(unsigned) {
    std::lock_guard guard(mutex);
    open_kernels();
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult code, const char **text) {
    switch (code) {
    case CUDA_SUCCESS: *text = "CUDA_SUCCESS"; break;
    case CUDA_ERROR_INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
    case CUDA_ERROR_OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case CUDA_ERROR_NO_DEVICE: *text = "CUDA_ERROR_NO_DEVICE"; break;
    case CUDA_ERROR_INVALID_DEVICE: *text = "CUDA_ERROR_INVALID_DEVICE"; break;
    case CUDA_ERROR_NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; break;
    case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: *text = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
    case CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: *text = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
    default: *text = "an error of the software GPU";
    }
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult code, const char **text) { return cuGetErrorName(code, text); }

// ---- the device

CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *out, int ordinal) {
    if (ordinal) return CUDA_ERROR_INVALID_DEVICE;
    return *out = 0, CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char *name, int bytes, CUdevice) {
    return snprintf(name, bytes, "software GPU"), CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice) { return memset(uuid, 0, sizeof *uuid), CUDA_SUCCESS; }
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice) { return *bytes = TOTAL, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) { // those of an H100 but for its 132 processors
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 8; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice) { return *out = only_context, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *out) { return *out = context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext wanted) { return context = wanted, CUDA_SUCCESS; }
CUresult cuCtxSetFlags(unsigned) { return CUDA_SUCCESS; }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, CUDA_SUCCESS; }
CUresult cuCtxSynchronize(void) {
    NOT_WHILE_CAPTURING("synchronising");
    return CUDA_SUCCESS;
}
CUresult cuProfilerStart(void) { return CUDA_SUCCESS; }
CUresult cuProfilerStop(void) { return CUDA_SUCCESS; }

// ---- memory

CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    std::lock_guard guard(mutex);
    return *free = TOTAL - used, *total = TOTAL, CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t bytes) {
    std::lock_guard guard(mutex);
    NOT_WHILE_CAPTURING("allocating outside of the stream");
    return allocate(out, bytes);
}
CUresult cuMemAllocAsync(CUdeviceptr *out, size_t bytes, CUstream) {
    std::lock_guard guard(mutex);
    return allocate(out, bytes);
}
CUresult cuMemFree_v2(CUdeviceptr pointer) {
    std::lock_guard guard(mutex);
    return release(pointer), CUDA_SUCCESS;
}
CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream handle) {
    std::lock_guard guard(mutex);
    Stream &stream = stream_of(handle);
    if (stream.capture)
        stream.capture->freed.push_back(pointer);
    else
        release(pointer);
    return CUDA_SUCCESS;
}
CUresult cuMemHostAlloc(void **out, size_t bytes, unsigned) { return *out = malloc(bytes), CUDA_SUCCESS; }
CUresult cuMemFreeHost(void *pointer) { return free(pointer), CUDA_SUCCESS; }
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice) {
    return *pool = reinterpret_cast<CUmemoryPool>(&device), CUDA_SUCCESS;
}
CUresult cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice device) { return cuDeviceGetDefaultMemPool(pool, device); }
CUresult cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void *) { return CUDA_SUCCESS; }
CUresult cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute attribute, void *value) {
    bool threshold = attribute == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    return *static_cast<cuuint64_t *>(value) = threshold ? ~cuuint64_t(0) : used, CUDA_SUCCESS;
}
CUresult cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }

static CUresult copy(void *to, const void *from, size_t bytes, CUstream stream) {
    submit(stream, [=] { memcpy(to, from, bytes); });
    return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    check(reinterpret_cast<void *>(to), bytes, "a copy to the device");
    return copy(reinterpret_cast<void *>(to), from, bytes, stream);
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    check(reinterpret_cast<void *>(from), bytes, "a copy from the device");
    return copy(to, reinterpret_cast<void *>(from), bytes, stream);
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    check(reinterpret_cast<void *>(to), bytes, "a copy on the device, its end");
    check(reinterpret_cast<void *>(from), bytes, "a copy on the device, its source");
    return copy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes, stream);
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    NOT_WHILE_CAPTURING("a copy that waits");
    return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
}
CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    NOT_WHILE_CAPTURING("a copy that waits");
    return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
}
CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    NOT_WHILE_CAPTURING("a copy that waits");
    return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr);
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    check(reinterpret_cast<void *>(to), bytes, "filling");
    submit(stream, [=] { memset(reinterpret_cast<void *>(to), value, bytes); });
    return CUDA_SUCCESS;
}
CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
    return cuMemsetD8Async(to, value, bytes, nullptr);
}
CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    check(reinterpret_cast<void *>(to), count * 4, "filling");
    submit(stream, [=] { std::fill_n(reinterpret_cast<unsigned *>(to), count, value); });
    return CUDA_SUCCESS;
}

// ---- streams, events, graphs

CUresult cuStreamCreate(CUstream *out, unsigned) { return *out = reinterpret_cast<CUstream>(new Stream), CUDA_SUCCESS; }
CUresult cuStreamCreateWithPriority(CUstream *out, unsigned flags, int) { return cuStreamCreate(out, flags); }
CUresult cuStreamDestroy_v2(CUstream stream) { return delete reinterpret_cast<Stream *>(stream), CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream handle) {
    std::lock_guard guard(mutex);
    Stream &stream = stream_of(handle);
    if (!stream.capture) return CUDA_SUCCESS;
    stream.spoiled = true;
    return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "synchronising a stream that is captured");
}
CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned) { return CUDA_SUCCESS; }
CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data) {
    submit(stream, [=] { function(data); });
    return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent *out, unsigned) { return *out = reinterpret_cast<CUevent>(new double(0)), CUDA_SUCCESS; }
CUresult cuEventDestroy_v2(CUevent event) { return delete reinterpret_cast<double *>(event), CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent event, CUstream stream) {
    submit(stream, [=] { *reinterpret_cast<double *>(event) = seconds(); });
    return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent) {
    NOT_WHILE_CAPTURING("waiting for an event");
    return CUDA_SUCCESS;
}
CUresult cuEventQuery(CUevent) { return CUDA_SUCCESS; }
CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent from, CUevent to) {
    *milliseconds = 1e3 * (*reinterpret_cast<double *>(to) - *reinterpret_cast<double *>(from));
    return CUDA_SUCCESS;
}
CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    std::lock_guard guard(mutex);
    Stream &stream = stream_of(handle);
    if (&stream == &stream_of(nullptr))
        return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "capturing the default stream");
    if (stream.capture) return CUDA_ERROR_ILLEGAL_STATE;
    stream.capture = std::make_shared<Graph>();
    stream.spoiled = false;
    captures(stream.mode = mode)++;
    return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream handle, CUgraph *out) {
    std::lock_guard guard(mutex);
    Stream &stream = stream_of(handle);
    *out = nullptr;
    if (!stream.capture) return CUDA_ERROR_ILLEGAL_STATE;
    captures(stream.mode)--;
    SharedGraph graph = std::move(stream.capture);
    stream.capture = nullptr;
    if (stream.spoiled) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    *out = reinterpret_cast<CUgraph>(new SharedGraph(graph));
    return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
    std::lock_guard guard(mutex);
    *status = stream_of(handle).capture ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph graph, unsigned long long) {
    return *out = reinterpret_cast<CUgraphExec>(new SharedGraph(*reinterpret_cast<SharedGraph *>(graph))), CUDA_SUCCESS;
}
CUresult cuGraphUpload(CUgraphExec, CUstream) { return CUDA_SUCCESS; }
CUresult cuGraphLaunch(CUgraphExec graph, CUstream stream) {
    for (auto &work : (*reinterpret_cast<SharedGraph *>(graph))->work) submit(stream, work);
    return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
    std::lock_guard guard(mutex);
    return delete reinterpret_cast<SharedGraph *>(graph), CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec graph) { return cuGraphDestroy(reinterpret_cast<CUgraph>(graph)); }

// ---- kernels

CUresult cuModuleLoadData(CUmodule *out, const void *image) {
    std::lock_guard guard(mutex);
    auto module = new Module;
    module->text = static_cast<const char *>(image);
    module->library = library_of(module->text);
    return *out = reinterpret_cast<CUmodule>(module), CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return delete reinterpret_cast<Module *>(module), CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *out, CUmodule handle, const char *name) {
    std::lock_guard guard(mutex);
    auto &module = *reinterpret_cast<Module *>(handle);
    if (module.text.find(".entry " + std::string(name) + "(") == std::string::npos)
        return refuse(CUDA_ERROR_NOT_FOUND, ("no kernel `" + std::string(name) + "` in this module").c_str());
    if (!module.library)
        return refuse(CUDA_ERROR_NOT_FOUND,
                      ("the module of `" + std::string(name) + "` is not compiled for the software GPU").c_str());
    auto &function = module.functions[name];
    if (!function) {
        function = std::make_unique<Function>(Function{module.library->at(name)});
        read_ptx(module.text, *function);
    }
    return *out = reinterpret_cast<CUfunction>(function.get()), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction handle) {
    auto &function = *reinterpret_cast<Function *>(handle);
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function.most_threads; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function.static_shared; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
        *value = function.most_dynamic ? function.most_dynamic : (48 << 10) - function.static_shared;
        break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    auto &function = *reinterpret_cast<Function *>(handle);
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value < 0 || value + function.static_shared > 227 << 10)
            return refuse(CUDA_ERROR_INVALID_VALUE, "more than 227 KiB of shared memory");
        function.most_dynamic = value;
    }
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, CUfunction handle, int threads,
                                                              size_t shared, unsigned) {
    auto &function = *reinterpret_cast<Function *>(handle);
    size_t by_memory = (228 << 10) / (shared + function.static_shared + 1024);
    return *blocks = std::min<size_t>({size_t(2048 / std::max(threads, 1)), by_memory, 32}), CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
CUresult cuLaunchKernel(CUfunction function, unsigned bx, unsigned by, unsigned bz, unsigned tx, unsigned ty,
                        unsigned tz, unsigned shared, CUstream stream, void **arguments, void **) {
    return launch(function, {bx, by, bz}, {tx, ty, tz}, shared, stream, arguments);
}

} // extern "C"
