// Two-pass kernels for double.
#include "instantiate.h"

template bnk::Kernel<bnk::StatisticsParams> bnk::statistics_of<double>(bnk::Layout);
template bnk::Kernel<bnk::NormalizeParams> bnk::normalize_of<double>(bnk::Layout, bool);
template bnk::Kernel<bnk::GradSumsParams> bnk::grad_sums_of<double>(bnk::Layout, bool);
template bnk::Kernel<bnk::GradInputParams> bnk::grad_input_of<double>(bnk::Layout, bool);
