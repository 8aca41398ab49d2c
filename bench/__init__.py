"""The benchmark harness of bnkernels: `python -m bench` (see bench/NOTES.md for how to read what it prints).

shapes.py       the BatchNorm layers that are timed
cases.py        one case: shape, layout, dtype; its inputs, and the bytes it must move
providers.py  who runs: nn.BatchNorm2d eager, the same under torch.compile, bnkernels
gate.py         nobody is timed before their results were held against the float64 reference
sampling.py     interleaved samples of the providers' times; the CPU clock
cuda.py         the same on a GPU: CUDA graphs, L2 cold and warm, the device's copy bandwidth
stats.py        medians, quantiles, ratios
machine.py      what the figures were taken on
results.py      the samples, as JSON, and what is derived from them;  report.py in Markdown;  plot.py as a picture
harness.py      one case after another;  cli.py the command line
markdown.py     tables

device_code.py  the device code, compiled as setup.py does (needs nvcc, no GPU), for the two that look at it:
registers.py    registers, spills and shared memory of each kernel by architecture
sass.py         machine code of the main loops: widths, loads in flight, instructions an element (needs nvdisasm)
  sass_listing.py, sass_flow.py, sass_constants.py, sass_paths.py    from the listing to a loop's fast path
sanitize.py     calls at small sizes, to be run under compute-sanitizer: every kernel variant, or
  kinds.py      a case of each kind of plan that the device has
planted.*       faults that compute-sanitizer must find, or its silence on ours would say nothing
ncu.py          DRAM bytes as the hardware counts them, against the floor
micro.py, .cu   what the plan's constants rest on: barriers, launches, narrow runs, and, with micro_stamps.cuh and
  phases.py     the resident forward with a clock beside it: when each block loads, waits and stores
gpu.sh, gpu.py  all of it on a machine with a GPU, in the two stages of stages.py
files.py        files that are written in one step
"""
