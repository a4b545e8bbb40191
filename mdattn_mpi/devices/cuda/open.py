"""Opening the GPUs of a group: who has which, what they can do, how they reach each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mdattn_mpi.devices.cuda.arena import Arena
from mdattn_mpi.devices.cuda.attention import Engine
from mdattn_mpi.devices.cuda.choice import GAIN, Chooser
from mdattn_mpi.devices.cuda.copies import PeerCopies
from mdattn_mpi.devices.cuda.device import CudaDevice
from mdattn_mpi.devices.cuda.gpu import Gpu, Network
from mdattn_mpi.devices.cuda.launches import Launches
from mdattn_mpi.devices.cuda.memory import Memory
from mdattn_mpi.devices.cuda.packing import Offsets
from mdattn_mpi.devices.cuda.peers import Peers
from mdattn_mpi.devices.cuda.recorder import Recorder
from mdattn_mpi.devices.cuda.replaying import ReplayingDevice
from mdattn_mpi.devices.cuda.step import Steps
from mdattn_mpi.devices.cuda.windows import Windows
from mdattn_mpi.devices.presence import gpu_count, why_no_cuda
from mdattn_mpi.errors import DeviceError, MdattnError, RejectedError
from mdattn_mpi.lockstep import gather_together, together
from mdattn_mpi.problem import KERNEL_NAMES

if TYPE_CHECKING:
    from mdattn_mpi.lockstep import Group

LEAST_SM = (8, 0)
Facts = dict[str, Any]


def open_cuda(
    group: Group,
    local_rank: int | None = None,
    *,
    transfer: str = "auto",
    kernel: str = "auto",
    timings: bool = True,
    replays: bool = True,
    seam: Libraries | None = None,
) -> CudaDevice:
    """Collective. Open this rank's GPU, and the ways to those of the other ranks.

    Parameters
    ----------
    group
        The ranks that work together.
    local_rank
        Which GPU of its node the rank takes; by default its number among the job's ranks there.
    transfer
        How messages go: ``copy`` by copy engines, which the multiprocessors don't notice, between
        GPUs of one node that reach each other; ``nccl`` by NCCL; ``auto`` by copy engines where
        possible.
    kernel
        What attends: ``cudnn``, ``flash`` (FlashAttention 4), or ``auto``, the one that is faster
        on this GPU by the table in `choice`; the same on all ranks.
    timings
        Whether `CudaDevice.seconds` is wanted.
    replays
        Whether calls of one plan are recorded and replayed, where copy engines reach all ranks.
    seam
        What opens the GPU instead of `Libraries`, for tests.

    Raises
    ------
    RejectedError
        A library isn't installed; GPUs of different kinds, or below SM 8.0; no such way.
    DeviceError
        No GPU, fewer GPUs than ranks on a node, a driver older than the libraries.

    """
    if transfer not in ("auto", "copy", "nccl"):
        raise RejectedError(f"transfer {transfer!r}", fix="use auto, copy or nccl")
    if kernel not in ("auto", *KERNEL_NAMES):
        raise RejectedError(f"kernel {kernel!r}", fix=f"use auto, {', '.join(KERNEL_NAMES)}")
    libraries = seam or Libraries()
    local_rank = group.local_rank if local_rank is None else local_rank
    gpu, facts = together(group, "GPU", lambda: _open_own(libraries, local_rank, group.local_size))
    everyone = group.allgather(facts)
    _check_alike(everyone)
    near = _near(group, gpu, everyone, transfer)
    memory = Memory(gpu)
    offsets = Offsets(gpu, memory)
    launches = Launches(_open_engines(group, libraries, gpu, kernel), gpu.use)
    peers, copies, note = _open_copies(group, gpu, memory, near, transfer)
    near = near if copies else []
    # All ranks or none: also one that reaches all others by copies takes part.
    some_are_far = any(group.allgather(len(near) < group.size - 1))
    nccl = libraries.nccl(group) if some_are_far else None
    device: Callable[..., CudaDevice] = CudaDevice
    if replays and peers and not some_are_far:
        steps = _open_steps(group, gpu, launches, memory, offsets, peers)
        device = partial(ReplayingDevice, steps)
    return device(
        group.rank,
        group.size,
        gpu,
        launches,
        memory=memory,
        offsets=offsets,
        copies=copies,
        nccl=nccl,
        near=near,
        timings=timings,
        limit=min(each["memory"] for each in everyone),
        node_size=group.node_size(),
        facts={
            "gpu": f"{gpu.name} (SM {gpu.sm[0]}.{gpu.sm[1]}, {gpu.total_bytes / 2**30:.0f} GiB)",
            "driver": f"CUDA {gpu.driver}",
            "nccl": nccl.library if nccl else "not used",
            "transfer": _describe_way(len(near), group.size, note),
        },
    )


class Libraries:
    """CUDA, cuDNN and NCCL, imported when they are wanted."""

    def count(self) -> int:
        """Count the visible GPUs."""
        return gpu_count()

    def why_not(self) -> str:
        """Say what is missing; empty when nothing is."""
        return why_no_cuda()

    def gpu(self, ordinal: int) -> Gpu:
        """Open a GPU."""
        from mdattn_mpi.devices.cuda import driver

        return driver.Gpu(ordinal)

    def cudnn(self, gpu: Gpu) -> Engine:
        """Open cuDNN on the current GPU."""
        from mdattn_mpi.devices.cuda.cudnn import CudnnEngine

        return CudnnEngine(gpu.sm)

    def why_no_flash(self, sm: tuple[int, int]) -> str:
        """Say why FlashAttention can't be used; empty when it can."""
        from mdattn_mpi.devices.cuda.flash.engine import why_not

        return why_not(sm)

    def flash(self, gpu: Gpu) -> Engine:
        """Open FlashAttention on the current GPU; takes seconds."""
        from mdattn_mpi.devices.cuda.flash.engine import FlashEngine

        return FlashEngine(gpu.sm, gpu.ordinal)

    def nccl(self, group: Group) -> Network:
        """Collective. Open NCCL on the current GPU."""
        from mdattn_mpi.devices.nccl import NcclComm

        return NcclComm(group)


def _open_engines(group: Group, libraries: Libraries, gpu: Gpu, kernel: str) -> Chooser:
    """Collective. Open what may attend, the same on all ranks."""
    engines = {"cudnn": together(group, "cuDNN", lambda: libraries.cudnn(gpu))}
    if kernel == "cudnn" or (kernel == "auto" and gpu.sm[0] not in GAIN):
        return Chooser(kernel, engines, gpu.sm)
    answers = group.allgather(libraries.why_no_flash(gpu.sm))
    missing = next((f"rank {rank}: {why}" for rank, why in enumerate(answers) if why), "")
    if missing and kernel == "flash":
        raise RejectedError(
            f"FlashAttention isn't there on all ranks; {missing}",
            fix="install it there, or use --kernel auto or cudnn",
        )
    if not missing:
        engines["flash"] = together(group, "FlashAttention", lambda: libraries.flash(gpu))
    return Chooser(kernel, engines, gpu.sm, missing)


def _open_own(libraries: Libraries, local_rank: int, local_size: int) -> tuple[Gpu, Facts]:
    """Open this rank's GPU; say what the others must know of it."""
    missing = libraries.why_not()
    if missing:
        kind = RejectedError if missing.startswith("not installed") else DeviceError
        raise kind(missing, fix="install it, or use -b cpu")
    count = libraries.count()
    if local_rank >= count:
        raise DeviceError(
            f"{local_size} ranks on this node and {count} visible GPUs: none is left for local "
            f"rank {local_rank}",
            fix="start at most as many ranks a node as it has GPUs, and let every rank see all of "
            "them (Slurm: --gpus-per-node=N --ntasks-per-node=N, not --gpus-per-task)",
        )
    gpu = libraries.gpu(local_rank)
    if gpu.sm < LEAST_SM:
        raise RejectedError(
            f"{gpu.name} has SM {gpu.sm[0]}.{gpu.sm[1]}; cuDNN's attention needs "
            f"{LEAST_SM[0]}.{LEAST_SM[1]}",
            fix="use a GPU from the A100 on, or -b cpu",
        )
    if gpu.driver_major < gpu.library_major:
        raise DeviceError(
            f"the driver of {gpu.name} is for CUDA {gpu.driver}; the installed libraries are for "
            f"CUDA {gpu.library_major}",
            fix=f"update the NVIDIA driver, or install the libraries for CUDA {gpu.driver_major}",
        )
    facts = {
        "host": os.uname().nodename,
        "pci_bus_id": gpu.pci_bus_id,
        "name": gpu.name,
        "sm": list(gpu.sm),
        "memory": gpu.free_bytes,
    }
    return gpu, facts


def _check_alike(everyone: Sequence[Facts]) -> None:
    kinds: dict[str, list[int]] = {}
    owners: dict[tuple[str, str], int] = {}
    for rank, each in enumerate(everyone):
        kinds.setdefault(each["name"], []).append(rank)
        other = owners.setdefault((each["host"], each["pci_bus_id"]), rank)
        if other != rank:
            raise DeviceError(
                f"ranks {other} and {rank} on {each['host']} have the same GPU, "
                f"{each['pci_bus_id']}",
                fix="start at most as many ranks a node as it has GPUs",
            )
    if len(kinds) > 1:
        who = "; ".join(f"{name} on rank {ranks[0]}" for name, ranks in kinds.items())
        raise RejectedError(
            f"GPUs of different kinds in one group: {who}",
            fix="ask the scheduler for one kind of GPU, or use groups within one kind",
        )


def _near(group: Group, gpu: Gpu, everyone: Sequence[Facts], transfer: str) -> list[int]:
    """Collective. Find the ranks that this one and that reach this one by copy engines."""
    own = everyone[group.rank]

    def reached() -> list[bool]:
        return [
            transfer != "nccl"
            and rank != group.rank
            and each["host"] == own["host"]
            and bool(gpu.reaches(each["pci_bus_id"]))
            for rank, each in enumerate(everyone)
        ]

    rows = gather_together(group, "peers", reached)
    near = [rank for rank in range(group.size) if rows[group.rank][rank] and rows[rank][group.rank]]
    far = group.size * (group.size - 1) - sum(
        rows[a][b] and rows[b][a] for a in range(group.size) for b in range(group.size)
    )
    if transfer == "copy" and far:
        raise RejectedError(
            "not all GPUs of the group reach each other by peer copies",
            fix="use --transfer auto or --transfer nccl",
        )
    return near


def _open_copies(
    group: Group, gpu: Gpu, memory: Memory, near: list[int], transfer: str
) -> tuple[Peers | None, PeerCopies | None, str]:
    """Collective. Open the copy engines; where CUDA IPC doesn't work, do without."""
    if not any(group.allgather(bool(near))):
        return None, None, "asked for" if transfer == "nccl" else "no GPUs that reach each other"
    # Opened by all ranks or none: also a rank without a near one takes part.
    peers = Peers(group.comm.Dup(), gpu, memory, near)
    try:
        copies = together(group, "copies", lambda: PeerCopies(gpu, peers))
        handles = copies.share()
        together(group, "open copies", lambda: copies.connect(handles))
    except MdattnError as error:
        if transfer == "copy":
            raise
        return None, None, f"CUDA IPC doesn't work here: {error.what}"
    return peers, copies, ""


def _open_steps(
    group: Group, gpu: Gpu, launches: Launches, memory: Memory, offsets: Offsets, peers: Peers
) -> Steps:
    """Open what records and replays: a device of its own, whose streams note what they get."""
    arena, windows = Arena(memory), Windows(gpu, peers)
    device = CudaDevice(
        group.rank, group.size, gpu, launches,
        memory=arena, offsets=offsets, copies=windows, near=peers.ranks, timings=False,
    )  # fmt: skip
    return Steps(gpu, memory, Recorder(gpu, device, arena, windows), peers)


def _describe_way(near: int, size: int, note: str) -> str:
    if size == 1:
        return "none: one rank"
    if near == size - 1:
        return "copy engines"
    ways = f"copy engines to {near} ranks, NCCL to {size - 1 - near}" if near else "NCCL"
    return f"{ways} ({note})" if note else ways
