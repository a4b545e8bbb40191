"""The library call on doubles of GPUs, between processes: ``python -m tests.support.library_job``.

Its steps are recorded and replayed as between real GPUs; see `replay_job`.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import mdattn_mpi
from mdattn_mpi.devices.cuda import interop
from mdattn_mpi.devices.cuda import open as opening
from mdattn_mpi.devices.cuda.gpu import View
from mdattn_mpi.errors import DisagreementError, MdattnError, RejectedError
from mdattn_mpi.library import session as sessions
from tests.support.fake_gpu import Stream
from tests.support.reference import attention
from tests.support.replay_job import SharedLibraries


class Tensor:
    """An array of a library on the double of a GPU."""

    __module__ = "fake_library.arrays"

    def __init__(self, memory: Any, lender: Any = None) -> None:
        self.memory, self.lender = memory, lender
        self.shape, self.dtype = memory.shape, memory.dtype

    def __len__(self) -> int:
        return len(self.memory)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def view(self, stream: Any) -> View:
        strides = tuple(step // self.memory.itemsize for step in self.memory.strides)
        return View(self.memory.ctypes.data, self.shape, strides, self.dtype, self)


class Job:
    """Calls of the library, and what came out of them."""

    def __init__(self, folder: Path) -> None:
        self.comm = MPI.COMM_WORLD
        self.libraries: Any = SharedLibraries(folder, self.comm.size)
        self.stream = Stream(self.libraries.machine)
        opening.Libraries = lambda: self.libraries  # type: ignore[assignment, misc]
        library = interop.Library(self.take, lambda: (self.stream.handle, self.stream))
        interop.LIBRARIES["fake_library"] = lambda ordinal: library
        self.agreements = 0
        agree = sessions.Session.agree

        def counted(*args: Any, **options: Any) -> Any:
            self.agreements += 1
            return agree(*args, **options)

        sessions.Session.agree = counted  # type: ignore[method-assign]
        self.random = np.random.default_rng(3)

    def take(self, exported: Any) -> Tensor:
        """Take an array of ours."""
        array = exported.array
        lender = exported.__dlpack__(stream=self.stream.handle)
        buffer = (ctypes.c_ubyte * array.nbytes).from_address(array.address)
        memory = np.frombuffer(buffer, np.uint8).view(array.dtype).reshape(array.shape)
        return Tensor(memory, lender)

    def inputs(self, lengths: list[int]) -> tuple[list[Tensor], Any]:
        """This rank's shards of a new sequence, and what has to come out of them."""
        problem = mdattn_mpi.problem.AttentionProblem(sum(lengths), sum(lengths), 2, 2, 8, 8)
        whole = [
            self.random.standard_normal((sum(lengths), 2, 8)).astype(ml_dtypes.bfloat16)
            for _ in "qkv"
        ]
        ends = np.cumsum([0, *lengths])
        rows = slice(ends[self.comm.rank], ends[self.comm.rank + 1])
        right = attention(problem, *whole)[0][rows]
        return [Tensor(array[rows].copy()) for array in whole], right

    def check(self, out: Tensor, right: Any) -> None:
        self.libraries.opened.synchronize()
        assert np.abs(out.memory.astype(float) - right).max() < 0.05


def run(folder: Path) -> None:
    """Collective. Call in every way that may mix up what is begun before an agreement."""
    job = Job(folder)
    comm = job.comm
    shards, _ = job.inputs([16, 16])
    made = mdattn_mpi.Attention(comm, *shards, strategy="ring")
    counts = []
    for _ in range(6):
        shards, right = job.inputs([16, 16])
        before = job.agreements
        job.check(made.start(*shards).wait(), right)
        counts.append(job.agreements - before)
    assert counts == [2, 2, 1, 1, 1, 1], counts  # the first is done as ever, the second records

    wrong = [*shards[:2], Tensor(shards[2].memory[:, :, :4].copy())]
    with pytest.raises(RejectedError, match="this Attention was made for"):
        made.start(*(wrong if comm.rank else shards))  # rank 0 has begun by then
    shards, right = job.inputs([16, 16])
    first = made.start(*shards)
    more, other = job.inputs([16, 16])
    second = made.start(*more)
    job.check(first.wait(), right)
    job.check(second.wait(), other)

    counts = []
    for number in range(14):
        lengths = ([16, 16], [16, 12])[number // 5 % 2]  # rank 0 can't tell them apart
        shards, right = job.inputs(lengths)
        before = job.agreements
        job.check(mdattn_mpi.attention(comm, *shards, strategy="ring"), right)
        counts.append(job.agreements - before)
    assert counts[2:5] == counts[7:10] == counts[11:] == [1, 1, 1], counts
    assert counts[5] > 1 < counts[10], counts  # rank 0 had begun another one
    with pytest.raises(DisagreementError, match="scale"):
        mdattn_mpi.attention(comm, *shards, strategy="ring", scale=0.5 + comm.rank)
    shards, right = job.inputs([16, 16])
    job.check(mdattn_mpi.attention(comm, *shards, strategy="ring"), right)


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    except MdattnError as error:
        raise SystemExit(str(error)) from error
    print("all is well", flush=True)
