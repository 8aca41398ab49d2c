// Dispatch: maps a dtype, a layout or a flag known at run time to a template argument.
#pragma once

#include <type_traits>

#include "../../plan/plan.h"
#include "../ptx.cuh"

namespace bnk {

template <typename T>
struct TypeTag {
  using type = T;
};
template <Layout kLayout>
using LayoutTag = std::integral_constant<Layout, kLayout>;

// Calls body(TypeTag<T>) with the element type.
template <typename Body>
void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat64:
      return body(TypeTag<double>());
    case Dtype::kFloat32:
      return body(TypeTag<float>());
    case Dtype::kFloat16:
      return body(TypeTag<Half>());
    case Dtype::kBFloat16:
      return body(TypeTag<BFloat16>());
  }
}

// Returns body(LayoutTag<kLayout>) for the layouts that both paths support.
template <typename Body>
auto with_unpacked_layout(Layout layout, const Body& body) {
  if (layout == Layout::kChannelsLast) return body(LayoutTag<Layout::kChannelsLast>());
  return body(LayoutTag<Layout::kChannelsFirst>());
}

// Returns body(LayoutTag<kLayout>) for any layout.
template <typename Body>
auto with_layout(Layout layout, const Body& body) {
  if (layout == Layout::kPacked) return body(LayoutTag<Layout::kPacked>());
  return with_unpacked_layout(layout, body);
}

// Returns body(std::true_type()) or body(std::false_type()).
template <typename Body>
auto with_flag(bool flag, const Body& body) {
  if (flag) return body(std::true_type());
  return body(std::false_type());
}

}  // namespace bnk
