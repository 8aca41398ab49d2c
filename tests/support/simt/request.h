// Request: a request to run_kernels.cpp, as parsed from stdin.
#pragma once

#include <cstdlib>
#include <cstring>
#include <istream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "plan/plan.h"
#include "simt/buffers.h"
#include "simt/schedule.h"

namespace simt {

struct Tensor {
  std::string name;
  std::string mode;
  bnk::Dtype dtype;
  size_t sent;  // the last `sent` bytes are transferred
  std::unique_ptr<Buffer> buffer;
  std::vector<char> initial;

  char* content() const { return buffer->host<char>() + buffer->bytes() - sent; }

  void reset() {
    if (mode == "out") {
      buffer->poison();
    } else {
      std::memcpy(content(), initial.data(), sent);
    }
  }
};

inline bnk::Dtype dtype_named(const std::string& name) {
  static const std::map<std::string, bnk::Dtype> all{{"float64", bnk::Dtype::kFloat64},
                                                     {"float32", bnk::Dtype::kFloat32},
                                                     {"float16", bnk::Dtype::kFloat16},
                                                     {"bfloat16", bnk::Dtype::kBFloat16},
                                                     {"int64", bnk::Dtype::kFloat64}};  // only its size matters
  return all.at(name);
}

inline Schedule schedule_named(const std::string& name) {
  static const std::map<std::string, Schedule> all{{"seeded", Schedule::kSeeded},
                                                   {"in_order", Schedule::kInOrder},
                                                   {"reverse", Schedule::kReverse},
                                                   {"stall_one", Schedule::kStallOne}};
  return all.at(name);
}

struct Request {
  std::string operation;
  std::map<std::string, std::string> options;
  std::vector<Tensor> tensors;

  int64_t integer(const std::string& key, int64_t otherwise) const {
    const auto found = options.find(key);
    return found == options.end() ? otherwise : std::stoll(found->second);
  }
  double real(const std::string& key) const { return std::strtod(options.at(key).c_str(), nullptr); }

  const Tensor* find(const std::string& name) const {
    for (const Tensor& tensor : tensors) {
      if (tensor.name == name) return &tensor;
    }
    return nullptr;
  }
  void* data(const std::string& name) const {
    const Tensor* tensor = find(name);
    return tensor ? tensor->buffer->device<void>() : nullptr;
  }
  bnk::PerChannel vector(const std::string& name) const {
    const Tensor* tensor = find(name);
    return tensor ? bnk::PerChannel{tensor->buffer->device<void>(), tensor->dtype} : bnk::PerChannel{};
  }

  bnk::Problem problem() const {
    return {integer("outer", 0), integer("channels", 0), integer("inner", 0), dtype_named(options.at("dtype"))};
  }
};

inline bool read_request(std::istream& in, Request& request) {
  std::string line, word;
  if (!std::getline(in, line)) return false;
  std::istringstream words(line);
  words >> request.operation;
  while (words >> word) {
    const size_t equals = word.find('=');
    const std::string key = word.substr(0, equals), value = word.substr(equals + 1);
    if (key != "tensor") {
      request.options[key] = value;
      continue;
    }
    std::istringstream fields(value);
    Tensor tensor;
    std::string dtype, bytes, misalignment, tail;
    std::getline(fields, tensor.name, ':');
    std::getline(fields, tensor.mode, ':');
    std::getline(fields, dtype, ':');
    std::getline(fields, bytes, ':');
    std::getline(fields, misalignment, ':');
    std::getline(fields, tail);
    tensor.dtype = dtype_named(dtype);
    const bool sparse = std::stoul(tail) > 0;
    tensor.sent = std::stoul(sparse ? tail : bytes);
    tensor.buffer = std::make_unique<Buffer>(tensor.name, std::stoul(bytes), std::stoul(misalignment),
                                             sparse ? Buffer::Storage::kSparse : Buffer::Storage::kDense);
    if (tensor.mode != "out") tensor.initial.resize(tensor.sent);
    request.tensors.push_back(std::move(tensor));
  }
  for (Tensor& tensor : request.tensors)
    in.read(tensor.initial.data(), static_cast<std::streamsize>(tensor.initial.size()));
  return static_cast<bool>(in);
}

inline bnk::Pass pass_of(const Request& request) {
  if (request.operation == "forward_train") return bnk::Pass::kForwardTrain;
  if (request.operation == "forward_eval") return bnk::Pass::kForwardEval;
  return request.integer("training", 0) != 0 ? bnk::Pass::kBackwardTrain : bnk::Pass::kBackwardEval;
}

inline bnk::DeviceLimits limits_of(const std::string& text) {
  std::istringstream in(text);
  bnk::DeviceLimits limits{};
  char comma;
  in >> limits.multiprocessors >> comma >> limits.max_threads_per_multiprocessor >> comma >>
      limits.max_blocks_per_multiprocessor >> comma >> limits.shared_per_multiprocessor >> comma >>
      limits.shared_per_block >> comma >> limits.shared_reserved >> comma >> limits.cooperative_launch >> comma >>
      limits.max_cluster;
  return limits;
}

inline bnk::Layout layout_named(const std::string& name) {
  static const std::map<std::string, bnk::Layout> all{{"channels_first", bnk::Layout::kChannelsFirst},
                                                      {"channels_last", bnk::Layout::kChannelsLast},
                                                      {"packed", bnk::Layout::kPacked}};
  return all.at(name);
}

}  // namespace simt
