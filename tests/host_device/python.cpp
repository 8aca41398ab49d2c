// What runtime.py calls beside CUDA's own functions.
#include <string>

#include "host_device/state.h"
#include "host_device/work.h"

extern "C" {

void host_device_fault(const char* text) { host_device::fault(text); }

void host_device_begin_record() { host_device::begin_record(); }

void host_device_note(const char* what) { host_device::note(what); }

// Valid until the next call.
const char* host_device_end_record() {
  static std::string record;
  record = host_device::end_record();
  return record.c_str();
}

}  // extern "C"
