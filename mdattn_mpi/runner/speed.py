"""How fast this machine is, in about a second: for a plan of a job that will run on such ones."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf
from statistics import median
from time import perf_counter, process_time

from mdattn_mpi.problem import AttentionProblem

TOKENS = 2048  # of the attention that is timed
SECONDS = 0.5
PIECE = 32 << 20  # bytes that are written and synced at a time
MOST = 8  # pieces a writer


def core_flops(problem: AttentionProblem) -> float:
    """FLOP/s of one core, while all that this process may use compute attention like `problem`.

    By processor time: what else runs on this machine doesn't count.
    """
    import numpy as np

    from mdattn_mpi.dataset import NUMPY
    from mdattn_mpi.devices.cpu.host import HostDevice
    from mdattn_mpi.mask import Span
    from mdattn_mpi.partition import blocks

    cores = len(os.sched_getaffinity(0))
    small = replace(
        problem,
        q_tokens=min(problem.q_tokens, TOKENS),
        kv_tokens=min(problem.kv_tokens, TOKENS),
        segments=(),
    )
    draw, dtype = np.random.default_rng(), NUMPY[problem.dtype]
    q, k, v = (
        draw.standard_normal(shape, np.float32).astype(dtype)
        for shape in (
            (small.q_tokens, small.q_heads, small.head_dim),
            (small.kv_tokens, small.kv_heads, small.head_dim),
            (small.kv_tokens, small.kv_heads, small.v_head_dim),
        )
    )
    seen = blocks((Span(0, small.q_tokens),), (Span(0, small.kv_tokens),), small.mask)
    device = HostDevice(0, 1, cores)
    times: list[float] = []
    try:
        until = perf_counter() + SECONDS
        while len(times) < 2 or perf_counter() < until:
            began = process_time()
            sums = device.accumulator(q, small.v_head_dim, small.scale, small.softcap)
            device.attend(sums, seen, k, v)
            device.finish(sums)
            times.append(process_time() - began)
    finally:
        device.close()
    return small.flops / median(times[1:])


def disk_bandwidth(folder: str, writers: int) -> float:
    """Bytes/s that `writers` at once write to a new file in `folder`, and have synced.

    Infinity where none can be written.
    """
    writers = min(writers, len(os.sched_getaffinity(0)))
    piece = os.urandom(1 << 20) * (PIECE >> 20)
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".mdattn-plan-") as file:
            os.posix_fallocate(file.fileno(), 0, writers * MOST * PIECE)
            began = perf_counter()

            def write(writer: int) -> int:
                done = 0
                while done < MOST and (done == 0 or perf_counter() < began + SECONDS):
                    place = (writer * MOST + done) * PIECE
                    os.pwrite(file.fileno(), piece, place)
                    os.fdatasync(file.fileno())
                    done += 1
                return done

            with ThreadPoolExecutor(writers) as threads:
                pieces = sum(threads.map(write, range(writers)))
            return pieces * PIECE / (perf_counter() - began)
    except OSError:
        return inf
