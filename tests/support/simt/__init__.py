"""The host execution of the kernels: csrc/cuda compiled by the host's compiler and run thread by thread as fibers.

A test instrument and no backend. What it consists of, lowest first:

    fiber.h, .cpp        a function on a stack of its own, as the sanitizers are told of it
    run_queue.h          the set of threads that can run
    schedule.h           which of them goes next
    shared_memory.h      one block's shared memory, poisoned and guarded
    buffers.h, .cpp      global memory, checked and counted
    engine.h, .cpp       a launch: barriers, shuffles, waits, and everything that can go wrong with them
    float16.h            the 16-bit formats
    primitives_host.h    the primitives of csrc/cuda/ptx.cuh over all this
    planted.h            small kernels with a fault each, and run_planted.cpp, which runs them
    request.h            what is asked of run_kernels.cpp, a server that runs the real launch sequences
    sync_steps.h         and of the steps of a batch on several ranks; ranks.py: the whole of them from Python
    build.py             compiles these in three builds: plain, AddressSanitizer + UBSan, ThreadSanitizer
    server.py            run_kernels from Python, on tensors; plans.py: the plans that it is asked for, or tells of
    common.py            what the tests over it share, and fixtures.py; resident_cases.py: of the persistent kernel
    drop_barriers.py     leaves out each barrier of the kernels in turn and sees the tests fail
    traffic.py           counts the bytes of ResNet-50's layers: docs/traffic.md
"""
