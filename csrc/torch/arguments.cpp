#include "arguments.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

namespace bnk {
Dtype to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"batch_norm\" not implemented for '", at::toString(type),
                                  "': expected an input of dtype float64, float32, float16 or bfloat16");
  }
}

at::ScalarType to_scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return at::kDouble;
    case Dtype::kFloat32:
      return at::kFloat;
    case Dtype::kFloat16:
      return at::kHalf;
    default:
      return at::kBFloat16;
  }
}

Input describe_input(const at::Tensor& x) {
  TORCH_CHECK(x.dim() >= 2, "batch_norm: expected an input of at least 2 dimensions, (N, C, ...), but got ", x.dim(),
              ": ", x.sizes());
  TORCH_CHECK(x.layout() == at::kStrided, "batch_norm: expected a dense (strided) input, but got layout ", x.layout());
  const Dtype dtype = to_dtype(x.scalar_type());
  const at::MemoryFormat format = x.suggest_memory_format();
  Input input{x.resolve_neg().contiguous(format), {}};
  const int64_t batch = x.size(0);
  const int64_t channels = x.size(1);
  int64_t spatial = 1;
  for (int64_t dim = 2; dim < x.dim(); ++dim) spatial *= x.size(dim);
  if (format == at::MemoryFormat::Contiguous) {
    input.problem = {batch, channels, spatial, dtype};
  } else {
    input.problem = {batch * spatial, channels, 1, dtype};
  }
  return input;
}

namespace {

// who: the function, for error messages; what: the tensor, with its article.
at::Tensor dense_like(const at::Tensor& tensor, const Input& input, const char* who, const char* what) {
  const at::Tensor& x = input.tensor;
  TORCH_CHECK(tensor.sizes() == x.sizes(), who, ": expected ", what, " of shape ", x.sizes(), ", but got ",
              tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), who, ": expected ", what, " of dtype ", x.scalar_type(),
              ", but got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == x.device(), who, ": expected ", what, " on ", x.device(), ", but got one on ",
              tensor.device());
  return tensor.resolve_neg().contiguous(x.suggest_memory_format());
}

}  // namespace

at::Tensor grad_like(const at::Tensor& grad, const Input& input) {
  return dense_like(grad, input, "batch_norm backward", "a gradient");
}

at::Tensor residual_like(const at::Tensor& residual, const Input& input) {
  return dense_like(residual, input, "batch_norm", "a residual");
}

ChannelVector::ChannelVector(const OptionalTensor& given, const char* name, const Input& input)
    : ChannelVector(given, name, input.problem.channels, input.tensor.scalar_type(), input.tensor.device()) {}

ChannelVector::ChannelVector(const OptionalTensor& given, const char* name, int64_t channels, at::ScalarType data,
                             at::Device device) {
  if (!given.has_value() || !given->defined()) return;
  TORCH_CHECK(given->numel() == channels, name, " should contain ", channels, " elements not ", given->numel());
  TORCH_CHECK(given->device() == device, "batch_norm: expected ", name, " on the input's device, ", device,
              ", but got it on ", given->device());
  const at::ScalarType type = given->scalar_type();
  const bool sixteen_bit = size_of(to_dtype(data)) == 2;
  TORCH_CHECK(type == data || (sixteen_bit && type == at::kFloat), "batch_norm: expected ", name, " of dtype ", data,
              sixteen_bit ? " or Float" : "", " for an input of dtype ", data, ", but got ", type);
  given_ = *given;
  dense_ = given_.resolve_neg().contiguous();
}

PerChannel ChannelVector::pointer() const {
  if (!defined()) return {nullptr, Dtype::kFloat32};
  return {dense_.data_ptr(), to_dtype(dense_.scalar_type())};
}

namespace {

// The offsets of a tensor's elements in its storage, ascending.
std::vector<int64_t> places_of(const at::Tensor& tensor) {
  std::vector<int64_t> places{tensor.storage_offset()};
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    std::vector<int64_t> along;
    along.reserve(places.size() * static_cast<size_t>(tensor.size(dim)));
    for (const int64_t place : places) {
      for (int64_t i = 0; i < tensor.size(dim); ++i) along.push_back(place + i * tensor.stride(dim));
    }
    places.swap(along);
  }
  std::sort(places.begin(), places.end());
  return places;
}

// Whether two tensors of the same dtype share an element. at::assert_no_overlap only decides this for dense tensors.
bool share_an_element(const at::Tensor& a, const at::Tensor& b) {
  if (!a.storage().is_alias_of(b.storage()) || a.numel() == 0) return false;
  const std::vector<int64_t> of_a = places_of(a);
  const std::vector<int64_t> of_b = places_of(b);
  return std::any_of(of_a.begin(), of_a.end(),
                     [&](int64_t place) { return std::binary_search(of_b.begin(), of_b.end(), place); });
}

}  // namespace

void ChannelVector::check_writable(const ChannelVector& other) const {
  if (!defined()) return;
  at::assert_no_internal_overlap(given_);
  if (!other.defined()) return;
  at::assert_no_overlap(given_, other.given_);
  TORCH_CHECK(at::get_overlap_status(given_, other.given_) != at::MemOverlapStatus::TooHard ||
                  !share_an_element(given_, other.given_),
              "batch_norm: running_mean and running_var refer to a single memory location in some elements. Please "
              "clone() one of them");
}

void ChannelVector::check_apart(const at::Tensor& read) const {
  if (defined() && read.defined()) at::assert_no_overlap(given_, read);
}

void ChannelVector::write_back() {
  if (!defined()) return;
  if (!dense_.is_same(given_)) {
    // Autograd is the caller's responsibility, just as if the kernel wrote to the tensor directly.
    const at::AutoDispatchBelowADInplaceOrView guard;
    given_.copy_(dense_);
  }
  mark_changed(given_);
}

void check_same_dtype(const ChannelVector& a, const char* a_name, const ChannelVector& b, const char* b_name) {
  if (!a.defined() || !b.defined()) return;
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "batch_norm: expected ", a_name, " and ", b_name,
              " of one dtype, but got ", a.scalar_type(), " and ", b.scalar_type());
}

ChannelVector saved_statistic(const at::Tensor& given, const char* name, const Input& input) {
  const at::ScalarType expected = to_scalar_type(accumulate_dtype(input.problem.dtype));
  TORCH_CHECK(given.scalar_type() == expected, "batch_norm: expected ", name, " of dtype ", expected,
              ", as the forward returned it, but got ", given.scalar_type());
  // The saved statistics of 16-bit inputs are float32, which ChannelVector accepts in addition to the input's own dtype.
  return ChannelVector(given, name, input);
}

at::Tensor saved_relu_bounds(const at::Tensor& given, const Input& input) {
  const at::ScalarType expected = to_scalar_type(accumulate_dtype(input.problem.dtype));
  TORCH_CHECK(given.dim() == 2 && given.size(0) == 2 && given.size(1) == input.problem.channels &&
                  given.scalar_type() == expected && given.device() == input.tensor.device(),
              "batch_norm backward: expected a relu_bounds of shape [2, ", input.problem.channels, "] and dtype ",
              expected, " on ", input.tensor.device(), ", as the forward returned it, but got shape ", given.sizes(),
              " and dtype ", given.scalar_type(), " on ", given.device());
  return given.contiguous();
}

void check_counter(const OptionalTensor& counter, at::Device device) {
  if (!counter.has_value() || !counter->defined()) return;
  TORCH_CHECK(counter->scalar_type() == at::kLong && counter->numel() == 1,
              "batch_norm: expected num_batches_tracked to be one int64 value, but got shape ", counter->sizes(),
              " and dtype ", counter->scalar_type());
  TORCH_CHECK(counter->device() == device, "batch_norm: expected num_batches_tracked on the input's device, ", device,
              ", but got it on ", counter->device());
}

at::Tensor rank_rows(const at::Tensor& given, int64_t row, at::Device device) {
  TORCH_CHECK(given.dim() == 2 && given.size(0) >= 1 && given.size(1) == row && given.scalar_type() == at::kDouble,
              "sync_batch_norm: expected a row of ", row, " doubles from each rank, but got shape ", given.sizes(),
              " and dtype ", given.scalar_type());
  TORCH_CHECK(given.device() == device, "sync_batch_norm: expected the ranks' rows on the input's device, ", device,
              ", but got them on ", given.device());
  return given.contiguous();
}

void mark_changed(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

void count_batch(const at::Tensor& counter) {
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    counter.add_(1);
  }
  mark_changed(counter);
}

}  // namespace bnk
