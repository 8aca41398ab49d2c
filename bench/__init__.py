"""The benchmark harness of bnkernels: `python -m bench`. bench/NOTES.md explains how to read its output.

shapes.py       the BatchNorm layers that are timed
cases.py        one case: shape, layout, dtype, epilogue; its inputs, and the bytes it must move
providers.py    the implementations compared: nn.BatchNorm2d eager and under torch.compile, bnkernels
tolerance.py    checks every provider's results against the float64 reference before it is timed
sampling.py     interleaved samples of the providers' times; the CPU timer
cuda.py         the GPU timers: CUDA graphs, L2 cold and warm, and the bandwidth of a device copy
stats.py        medians, quantiles, ratios
machine.py      the machine, software and commit of a run
results.py      the samples, as JSON, and what is derived from them;  report.py in Markdown;  plot.py as a picture
harness.py      runs the cases;  cli.py  the command line
markdown.py     the Markdown tables of the whole repository
files.py        atomic replacement of files
gpu.sh, gpu.py  everything to run on a machine with a GPU, in the two stages of stages.py
tools/          kernels as compiled (registers, spills, machine code) and on hardware (counters, sanitizers)
"""
