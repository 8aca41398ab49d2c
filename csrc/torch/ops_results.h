// Common to all ops: their tags and the allocation of their results.
#pragma once

#include <ATen/ops/empty.h>

#include <tuple>
#include <vector>

#include "arguments.h"
#include "result_memory.h"

namespace bnk {

// The tags of every op. flexible_layout: the op accepts any strides, and results follow those of the input. Without it,
// a compiler that has converted a model to channels_last would restore every input and result to its traced strides.
inline std::vector<at::Tag> op_tags() { return {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout}; }

// Options of mean and invstd.
inline at::TensorOptions statistic_options(const Input& input) {
  return input.tensor.options().dtype(to_scalar_type(accumulate_dtype(input.problem.dtype)));
}

inline at::Tensor empty_statistic(int64_t size, const Input& input) {
  return empty_vector(size, accumulate_dtype(input.problem.dtype), input.tensor);
}

inline PerChannel pointer_to(const at::Tensor& statistic, const Input& input) {
  return {statistic.data_ptr(), accumulate_dtype(input.problem.dtype)};
}

// An uninitialized result of the input's shape and dtype, dense in its memory format. Strides of dimensions of size 1
// are not preserved.
inline at::Tensor empty_result(const Input& input) { return empty_result_like(input.tensor); }

// The buffers of a functional op: copies that the op updates and returns.
struct Changed {
  OptionalTensor running_mean;
  OptionalTensor running_var;
  OptionalTensor num_batches_tracked;

  Changed(const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& count)
      : running_mean(copy(mean)), running_var(copy(var)), num_batches_tracked(copy(count)) {}

  // A missing buffer becomes a tensor of size 0 with the options of `like`.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> or_empty(const at::Tensor& like) const {
    const auto or_none = [&](const OptionalTensor& tensor) {
      return tensor.has_value() ? *tensor : at::empty({0}, like.options());
    };
    return {or_none(running_mean), or_none(running_var), or_none(num_batches_tracked)};
  }

 private:
  static OptionalTensor copy(const OptionalTensor& tensor) {
    if (!tensor.has_value() || !tensor->defined()) return std::nullopt;
    return tensor->clone();
  }
};

}  // namespace bnk
