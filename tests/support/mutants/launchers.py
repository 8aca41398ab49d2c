"""Faults of what launches the kernels: streams, devices, refused launches, the memory of barriers."""

from __future__ import annotations

from . import Build, Mutant

LAUNCHES = "tests/cuda/test_cuda_launches.py"  # its tests attach to the fake CUDA device in processes of their own: not marked cuda
STREAMS = "tests/cuda/test_cuda_streams.py"

REFUSED = (LAUNCHES, "-k", "a_refused_launch")
CAPTURES = (LAUNCHES, "-k", "capturing_each_step")


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(fault, f"csrc/{file}", old, new, tests, Build.FAKE_CUDA)


MUTANTS: list[Mutant] = [
    mutant(
        "the forward runs on the default stream",
        "torch/dispatch.cpp",
        "c10::cuda::getCurrentCUDAStream(), plan_options(), host",
        "c10::cuda::getDefaultCUDAStream(), plan_options(), host",
        (STREAMS, "-m", "cuda", "-k", "current_stream"),
    ),
    mutant(
        "the forward runs on the current device, whichever the input's is",
        "torch/dispatch.cpp",
        "  const c10::cuda::CUDAGuard guard(x.device());\n  TorchHost host;\n",
        "  TorchHost host;\n",
        (STREAMS, "-m", "cuda", "-k", "device_of_the_input"),
    ),
    mutant(
        "a launch that was refused is tried again at each call",
        "cuda/backend.cu",
        "    groups = std::min(groups, plan.group == GroupKind::kGrid ? plan.groups - 1 : 0);\n",
        "    groups_.erase(key);\n",
        REFUSED,
    ),
    mutant(
        "the error of a refused launch is left for the next launch to find",
        "cuda/backend.cu",
        "      (void)cudaGetLastError();  // clears it: nothing has gone wrong that the caller should find\n",
        "",
        REFUSED,
    ),
    mutant(
        "clusters are planned though the kernels have no code for them",
        "cuda/backend.cu",
        "clusters != 0 && cluster.has_code ? kPortableCluster : 0;",
        "clusters != 0 ? kPortableCluster : 0;",
        (LAUNCHES, "-k", "older_than_the_device"),
    ),
    mutant(
        "fewer clusters at a time, but as many blocks: slabs are taken twice",
        "cuda/backend.cu",
        "      persistent.launch.grid = int64_t{fit} * persistent.group_size;\n",
        "",
        ("tests/cuda/test_fake_cuda.py", "-k", "holds_less"),
    ),
    mutant(
        "captures of one stream share a workspace",
        "cuda/launch/barrier_workspace.cpp",
        "std::tie(device, stream, capture) < std::tie(other.device, other.stream, other.capture);",
        "std::tie(device, stream) < std::tie(other.device, other.stream);",
        CAPTURES,
    ),
    mutant(
        "a graph keeps its workspace when it is destroyed",
        "cuda/launch/barrier_workspace.cpp",
        "return is_captured ? tie_to_graph(key, graph) : cudaSuccess;",
        "return cudaSuccess;",
        CAPTURES,
    ),
]
