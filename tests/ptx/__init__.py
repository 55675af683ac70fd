"""The kernels as they are compiled, executed without a GPU.

Triton compiles each kernel for sm_90 to PTX, as it would for a GPU, and `gpu.standing_in` executes that PTX thread by
thread on the CPU tensors of this process, watching what a GPU would not report: accesses out of bounds, misaligned
vectors, races. What a launch leaves in memory is compared with what Triton's interpreter makes of the same memory, to
the bit where nothing is added up. `make test-ptx` runs the tests of this folder; `make mutants` spoils instructions and
counts what they notice.

    reader.py       PTX as text -> basic blocks of instructions
    arithmetic.py   what instructions compute, on arrays of bits with an element per thread
    translator.py   a basic block -> a Python function that calls those
    memory.py       global and shared memory: who may touch what; what was touched
    races.py        accesses of two threads that nothing orders
    machine.py      a launch: threads, warps, blocks, barriers
    interpreter.py  the same launch in Triton's interpreter, in the same process
    agreement.py    whether both left the same behind, and how far sums may be apart
    gpu.py          the stand-in for Triton's driver
    workloads.py, ranks.py, cases.py   what runs on it
    snippets.py     kernels of a few lines, for the tests of all this
    spoiling.py, replays.py, mutants.py   one instruction spoilt, in launches that were kept
"""
