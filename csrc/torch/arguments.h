// From tensors to the raw-pointer arguments of problem.h: every check of what a caller may pass, in one place.
//
// Nothing behind this is checked again: a tensor that passes is safe to read and write at every offset of its Problem.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../core/problem.h"

namespace bnk {

using OptionalTensor = std::optional<at::Tensor>;

// A dense copy-free view of an input: `tensor` is the input itself, or, where its strides are neither contiguous nor
// channels-last, its one copy in the memory format that torch suggests for it.
struct Input {
  at::Tensor tensor;
  Problem problem;
};

// Throws unless x is a dense (N, C, ...) tensor of a supported dtype.
Input describe_input(const at::Tensor& x);

// grad, dense in the layout of `input`. Throws unless it has the shape, dtype and device of input.
at::Tensor grad_like(const at::Tensor& grad, const Input& input);

// The same of what is added to the result.
at::Tensor residual_like(const at::Tensor& residual, const Input& input);

// A per-channel vector, checked: C elements on the device of x, of x's dtype or, for 16-bit x, float32. Not contiguous
// ones are copied, and `write_back` copies a changed one back and bumps its version counter.
class Vector {
 public:
  Vector() = default;
  Vector(const OptionalTensor& given, const char* name, const Input& input);
  // The same for data that is elsewhere: of `channels` channels and dtype `data`, on `device`.
  Vector(const OptionalTensor& given, const char* name, int64_t channels, at::ScalarType data, at::Device device);

  bool defined() const { return dense_.defined(); }
  at::ScalarType scalar_type() const { return dense_.scalar_type(); }
  PerChannel pointer() const;
  // Throws if write_back() could not write each element to a place of its own, apart from those of `other`.
  void check_writable(const Vector& other) const;
  // Throws if an element lies where one of `read` does, which a kernel may read after it has written this one.
  void check_apart(const at::Tensor& read) const;
  void check_apart(const Vector& read) const { check_apart(read.given_); }
  void write_back();

 private:
  at::Tensor given_;
  at::Tensor dense_;
};

// Both, neither or one of them may be there; if both are, they are of one dtype.
void check_same_dtype(const Vector& a, const char* a_name, const Vector& b, const char* b_name);

// Running statistics that a call updates: of one dtype, and each element at a place of its own. read: the other arguments.
template <typename... Read>
void check_updated(const Vector& running_mean, const Vector& running_var, const Read&... read) {
  check_same_dtype(running_mean, "running_mean", running_var, "running_var");
  running_mean.check_writable(running_var);
  running_var.check_writable(running_mean);
  (running_mean.check_apart(read), ...);
  (running_var.check_apart(read), ...);
}

// The saved statistics of a forward: C elements of accumulate_dtype on the device of x.
Vector saved_statistic(const at::Tensor& given, const char* name, const Input& input);

// The relu_bounds of a forward (ops.h), dense.
at::Tensor saved_relu_bounds(const at::Tensor& given, const Input& input);

// int64, one element, on the device of the input.
void check_counter(const OptionalTensor& counter, at::Device device);

// Doubles that came from other ranks, dense: throws unless they are (ranks, row), at least one rank, on `device`.
at::Tensor rank_rows(const at::Tensor& given, int64_t row, at::Device device);

// Throws unless the dtype is one that inputs may have.
Dtype to_dtype(at::ScalarType type);

// Tells autograd that the tensor's contents have changed.
void mark_changed(const at::Tensor& tensor);

// counter += 1, by an operation of the device's.
void count_batch(const at::Tensor& counter);

at::ScalarType to_scalar_type(Dtype dtype);

}  // namespace bnk
