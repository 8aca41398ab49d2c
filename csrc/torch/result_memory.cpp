#include "result_memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <memory>
#include <new>

#include "../cpu/result_cache.h"
#include "arguments.h"

namespace bnk {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

// torch's memory profiler records blocks of the result cache like blocks of torch's own allocator.
void give_back(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  c10::profiledCPUMemoryReporter().Delete(block->data);
  cpu::give_memory_back(block->data, block->bytes);
}

// Allocates from the result cache, with torch's allocator as the fallback.
class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = cpu::take_memory(bytes);
    if (data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    Block* block = new (std::nothrow) Block{data, bytes};
    if (block == nullptr) {
      cpu::give_memory_back(data, bytes);
      throw std::bad_alloc();
    }
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, block, &give_back, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// torch.utils.deterministic.fill_uninitialized_memory: elements that are not written must be recognizable.
bool fills_fresh_memory() {
  const at::Context& context = at::globalContext();
  return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

}  // namespace

at::Tensor empty_result_like(const at::Tensor& x) {
  const at::MemoryFormat format = x.suggest_memory_format();
  if (!x.is_cpu() || fills_fresh_memory()) return at::empty_like(x, {}, format);
  static ResultAllocator& allocator = *new ResultAllocator;  // never destroyed: results may outlive static objects
  return at::detail::empty_generic(x.sizes(), &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), x.scalar_type(),
                                   format);
}

at::Tensor empty_vector(int64_t size, Dtype dtype, const at::Tensor& x) {
  const at::ScalarType type = to_scalar_type(dtype);
  if (!x.is_cpu() || fills_fresh_memory()) return at::empty({size}, x.options().dtype(type));
  return at::detail::empty_cpu({size}, type);
}

}  // namespace bnk
