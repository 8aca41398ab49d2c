"""Tools that examine the kernels themselves: `python -m bench.tools.<name>`.

Compiled for a GPU, which need not be present (nvcc):
  registers.py    registers, spills and shared memory of each kernel by architecture
  sass.py         machine code of the main loops: access widths, instructions per element (needs nvdisasm)
  device_code.py  compiles the device code as setup.py does, for these two

On a GPU:
  ncu.py          DRAM bytes from hardware counters, against the floor
  micro.py, .cu   measures the constants of the plan: barriers, launches, narrow runs, and, with micro_stamps.cuh and
    phases.py     the phases of the persistent forward: when each CTA loads, waits and stores
  sanitize.py     calls at small sizes for compute-sanitizer: every kernel variant, or
    kinds.py      one case of each kind of plan that the device has
  planted.*       faults that compute-sanitizer must find; otherwise a clean run would prove nothing
"""
