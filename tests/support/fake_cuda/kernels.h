// The package's kernels, compiled for the host: found by the name that nvcc gives them, which is the C++ compiler's too.
#pragma once

#include <functional>
#include <string>

namespace fake_cuda {

// A kernel as it is run: its one argument, by value as the launch found it.
struct Kernel {
  void (*call)(void* kernel, const void* argument);
  void* kernel;
  size_t argument_bytes;
};

// Null where the name is none of the package's kernels.
const Kernel* find_kernel(const std::string& mangled);

struct Geometry {
  unsigned grid;
  unsigned block;
  unsigned cluster;
  size_t dynamic_bytes;
  bool together;  // all blocks run at the same time, as in a cooperative launch
};

// Runs it on the engine, on memory of this device only. A fault of the kernel's is the runtime's.
void run_kernel(const std::string& name, const Kernel& kernel, const Geometry& geometry, int device,
                const void* argument);

}  // namespace fake_cuda
