"""python -m bnkernels.explain, and bnkernels.explain(): how a BatchNorm would run on a CUDA device, in words and figures."""
