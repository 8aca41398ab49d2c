// Converts tensors to the raw-pointer arguments of problem.h, and checks all arguments of the ops.
//
// The backends do not check again: a tensor that passes can be read and written at every offset of its Problem.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../core/problem.h"

namespace bnk {

using OptionalTensor = std::optional<at::Tensor>;

// A dense input: `tensor` is the input itself or, if its strides are neither contiguous nor channels-last, a copy in
// the memory format that torch suggests for it.
struct Input {
  at::Tensor tensor;
  Problem problem;
};

// Throws unless x is a dense (N, C, ...) tensor of a supported dtype.
Input describe_input(const at::Tensor& x);

// grad, dense in the layout of `input`. Throws unless it has the shape, dtype and device of `input`.
at::Tensor grad_like(const at::Tensor& grad, const Input& input);

// As grad_like, for the residual.
at::Tensor residual_like(const at::Tensor& residual, const Input& input);

// A checked per-channel vector: C elements on the device of x, of x's dtype or, for 16-bit x, float32. A non-contiguous
// vector is copied. After a kernel has written the vector, `write_back` copies the values back and bumps the version
// counter.
class ChannelVector {
 public:
  ChannelVector() = default;
  ChannelVector(const OptionalTensor& given, const char* name, const Input& input);
  // As above, without an input: `channels` channels of data of dtype `data`, on `device`.
  ChannelVector(const OptionalTensor& given, const char* name, int64_t channels, at::ScalarType data,
                at::Device device);

  bool defined() const { return dense_.defined(); }
  at::ScalarType scalar_type() const { return dense_.scalar_type(); }
  PerChannel pointer() const;
  // Throws unless write_back() can write each element to a distinct location, none of which belongs to `other`.
  void check_writable(const ChannelVector& other) const;
  // Throws if an element overlaps `read`, which a kernel may read after it has written this vector.
  void check_apart(const at::Tensor& read) const;
  void check_apart(const ChannelVector& read) const { check_apart(read.given_); }
  void write_back();

 private:
  at::Tensor given_;
  at::Tensor dense_;
};

// Throws if both vectors are defined and their dtypes differ.
void check_same_dtype(const ChannelVector& a, const char* a_name, const ChannelVector& b, const char* b_name);

// Checks running statistics that a call updates: same dtype, and each element at a distinct location. read: the other
// arguments.
template <typename... Read>
void check_updated(const ChannelVector& running_mean, const ChannelVector& running_var, const Read&... read) {
  check_same_dtype(running_mean, "running_mean", running_var, "running_var");
  running_mean.check_writable(running_var);
  running_var.check_writable(running_mean);
  (running_mean.check_apart(read), ...);
  (running_var.check_apart(read), ...);
}

// The saved statistics of a forward: C elements of accumulate_dtype on the device of x.
ChannelVector saved_statistic(const at::Tensor& given, const char* name, const Input& input);

// The relu_bounds of a forward (ops.h), dense.
at::Tensor saved_relu_bounds(const at::Tensor& given, const Input& input);

// int64, one element, on the device of the input.
void check_counter(const OptionalTensor& counter, at::Device device);

// The rows that the ranks exchanged, dense. Throws unless they are float64 of shape (ranks, row), with at least one
// rank, on `device`.
at::Tensor rank_rows(const at::Tensor& given, int64_t row, at::Device device);

// Throws unless the dtype is supported for inputs.
Dtype to_dtype(at::ScalarType type);

// Bumps the version counter, so that autograd detects the change.
void mark_changed(const at::Tensor& tensor);

// counter += 1, as an operation on its device.
void count_batch(const at::Tensor& counter);

at::ScalarType to_scalar_type(Dtype dtype);

}  // namespace bnk
