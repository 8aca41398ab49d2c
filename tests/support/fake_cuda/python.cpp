// The functions that runtime.py calls in addition to CUDA's own.
#include <string>

#include "fake_cuda/state.h"
#include "fake_cuda/work.h"

extern "C" {

void fake_cuda_fault(const char* text) { fake_cuda::fault(text); }

void fake_cuda_begin_record() { fake_cuda::begin_record(); }

void fake_cuda_note(const char* what) { fake_cuda::note(what); }

// Valid until the next call.
const char* fake_cuda_end_record() {
  static std::string record;
  record = fake_cuda::end_record();
  return record.c_str();
}

}  // extern "C"
