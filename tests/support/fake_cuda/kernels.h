// The package's kernels, compiled for the host. They are found by nvcc's mangled name, which is also the C++
// compiler's.
#pragma once

#include <functional>
#include <string>

namespace fake_cuda {

// A kernel and how to call it. Its one argument is copied by value at the launch.
struct Kernel {
  void (*call)(void* kernel, const void* argument);
  void* kernel;
  size_t argument_bytes;
};

// Null if the package has no kernel of that name.
const Kernel* find_kernel(const std::string& mangled);

struct Geometry {
  unsigned grid;
  unsigned block;
  unsigned cluster;
  size_t dynamic_bytes;
  bool together;  // all blocks are resident at the same time, as in a cooperative launch
};

// Runs a kernel on the engine; it may access only memory of `device`. A fault of the kernel becomes a fault of the
// runtime.
void run_kernel(const std::string& name, const Kernel& kernel, const Geometry& geometry, int device,
                const void* argument);

}  // namespace fake_cuda
