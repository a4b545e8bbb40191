"""TensorRT on GPUs that it doesn't run on: our message, on all ranks together.

    mpirun -n 2 python tests/gpu/trt_refusal.py

One rank a GPU. With TensorRT-RTX on Hopper it shows how far things go, and that all ranks end
alike: library, GPU, one NCCL and its communicator as a capsule; the refusal before anything is
built; and, past our own check, TensorRT's refusal of an engine that was built for another GPU.
"""

from __future__ import annotations

import ctypes
import sys

from mdattn_mpi.devices.nccl import loaded_nccl
from mdattn_mpi.errors import DeviceError, MdattnError
from mdattn_mpi.lockstep import start, together
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.trt.backend import TensorRTBackend
from mdattn_mpi.trt.build import BuiltEngine, build_attention
from mdattn_mpi.trt.choice import spec_for
from mdattn_mpi.trt.engine import CAPSULE, Engine, communicator_capsule
from mdattn_mpi.trt.library import find_library, show_sm, visible_sm
from mdattn_mpi.trt.runtime import open_runtime
from mdattn_mpi.trt.store import describe

PROBLEM = AttentionProblem(4096, 4096, 8, 2, 128, 128, "bfloat16", "upper_left")
ELSEWHERE = (8, 9)


def main() -> int:
    """Return 0 when everything was refused as it should be."""
    world = start()

    def say(text: str) -> None:
        print(f"[rank {world.rank}] {text}", flush=True)

    library = find_library()
    sm = visible_sm()
    assert sm is not None, "there is no GPU here"
    say(f"{library}; SM {show_sm(sm)}; can run {library.capabilities(sm).strategies}")
    runtime = open_runtime(world)
    backend = TensorRTBackend(runtime, cache=None)
    say(f"GPU and communicator are open: {runtime.describe()}")
    say(f"NCCL: {loaded_nccl()}")
    communicator = runtime._communicator
    capsule = communicator_capsule(communicator.ptr)
    valid = ctypes.pythonapi.PyCapsule_IsValid
    valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
    assert valid(capsule, CAPSULE) == 1
    say(f"capsule {CAPSULE.decode()} of {communicator.ptr:#x}")

    refused = 0
    for strategy in ("ring", "allgather", "ulysses", "auto"):
        try:
            backend.plan(PROBLEM, strategy, lse=False)
        except MdattnError as error:
            refused += error.exit_code == 4
            say(f"-s {strategy}: exit {error.exit_code}: {error}")

    (spec,) = spec_for([PROBLEM], "allgather", world.size)
    engine = build_attention(library, spec, ELSEWHERE)
    built = BuiltEngine(engine, describe(engine, library, ELSEWHERE, spec))
    try:
        together(world, "load engine", lambda: Engine(library, built, sm))
    except DeviceError as error:
        refused += "this GPU" in error.what  # TensorRT's own words
        say(f"an engine for SM {show_sm(ELSEWHERE)}: exit {error.exit_code}: {error}")
    say(f"NCCL afterwards: {loaded_nccl()}")
    backend.close()
    world.barrier()
    say(f"{refused} of 5 refused")
    world.end()
    return 0 if refused == 5 else 1


if __name__ == "__main__":
    sys.exit(main())
