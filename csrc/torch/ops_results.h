// What the ops have in common: their tags, how they are found, and what they allocate their results with.
#pragma once

#include <ATen/ops/empty.h>

#include <tuple>
#include <vector>

#include "arguments.h"
#include "result_memory.h"

namespace bnk {

// Of every op. flexible_layout: any strides are right, and results follow them. Without it a compiler that has made a model
// channels_last would bring every input back to the strides that it was traced with, and every result.
inline std::vector<at::Tag> op_tags() { return {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout}; }

// Of mean and invstd.
inline at::TensorOptions statistic_options(const Input& input) {
  return input.tensor.options().dtype(to_scalar_type(accumulate_dtype(input.problem.dtype)));
}

inline at::Tensor empty_statistic(int64_t size, const Input& input) {
  return empty_vector(size, accumulate_dtype(input.problem.dtype), input.tensor);
}

inline PerChannel pointer_to(const at::Tensor& statistic, const Input& input) {
  return {statistic.data_ptr(), accumulate_dtype(input.problem.dtype)};
}

// What a result is written to: of the input's shape and dtype, dense in its memory format, whatever the strides of its
// dimensions of size 1.
inline at::Tensor empty_result(const Input& input) { return empty_result_like(input.tensor); }

// The buffers of a functional op: copies, which it changes and returns in their place.
struct Changed {
  OptionalTensor running_mean;
  OptionalTensor running_var;
  OptionalTensor num_batches_tracked;

  Changed(const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& count)
      : running_mean(copy(mean)), running_var(copy(var)), num_batches_tracked(copy(count)) {}

  // A buffer that is not there is a tensor of size 0 in the results; its other properties are those of `like`.
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
