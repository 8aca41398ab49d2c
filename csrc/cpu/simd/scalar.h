// Scalar code: conversions of the 16-bit formats in plain C++, and access to per-channel vectors of any dtype.
//
// Results are the same on every machine: conversions to float are exact, conversions from float round to nearest even,
// and NaN stays NaN. The vector code (lanes.h) does the same in hardware; this code is its fallback, and reads and
// writes parameters.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../core/problem.h"

namespace bnk::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  // The 15 bits without the sign, shifted to float's position, are the value times 2^-112. Float's subnormals make this
  // hold for float16's subnormals too. Infinity and NaN (exponent 31) need float's all-ones exponent.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return float_of(sign | 0x7f800000u | magnitude);
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return {static_cast<uint16_t>((bits >> 16) | 0x0040u)};  // quiet; never rounded into infinity
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline Float16 to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more
  if (magnitude < 0x38800000u) {                                                 // below 2^-14: subnormal
    // Adding 0.5 leaves the value in units of 2^-24, rounded to nearest even, in the low bits of the sum.
    return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// Converts double to float with rounding to odd. Rounding the result to a 16-bit format then gives the same as rounding
// the double directly.
inline float to_odd_float(double value) {
  const float nearest = static_cast<float>(value);
  const double back = nearest;
  if (back == value || std::isnan(value)) return nearest;
  uint32_t bits = bits_of(nearest);
  if (std::fabs(back) > std::fabs(value)) bits -= 1;  // towards zero
  return float_of(bits | 1u);
}

inline double read(ConstPerChannel vector, int64_t channel) {
  switch (vector.dtype) {
    case Dtype::kFloat64:
      return static_cast<const double*>(vector.data)[channel];
    case Dtype::kFloat32:
      return static_cast<const float*>(vector.data)[channel];
    case Dtype::kFloat16:
      return to_float(static_cast<const Float16*>(vector.data)[channel]);
    case Dtype::kBFloat16:
      return to_float(static_cast<const BFloat16*>(vector.data)[channel]);
  }
  return 0;
}

// The value of an optional parameter.
inline double read_or(ConstPerChannel vector, int64_t channel, double otherwise) {
  return vector.data == nullptr ? otherwise : read(vector, channel);
}

// Rounds once, to nearest even. Does nothing if the vector is null.
inline void write(PerChannel vector, int64_t channel, double value) {
  if (vector.data == nullptr) return;
  switch (vector.dtype) {
    case Dtype::kFloat64:
      static_cast<double*>(vector.data)[channel] = value;
      break;
    case Dtype::kFloat32:
      static_cast<float*>(vector.data)[channel] = static_cast<float>(value);
      break;
    case Dtype::kFloat16:
      static_cast<Float16*>(vector.data)[channel] = to_float16(to_odd_float(value));
      break;
    case Dtype::kBFloat16:
      static_cast<BFloat16*>(vector.data)[channel] = to_bfloat16(to_odd_float(value));
      break;
  }
}

}  // namespace bnk::cpu
