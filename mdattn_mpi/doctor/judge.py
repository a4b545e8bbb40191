"""What the gathered facts mean: each check is a function of them alone, and a list of cases."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from mdattn_mpi.doctor.filesystem import LOCAL
from mdattn_mpi.doctor.finding import AllRanks, Case, Facts, Finding, Level, Ranks, by_value, find
from mdattn_mpi.doctor.tensorrt import tensorrt
from mdattn_mpi.text import counted, memory_size

MIB = 1 << 20
SHM = 64 * MIB  # a rank: what Open MPI and NCCL put there
FILES = 256, 4  # for itself, and for each other rank
LEAST_FILES = 40  # a job of two ranks on the CPU ended with 28 and did its work with 36
ROOM = 10 << 30  # bytes free in the folder
CLOCKS = 1.0  # seconds
QUIET = "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"
INTERFACES = "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES", "OMPI_MCA_btl_tcp_if_include"


def judge(ranks: Ranks) -> Iterator[Finding]:
    """Everything that can be told from what each rank knows about itself."""
    job = AllRanks(ranks, [rank["node"] for rank in ranks])
    for check in CHECKS:
        yield from check(job)


def launcher(job: AllRanks) -> Iterator[Finding]:
    """Who started how many ranks, on which nodes."""
    first, sizes = job.ranks[0], Counter(job.hosts).values()
    many, nodes = "s" * (len(job.ranks) > 1), "s" * (len(sizes) > 1)
    shape = f"{len(job.ranks)} rank{many} on {len(sizes)} node{nodes}"
    started = first["launcher"] or "no launcher"
    tasks = first["slurm"].get("SLURM_STEP_NUM_TASKS") or first["slurm"].get("SLURM_NTASKS")
    return find(
        "launcher",
        (tasks and int(tasks) != len(job.ranks), "WARN",
         f"{started} started {shape}, but Slurm gave the job {tasks} tasks",
         "leave -n out, or ask sbatch for as many tasks"),
        (len(set(sizes)) > 1, "WARN",
         f"{started} started {shape}, unevenly: from {min(sizes)} to {max(sizes)} a node",
         "ask for --ntasks-per-node"),
        fine=f"{started}: {shape}",
    )  # fmt: skip


def mpi(job: AllRanks) -> Iterator[Finding]:
    """One MPI library, and one that lets threads call it."""
    libraries = job.values(lambda rank: rank["mpi"]["library"])
    weak = job.where(lambda rank: not rank["mpi"]["threads"])
    return find(
        "MPI library",
        (job.differ(lambda rank: rank["mpi"]["library"]), "FAIL", libraries,
         "load the same module on all nodes"),
        (weak, "WARN", f"{libraries} allows no calls from several threads on {weak}",
         "use --group-size all, or an MPI built with MPI_THREAD_MULTIPLE"),
        fine=libraries,
    )  # fmt: skip


def versions(job: AllRanks) -> Iterator[Finding]:
    """The same software everywhere."""
    every = AllRanks(
        [{"Python": rank["python"], **rank["packages"]} for rank in job.ranks], job.hosts
    )
    shown = ", ".join(f"{name} {version}" for name, version in every.ranks[0].items())
    different = _different(every, "missing")
    fix = "use one environment, on a file system that all nodes share"
    return find("versions", (different, "FAIL", different, fix), fine=shown)


def _different(job: AllRanks, absent: str) -> str:
    """The names whose values differ, with who has which."""
    names = dict.fromkeys(name for rank in job.ranks for name in rank)
    values = {name: [rank.get(name, absent) for rank in job.ranks] for name in names}
    return ", ".join(
        f"{name}: {by_value(found, job.hosts)}"
        for name, found in values.items()
        if len(set(found)) > 1
    )


def environment(job: AllRanks) -> Iterator[Finding]:
    """Settings that only some ranks have, and some that nobody should."""
    every = [dict(sorted(rank["settings"].items())) for rank in job.ranks]
    different = _different(
        AllRanks([{**one, "CUDA_VISIBLE_DEVICES": ""} for one in every], job.hosts), "unset"
    )
    lost = {
        f"{name}={rank['settings'][name]}"
        for rank in job.ranks
        for name in INTERFACES
        if name in rank["settings"] and not _names_an_interface(rank["settings"][name], rank)
    }
    disabled = [name for name in QUIET if any(one.get(name) == "1" for one in every)]
    cases: tuple[Case, ...] = (
        (different, "WARN", different,
         "set variables where the launcher passes them on (srun --export=ALL, mpirun -x NAME)"),
        (lost, "FAIL", f"{', '.join(sorted(lost))} names no interface of this node",
         "unset it, or name one of `ip -br address`"),
        (disabled, "WARN", f"{', '.join(disabled)} is set: NCCL is slow then", "unset it"),
    )  # fmt: skip
    for case in cases:
        yield from find("environment", case, fine="")
    if not any(applies for applies, *_ in cases):
        yield Finding("environment", "OK", ", ".join(every[0]) or "nothing set")


def _names_an_interface(value: str, rank: Facts) -> bool:
    """Whether one of the named interfaces is there; what can't be told counts as there."""
    names = [name.partition(":")[0] for name in value.lstrip("^=").split(",")]
    if value.startswith("^") or any("/" in name or name == "all" for name in names):
        return True
    known = [*rank["interfaces"], *rank["infiniband"]]
    return any(there.startswith(name) for name in names for there in known)


def cores(job: AllRanks) -> Iterator[Finding]:
    """Every rank has cores of its own."""
    usable: dict[str, set[int]] = defaultdict(set)
    physical: dict[str, set[int]] = defaultdict(set)
    for rank in job.ranks:
        usable[rank["node"]].update(rank["cores"])
        physical[rank["node"]].update(rank["siblings"])
    crowded = job.where(lambda rank: rank["local_size"] > len(usable[rank["node"]]))
    paired = job.where(lambda rank: rank["local_size"] > len(physical[rank["node"]]))
    busy = job.where(lambda rank: _threads(rank) > len(usable[rank["node"]]))
    node, here, there = (paired.first[name] for name in ("node", "local_size", "all_cores"))
    of_node = f"of {there} hardware threads of {node}"
    fewer = "start fewer ranks a node"
    return find(
        "cores",
        (crowded, "WARN", f"{here} ranks share {len(usable[node])} {of_node}",
         "ask for --cpus-per-task, or mpirun --bind-to none" if len(usable[node]) < there
         else fewer),
        (paired, "WARN",
         f"{here} ranks share {counted(len(physical[node]), 'core')} with {len(usable[node])} "
         f"{of_node}",
         fewer),
        (busy, "WARN",
         f"OMP_NUM_THREADS={busy.first['settings'].get('OMP_NUM_THREADS')} on {busy}: more "
         f"threads than the {len(usable[busy.first['node']])} that its node may run at a time",
         "export OMP_NUM_THREADS=1; --threads says how many a rank computes with"),
        fine=f"{len(job.ranks[0]['cores'])} of {there} for a rank",
    )  # fmt: skip


def _threads(rank: Facts) -> int:
    """The threads that libraries start on a rank's node, as far as a variable says so."""
    asked = rank["settings"].get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) * int(rank["local_size"]) if asked.isdecimal() else 0


def limits(job: AllRanks) -> Iterator[Finding]:
    """Memory that may be locked, open files, stack."""
    files = FILES[0] + FILES[1] * len(job.ranks)
    pinning = any(rank["infiniband"] or rank["gpus"]["count"] > 0 for rank in job.ranks)
    memory = pinning * 1024 * MIB

    def at_least(
        least: int, check: str, name: str, level: Level, why: str, fix: str
    ) -> Iterator[Finding]:
        low = job.where(lambda rank: 0 <= rank["limits"][name] < least)
        limit = low.first["limits"][name]
        shown = "unlimited" if limit < 0 else str(limit) if name == "nofile" else memory_size(limit)
        return find(check, (low, level, f"{shown} on {low}: {why}", fix), fine=shown)

    few = job.where(lambda rank: 0 <= rank["limits"]["nofile"] < LEAST_FILES)
    level: Level = "FAIL" if few else "WARN"
    least = LEAST_FILES if few else files
    yield from at_least(
        least, "open files", "nofile", level, f"a job of this size may need {least}",
        "ulimit -n 65536 in the job script",
    )  # fmt: skip
    yield from at_least(
        8 * MIB, "stack", "stack", "WARN", "native code may need more",
        "ulimit -s 8192 in the job script",
    )  # fmt: skip
    yield from at_least(
        memory, "locked memory", "memlock", "WARN", "InfiniBand and GPUs lock what they transfer",
        "ulimit -l unlimited, or PropagateResourceLimitsExcept=MEMLOCK in slurm.conf",
    )  # fmt: skip


def shared_memory(job: AllRanks) -> Iterator[Finding]:
    """Room in /dev/shm for all ranks of a node."""
    poor = job.where(lambda rank: rank["shm"].get("free", 0) < SHM * rank["local_size"])
    free = memory_size(poor.first["shm"].get("free", 0))
    stopped = poor.first["gpus"]["count"] > 0  # NCCL can't do without it; Open MPI uses files then
    return find(
        "/dev/shm",
        (poor, "FAIL" if stopped else "WARN",
         f"{free} free on {poor}, {'NCCL needs' if stopped else 'messages are fast with'} "
         f"{memory_size(SHM)} a rank",
         "remove what earlier jobs left there, or give the container more (--shm-size, or bind "
         "the host's)"),
        fine=f"{free} free",
    )  # fmt: skip


def sessions(job: AllRanks) -> Iterator[Finding]:
    """No folder of a killed mpirun that keeps a later one, with the same pid, from starting."""
    left = job.where(lambda rank: rank["sessions"])
    stale = left.first["sessions"]
    return find(
        "mpirun",
        (left, "WARN",
         f"{len(stale)} killed on {left} left session folders; another one that gets such a "
         "pid won't start (\"PMIx server's listener thread failed\")",
         f"unless an mpirun runs in a container here: rm -r {' '.join(stale[:8])}"
         + (" and so on" if len(stale) > 8 else "")),
        fine="",
    )  # fmt: skip


def clocks(job: AllRanks) -> Iterator[Finding]:
    """The same time on all nodes."""
    worst = job.some([max(range(len(job.ranks)), key=lambda rank: abs(job.ranks[rank]["clock"]))])
    offset = worst.first["clock"]
    return find(
        "clocks",
        (abs(offset) > CLOCKS, "WARN",
         f"{worst} is {abs(offset):.3g} s {'ahead of' if offset > 0 else 'behind'} rank 0",
         "have the site repair its time service"),
        fine=f"at most {abs(offset) * 1e3:.2g} ms apart",
    )  # fmt: skip


def gpus(job: AllRanks) -> Iterator[Finding]:
    """A GPU for each rank, its own, and the same kind everywhere."""
    without = job.where(lambda rank: rank["gpus"]["count"] < 1)
    hidden = job.where(lambda rank: rank["gpus"]["nodes"] > 0)
    if not without:
        yield from _own_gpu(job)
        yield from _kinds(job)
        return
    none = len(without.numbers) == len(job.ranks)
    visible = hidden.first["gpus"]["visible"]
    yield from find(
        "GPUs",
        (none and hidden, "FAIL", f"{hidden} has GPUs but the driver shows none"
         + (f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ""),
         "ask Slurm for --gpus-per-node, or containers for --nv"),
        (not none, "FAIL", f"no GPU on {without}, but on others",
         "ask for --gpus-per-node, the same on all nodes"),
        fine="no GPU: the cpu backend will be used",
    )  # fmt: skip


def _own_gpu(job: AllRanks) -> Iterator[Finding]:
    few = job.where(lambda rank: rank["gpus"]["count"] < rank["local_size"])
    owners = Counter(chosen_gpu(rank)["uuid"] for rank in job.ranks)
    uuid, most = owners.most_common(1)[0]
    sharing = job.where(lambda rank: most > 1 and chosen_gpu(rank)["uuid"] == uuid)
    names = Counter(chosen_gpu(rank)["name"] for rank in job.ranks)
    return find(
        "GPUs",
        (sharing, "FAIL",
         f"{sharing} share one GPU ({uuid}): {sharing.first['local_size']} ranks on the node, "
         f"{sharing.first['gpus']['count']} GPUs visible",
         "start as many ranks a node as it has GPUs, and leave CUDA_VISIBLE_DEVICES alone"),
        (few, "WARN",
         f"{few} sees {few.first['gpus']['count']} of the node's GPUs: NCCL and peer copies "
         "between them don't work then",
         "use --gpus-per-node with --ntasks-per-node, not --gpus-per-task"),
        fine=", ".join(f"{count} × {name}" for name, count in names.items())
        + ", one for each rank",
    )  # fmt: skip


def every_rank_has_a_gpu(ranks: Ranks) -> bool:
    """Whether NCCL can be tried: every rank with a GPU of its own."""
    if not ranks or any(rank["gpus"]["count"] < 1 for rank in ranks):
        return False
    return len({chosen_gpu(rank)["uuid"] for rank in ranks}) == len(ranks)


def chosen_gpu(rank: Facts) -> Facts:
    """The GPU that a rank takes: by its place on the node."""
    devices = rank["gpus"]["devices"]
    return dict(devices[rank["local_rank"] % len(devices)])


def _kinds(job: AllRanks) -> Iterator[Finding]:
    yield from _alike(job, "driver", lambda rank: str(rank["gpus"]["driver"]))
    yield from _alike(job, "GPU kind", _sm, fine=_engines(job.ranks[0]))
    links = {way for rank in job.ranks for row in rank["gpus"]["peers"] for way in row}
    links -= {"itself"}
    broken = job.where(lambda rank: any("no" in row for row in rank["gpus"]["peers"]))
    yield from find(
        "peers",
        (broken, "WARN", f"GPUs of {broken} can't reach each other's memory",
         "check nvidia-smi topo -m, IOMMU and ACS; copies go through the host otherwise"),
        fine=f"over {' and '.join(sorted(links))}" if links else "one GPU a node",
    )  # fmt: skip


def _alike(
    job: AllRanks, check: str, value: Callable[[Facts], str], fine: str = ""
) -> Iterator[Finding]:
    found, fix = job.values(value), "use nodes of one kind: the slowest decides"
    return find(check, (job.differ(value), "WARN", found, fix), fine=fine or found)


def _sm(rank: Facts) -> str:
    return "SM {}.{}".format(*chosen_gpu(rank)["sm"])


def _engines(rank: Facts) -> str:
    """What an SM can do with the engines that there are."""
    major, minor = chosen_gpu(rank)["sm"]
    backends = ["cuda"] if major >= 8 else []
    if "tensorrt" in rank["packages"]:
        backends.append("tensorrt" + (" (multi-device attention)" if major >= 10 else ""))
    if "tensorrt-rtx" in rank["packages"] and (major, minor) != (9, 0):
        backends.append("tensorrt-rtx")
    return f"{_sm(rank)}: {', '.join(backends) or 'too old for any backend but cpu'}"


def nccl(job: AllRanks) -> Iterator[Finding]:
    """One libnccl, not several."""
    many = job.where(lambda rank: len(rank["nccl"]) > 1)
    wanted = job.where(lambda rank: rank["gpus"]["count"] > 0 or rank["nccl"])
    found = job.values(lambda rank: ", ".join(rank["nccl"]) or "none that was looked for")
    paths = many.first["nccl"]
    return find(
        "libnccl",
        (many, "WARN", f"{len(paths)} on {many}: {', '.join(paths)}",
         "put the folder of the first into LD_LIBRARY_PATH, so that TensorRT loads it too"),
        fine=found if wanted else "",
    )  # fmt: skip


def folder(job: AllRanks) -> Iterator[Finding]:
    """A folder that all ranks share, with room, and made to last."""
    facts = defaultdict(str, job.ranks[0]["folder"])  # the folder may be missing
    path, kind, nodes = facts["path"], facts["type"], len(set(job.hosts))
    gone = job.where(lambda rank: not rank["folder"]["exists"])
    closed = job.where(
        lambda rank: rank["folder"].get("read_only") or not rank["folder"].get("writable")
    )
    free, parallel = facts["free"] or 0, "take a folder on the parallel file system"
    cases: tuple[Case, ...] = (
        (gone, "FAIL", f"isn't there on {gone}",
         "create it, or name one that all nodes mount with --folder"),
        (closed, "FAIL", f"can't be written on {closed}",
         "take a folder of yours; compute nodes may mount home folders read-only"),
        (nodes > 1 and kind in LOCAL, "WARN", f"is {kind}, which one node has for itself",
         parallel),
        (nodes > 1 and kind.startswith("nfs"), "WARN",
         f"is {kind}: several nodes write one file slowly there", parallel),
        (len(job.ranks) > 1 and facts["stripes"] == 1, "WARN",
         "is Lustre with one stripe: all ranks write to one server", f"lfs setstripe -c -1 {path}"),
        (free < ROOM, "WARN", f"has {memory_size(free)} left",
         "make room: an output is as large as its queries"),
    )  # fmt: skip
    return find(
        "folder",
        *((applies, level, f"{path} {what}", fix) for applies, level, what, fix in cases),
        fine=f"{path}: {kind}, "
        + (f"{facts['stripes']} stripes, " if facts["stripes"] else "")
        + f"{memory_size(free)} free",
    )  # fmt: skip


CHECKS = (
    launcher, mpi, versions, environment, cores, limits, shared_memory, sessions, clocks, gpus,
    nccl, tensorrt, folder,
)  # fmt: skip
