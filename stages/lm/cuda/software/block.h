// How a block of threads runs on a processor: what the kernels' header (kernel.h) and the driver share.
//
// The threads of a block are fibers of one processor thread. A fiber runs until it waits for others or ends; so shared
// memory is what belongs to the processor thread. Order is where mistakes show: threads run in another order between
// any two barriers, and blocks in another order at every launch.
#pragma once
#include <cstddef>
#include <functional>
#include <vector_types.h>

namespace software {

struct Place { // of a thread: what a kernel knows of itself
    uint3 thread, block;
    dim3 threads, blocks;
    void *fiber;
};
extern thread_local Place *place __attribute__((tls_model("initial-exec")));

// Called by the last thread to arrive, with what each thread brought: null for those that do not take part.
using Finish = void (*)(void **brought, unsigned count);

// Waits until every living thread of the block has come; `finish` may be null.
void meet_block(void *brought, Finish finish);
// Waits until all lanes of `mask`, which includes this one, have come.
void meet_warp(unsigned mask, void *brought, Finish finish);

[[noreturn]] void misuse(const char *format, ...) __attribute__((format(printf, 1, 2)));

constexpr size_t GUARD = 1024;                   // bytes behind dynamic shared memory that nobody may touch
constexpr size_t DYNAMIC_BYTES = 232448 + GUARD; // what a library of kernels keeps for it

struct Kernel {
    const char *name;
    std::function<void()> (*bind)(void **arguments); // copies the arguments now, and returns what one thread runs
    char *(*shared)();                               // dynamic shared memory of this processor thread
};
// The kernels of a library announce themselves when it is opened.
struct Announce {
    explicit Announce(Kernel kernel);
};

struct Launch {
    const char *name;
    dim3 blocks, threads;
    size_t shared_bytes; // dynamic
    char *(*shared)();
    std::function<void()> body;
};
void run(const Launch &launch);

} // namespace software
