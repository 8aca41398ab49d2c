// Two-pass kernels for float16.
#include "instantiate.h"

template bnk::Kernel<bnk::StatisticsParams> bnk::statistics_of<bnk::Half>(bnk::Layout);
template bnk::Kernel<bnk::NormalizeParams> bnk::normalize_of<bnk::Half>(bnk::Layout, bool);
template bnk::Kernel<bnk::GradSumsParams> bnk::grad_sums_of<bnk::Half>(bnk::Layout, bool);
template bnk::Kernel<bnk::GradInputParams> bnk::grad_input_of<bnk::Half>(bnk::Layout, bool);
