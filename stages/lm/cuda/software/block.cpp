#include "block.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

namespace software {

thread_local Place *place;

namespace {

constexpr size_t STACK = 256 << 10;
constexpr unsigned MOST_THREADS = 1024;
constexpr unsigned char POISON = 0xff; // all bits set: not a number in every floating-point type

enum class State { Ready, AtBarrier, AtWarp, Done };

struct Fiber {
    Place place;
    State state;
    void *stack = nullptr;
    void *pointer; // saved stack pointer
    unsigned mask;
    void *brought;
    Finish finish;
};

// Saves what a function call must keep, and continues on the other stack.
extern "C" void software_switch(void **save, void *load);
asm(R"(
.text
.type software_switch, @function
software_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// One processor thread and the block it runs.
struct Processor {
    std::vector<void *> stacks;
    std::vector<Fiber> fibers{MOST_THREADS};
    std::vector<unsigned> ready, turn;
    const Launch *launch;
    unsigned count, alive, waiting;
    void *home; // saved stack pointer of the scheduler
    uint64_t random;

    uint64_t draw() { // splitmix64
        uint64_t z = random += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }

    Fiber &current() { return *static_cast<Fiber *>(place->fiber); }
    void enter(Fiber &fiber);
    void leave() { software_switch(&current().pointer, home); }
    void release_block();
    void release_warp(unsigned warp, unsigned mask);
    void run_block(dim3 block);
    [[noreturn]] void stuck();
};
thread_local Processor *processor;

[[noreturn]] void fiber_main() {
    Processor &p = *processor;
    p.launch->body();
    Fiber &fiber = p.current();
    fiber.state = State::Done;
    software_switch(&fiber.pointer, p.home);
    __builtin_unreachable();
}

void *new_stack() {
    // The lowest page stays closed: a kernel that needs more stack stops instead of writing into a neighbour.
    auto base = static_cast<char *>(
        mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0));
    if (base == MAP_FAILED || mprotect(base, 4096, PROT_NONE)) misuse("no memory for the threads of a block");
    return base + STACK;
}

void Processor::enter(Fiber &fiber) {
    if (!fiber.stack) {
        if (stacks.empty()) stacks.push_back(new_stack());
        fiber.stack = stacks.back();
        stacks.pop_back();
        auto top = static_cast<void **>(fiber.stack);
        *--top = nullptr; // a return address, so that the stack is aligned as at a call
        *--top = reinterpret_cast<void *>(fiber_main);
        fiber.pointer = top - 6; // registers that the switch restores
    }
    place = &fiber.place;
    software_switch(&home, fiber.pointer);
    if (fiber.state == State::Done) {
        stacks.push_back(fiber.stack);
        fiber.stack = nullptr;
        alive--;
    }
}

void Processor::release_block() {
    void *brought[MOST_THREADS] = {};
    Finish finish = nullptr;
    for (unsigned t = 0; t < count; t++)
        if (fibers[t].state == State::AtBarrier) {
            if (ready.size() && fibers[t].finish != finish) misuse("threads of a block meet at different operations");
            finish = fibers[t].finish;
            brought[t] = fibers[t].brought;
            fibers[t].state = State::Ready;
            ready.push_back(t);
        }
    waiting = 0;
    if (finish) finish(brought, count);
}

void Processor::release_warp(unsigned warp, unsigned mask) {
    void *brought[32] = {};
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) {
            Fiber &fiber = fibers[warp * 32 + lane];
            if (fiber.finish != current().finish) misuse("lanes of a warp meet at different operations");
            brought[lane] = fiber.brought;
            fiber.state = State::Ready;
            ready.push_back(warp * 32 + lane);
        }
    if (current().finish) current().finish(brought, 32);
}

void Processor::stuck() {
    std::string where;
    for (unsigned t = 0; t < count; t++) {
        const char *what = fibers[t].state == State::AtBarrier ? "at __syncthreads" : "at a warp operation";
        if (fibers[t].state == State::Done) continue;
        char line[120];
        snprintf(line, sizeof line, "\n    thread %u %s, mask %08x", t, what,
                 fibers[t].state == State::AtWarp ? fibers[t].mask : 0);
        if (where.size() < 1500) where += line;
    }
    misuse("threads wait for others that never come:%s", where.c_str());
}

// The shared memory of a kernel's library: its thread-local variables, all of which are shared variables of kernels.
struct Range {
    char *begin = nullptr;
    size_t bytes = 0;
};
Range shared_variables(const void *code) {
    struct Search {
        uintptr_t code;
        Range found;
    } search{reinterpret_cast<uintptr_t>(code), {}};
    dl_iterate_phdr(
        [](dl_phdr_info *info, size_t, void *data) {
            auto &search = *static_cast<Search *>(data);
            size_t tls = 0;
            bool inside = false;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                auto &header = info->dlpi_phdr[i];
                uintptr_t begin = info->dlpi_addr + header.p_vaddr;
                if (header.p_type == PT_TLS) tls = header.p_memsz;
                if (header.p_type == PT_LOAD) inside |= search.code >= begin && search.code < begin + header.p_memsz;
            }
            if (inside && info->dlpi_tls_data) search.found = {static_cast<char *>(info->dlpi_tls_data), tls};
            return int(inside);
        },
        &search);
    return search.found;
}

void Processor::run_block(dim3 block) {
    count = launch->threads.x * launch->threads.y * launch->threads.z;
    alive = count;
    waiting = 0;

    // Nothing that an earlier block left in shared memory can be used by mistake. Dynamic memory lies among the
    // variables of the library, and only as much of it as this launch asked for is worth the time.
    char *dynamic = launch->shared();
    Range variables = shared_variables(reinterpret_cast<const void *>(launch->shared));
    memset(variables.begin, POISON, dynamic - variables.begin);
    memset(dynamic, POISON, launch->shared_bytes + GUARD);
    char *behind = dynamic + DYNAMIC_BYTES;
    memset(behind, POISON, variables.begin + variables.bytes - behind);

    ready.clear();
    dim3 size = launch->threads;
    for (unsigned t = 0; t < count; t++) {
        Fiber &fiber = fibers[t];
        fiber.place = {{t % size.x, t / size.x % size.y, t / size.x / size.y},
                       {block.x, block.y, block.z},
                       size,
                       launch->blocks,
                       &fiber};
        fiber.state = State::Ready;
        ready.push_back(t);
    }
    while (alive) {
        if (ready.empty()) {
            if (waiting && waiting == alive)
                release_block();
            else
                stuck();
        }
        turn.swap(ready);
        ready.clear();
        // A walk over all with a random start and a random stride that shares no factor with their number.
        size_t n = turn.size(), at = draw() % n, stride = 1 + draw() % n;
        while (std::gcd(stride, n) != 1) stride++;
        for (size_t i = 0; i < n; i++, at = (at + stride) % n) enter(fibers[turn[at]]);
        if (waiting && waiting == alive) release_block();
    }
    for (size_t i = 0; i < GUARD; i++)
        if (static_cast<unsigned char>(dynamic[launch->shared_bytes + i]) != POISON)
            misuse("wrote %zu bytes past the %zu bytes of its dynamic shared memory", i + 1, launch->shared_bytes);
}

// Processor threads that live as long as the program, so that blocks find their stacks and shared memory again.
class Pool {
    std::mutex mutex;
    std::condition_variable wake, finished;
    const std::function<void()> *work = nullptr;
    uint64_t round = 0;
    unsigned size, busy = 0;

    void serve() {
        Processor own;
        processor = &own;
        std::vector<char> stack(64 << 10); // for the signal handler: a fiber's own may be what is full
        stack_t alternative{stack.data(), 0, stack.size()};
        sigaltstack(&alternative, nullptr);
        std::unique_lock lock(mutex);
        for (uint64_t seen = 0;;) {
            wake.wait(lock, [&] { return round != seen; });
            seen = round;
            lock.unlock();
            (*work)();
            place = nullptr;
            lock.lock();
            if (!--busy) finished.notify_one();
        }
    }

  public:
    Pool() {
        const char *asked = getenv("SOFTWARE_GPU_THREADS");
        size = asked ? std::max(1, atoi(asked)) : std::min(8u, std::max(1u, std::thread::hardware_concurrency()));
        for (unsigned i = 0; i < size; i++) std::thread([this] { serve(); }).detach();
    }
    void run(const std::function<void()> &job) {
        std::unique_lock lock(mutex);
        work = &job;
        busy = size;
        round++;
        wake.notify_all();
        finished.wait(lock, [&] { return !busy; });
    }
};

struct sigaction others_fault;
void fault(int signal, siginfo_t *info, void *context) {
    if (place) misuse("memory that is not there, or no longer: address %p", info->si_addr);
    if (others_fault.sa_flags & SA_SIGINFO) return others_fault.sa_sigaction(signal, info, context);
    sigaction(signal, &others_fault, nullptr); // and the fault happens again, under the handler that was there before
}

} // namespace

void meet_block(void *brought, Finish finish) {
    Processor &p = *processor;
    Fiber &fiber = p.current();
    fiber.state = State::AtBarrier;
    fiber.brought = brought;
    fiber.finish = finish;
    p.waiting++;
    p.leave();
}

void meet_warp(unsigned mask, void *brought, Finish finish) {
    Processor &p = *processor;
    Fiber &fiber = p.current();
    unsigned thread = &fiber - p.fibers.data(), warp = thread / 32, lane = thread % 32;
    unsigned lanes = std::min(32u, p.count - warp * 32);
    if (lanes < 32 && mask == ~0u) mask = (1u << lanes) - 1; // the last warp of a block that is no multiple of 32
    if (!(mask >> lane & 1)) misuse("a warp operation whose mask %08x leaves its own lane %u out", mask, lane);
    fiber.state = State::AtWarp;
    fiber.mask = mask;
    fiber.brought = brought;
    fiber.finish = finish;
    bool all = true;
    for (unsigned l = 0; l < 32 && all; l++)
        if (mask >> l & 1) {
            Fiber &other = p.fibers[warp * 32 + l];
            if (l >= lanes || other.state == State::Done)
                misuse("a warp operation whose mask %08x names lane %u, which %s", mask, l,
                       l >= lanes ? "is none" : "has ended");
            all = other.state == State::AtWarp && other.mask == mask;
        }
    if (all) p.release_warp(warp, mask);
    p.leave();
}

void misuse(const char *format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "software GPU: ");
    if (place && processor)
        fprintf(stderr, "kernel `%s`, block (%u, %u, %u), thread (%u, %u, %u): ", processor->launch->name,
                place->block.x, place->block.y, place->block.z, place->thread.x, place->thread.y, place->thread.z);
    fprintf(stderr, "%s\n", text);
    fflush(nullptr);
    _exit(134);
}

void run(const Launch &launch) {
    static std::mutex one_at_a_time;
    static uint64_t launches;
    static Pool *pool;
    std::lock_guard guard(one_at_a_time);
    if (!pool) {
        pool = new Pool;
        struct sigaction ours{};
        ours.sa_sigaction = fault;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &ours, &others_fault);
    }
    uint64_t seed = ++launches * 0x2545f4914f6cdd1d;
    uint64_t count = uint64_t(launch.blocks.x) * launch.blocks.y * launch.blocks.z;
    std::atomic<uint64_t> next{0};
    uint64_t start = seed % count, stride = 1 + (seed >> 20) % count;
    while (std::gcd(stride, count) != 1) stride++;
    pool->run([&] {
        processor->launch = &launch;
        for (uint64_t i; (i = next++) < count;) {
            uint64_t block = (start + i * stride) % count;
            processor->random = seed ^ block;
            processor->run_block({unsigned(block % launch.blocks.x),
                                  unsigned(block / launch.blocks.x % launch.blocks.y),
                                  unsigned(block / launch.blocks.x / launch.blocks.y)});
        }
    });
}

} // namespace software
