"""The host execution of the kernels: csrc/cuda compiled by the host's compiler and run thread by thread as fibers.

It is a test instrument, not a backend. Its parts, lowest level first:

    fiber.h, .cpp        a function on its own stack, registered with the sanitizers
    run_queue.h          the set of runnable threads
    schedule.h           which thread runs next
    shared_memory.h      one block's shared memory, poisoned and guarded
    buffers.h, .cpp      global memory, checked and counted
    engine.h, .cpp       a launch: barriers, shuffles, waits, and the detection of their misuse
    float16.h            the 16-bit formats
    primitives_host.h    the primitives of csrc/cuda/ptx.cuh on top of the above
    planted.h            small kernels with one fault each; run_planted.cpp runs them
    request.h            the requests of run_kernels.cpp, a server that runs the real launch sequences
    sync_steps.h         the steps of a batch on several ranks; ranks.py runs all of them from Python
    build.py             compiles these in three builds: plain, AddressSanitizer + UBSan, ThreadSanitizer
    server.py            run_kernels from Python, on tensors; plans.py: the plans in requests and answers
    common.py            shared by the tests, as are fixtures.py and, for the persistent kernel, persistent_cases.py
    drop_barriers.py     drops each barrier of the kernels, one per run, and checks that the tests fail
    traffic.py           counts the bytes of ResNet-50's layers: docs/traffic.md
"""
