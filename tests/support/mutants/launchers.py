"""Faults of the launchers: streams, devices, refused launches, barrier workspaces."""

from __future__ import annotations

from . import Build, Mutant

LAUNCHES = "tests/cuda/test_cuda_launches.py"  # starts its own processes on the fake CUDA device: not marked cuda
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
        "the forward runs on the current device instead of the input's",
        "torch/dispatch.cpp",
        "  const c10::cuda::CUDAGuard guard(x.device());\n  TorchHost host;\n",
        "  TorchHost host;\n",
        (STREAMS, "-m", "cuda", "-k", "device_of_the_input"),
    ),
    mutant(
        "a refused launch is retried at every call",
        "cuda/backend.cu",
        "    groups = std::min(groups, plan.group == GroupKind::kGrid ? plan.groups - 1 : 0);\n",
        "    groups_.erase(key);\n",
        REFUSED,
    ),
    mutant(
        "the error of a refused launch is not cleared",
        "cuda/backend.cu",
        "      (void)cudaGetLastError();  // clears the error, which the call recovers from\n",
        "",
        REFUSED,
    ),
    mutant(
        "clusters are planned although the kernels have no cluster code",
        "cuda/backend.cu",
        "clusters != 0 && cluster.has_code ? kPortableCluster : 0;",
        "clusters != 0 ? kPortableCluster : 0;",
        (LAUNCHES, "-k", "older_than_the_device"),
    ),
    mutant(
        "fewer co-resident clusters, but the same number of blocks: channel tiles are processed twice",
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
        "a destroyed graph does not release its workspace",
        "cuda/launch/barrier_workspace.cpp",
        "return is_captured ? tie_to_graph(key, graph) : cudaSuccess;",
        "return cudaSuccess;",
        CAPTURES,
    ),
]
