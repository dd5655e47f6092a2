// What the libraries that work on a device's memory share: the order of work in a stream.
#pragma once
#include <cuda.h>
#include <functional>

namespace software {

// Runs `work` now, or keeps it for the graph that `stream` captures.
void submit(CUstream stream, std::function<void()> work);

// Stops the program unless all of these bytes are device memory.
void check(const void *memory, size_t bytes, const char *what);

} // namespace software
