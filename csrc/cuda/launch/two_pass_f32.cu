// Two-pass kernels for float.
#include "instantiate.h"

template bnk::Kernel<bnk::StatisticsParams> bnk::statistics_of<float>(bnk::Layout);
template bnk::Kernel<bnk::NormalizeParams> bnk::normalize_of<float>(bnk::Layout, bool);
template bnk::Kernel<bnk::GradSumsParams> bnk::grad_sums_of<float>(bnk::Layout, bool);
template bnk::Kernel<bnk::GradInputParams> bnk::grad_input_of<float>(bnk::Layout, bool);
