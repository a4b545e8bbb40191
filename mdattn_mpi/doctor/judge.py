"""What the gathered facts mean: one `Finding` a check, each check a function of the facts alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mdattn_mpi.doctor.finding import Finding, Level, by_value, who
from mdattn_mpi.doctor.storage import BLOCK, LOCAL

Ranks = Sequence[dict[str, Any]]

MIB = 1 << 20
STACK = 8 * MIB
SHM = 64 * MIB  # a rank: what Open MPI and NCCL put there
MEMLOCK = 1024 * MIB
FILES = 256, 4  # for itself, and for each other rank
ROOM = 10 << 30  # bytes free in the folder
CLOCKS = 1.0  # seconds
SLOW_MPI = 50e6  # bytes a second and rank
SLOW_NCCL = 1e9
SLOW_FOLDER = 20e6
QUIET = "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"


def judge(ranks: Ranks) -> Iterator[Finding]:
    """Everything that can be told from what each rank knows about itself."""
    for check in CHECKS:
        yield from check(ranks)


def _hosts(ranks: Ranks) -> list[str]:
    return [rank["node"] for rank in ranks]


def _those(ranks: Ranks, condition: Callable[[dict[str, Any]], bool]) -> list[int]:
    return [number for number, rank in enumerate(ranks) if condition(rank)]


def launcher(ranks: Ranks) -> Iterator[Finding]:
    """Who started how many ranks, on which nodes."""
    hosts = _hosts(ranks)
    nodes = Counter(hosts)
    shape = (
        f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {len(nodes)} node{'s' * (len(nodes) > 1)}"
    )
    started = ranks[0]["launcher"] or "no launcher"
    tasks = ranks[0]["slurm"].get("SLURM_STEP_NUM_TASKS") or ranks[0]["slurm"].get("SLURM_NTASKS")
    if tasks and int(tasks) != len(ranks):
        yield Finding(
            "launcher",
            "WARN",
            f"{started} started {shape}, but Slurm gave the job {tasks} tasks",
            "leave -n out, or ask sbatch for as many tasks",
        )
    elif len(set(nodes.values())) > 1:
        yield Finding(
            "launcher",
            "WARN",
            f"{started} started {shape}, unevenly: from {min(nodes.values())} to "
            f"{max(nodes.values())} a node",
            "ask for --ntasks-per-node",
        )
    else:
        yield Finding("launcher", "OK", f"{started}: {shape}")


def mpi(ranks: Ranks) -> Iterator[Finding]:
    """One MPI library, and one that lets threads call it."""
    hosts = _hosts(ranks)
    libraries = [rank["mpi"]["library"] for rank in ranks]
    weak = _those(ranks, lambda rank: not rank["mpi"]["threads"])
    if len(set(libraries)) > 1:
        yield Finding(
            "MPI library", "FAIL", by_value(libraries, hosts), "load the same module on all nodes"
        )
    elif weak:
        yield Finding(
            "MPI library",
            "WARN",
            f"{libraries[0]} allows no calls from several threads on {who(weak, hosts)}",
            "use --group-size all, or an MPI built with MPI_THREAD_MULTIPLE",
        )
    else:
        yield Finding("MPI library", "OK", libraries[0])


def versions(ranks: Ranks) -> Iterator[Finding]:
    """The same software everywhere."""
    hosts, different = _hosts(ranks), []
    names = dict.fromkeys(name for rank in ranks for name in rank["packages"])
    for name in names:
        values = [rank["packages"].get(name, "missing") for rank in ranks]
        if len(set(values)) > 1:
            different.append(f"{name}: {by_value(values, hosts)}")
    pythons = [rank["python"] for rank in ranks]
    if len(set(pythons)) > 1:
        different.append(f"Python: {by_value(pythons, hosts)}")
    if different:
        yield Finding(
            "versions",
            "FAIL",
            ", ".join(different),
            "use one environment, on a file system that all nodes share",
        )
    else:
        shown = ", ".join(f"{name} {value}" for name, value in ranks[0]["packages"].items())
        yield Finding("versions", "OK", f"Python {pythons[0]}, {shown}")


def environment(ranks: Ranks) -> Iterator[Finding]:
    """Settings that only some ranks have, and some that nobody should."""
    hosts, different = _hosts(ranks), []
    for name in sorted({name for rank in ranks for name in rank["settings"]}):
        values = [rank["settings"].get(name, "unset") for rank in ranks]
        if len(set(values)) > 1 and name != "CUDA_VISIBLE_DEVICES":
            different.append(f"{name}: {by_value(values, hosts)}")
    if different:
        yield Finding(
            "environment",
            "WARN",
            ", ".join(different),
            "set variables where the launcher passes them on (srun --export=ALL, mpirun -x NAME)",
        )
    lost = {
        f"{name}={value}"
        for rank in ranks
        for name, value in rank["settings"].items()
        if name in ("NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES", "OMPI_MCA_btl_tcp_if_include")
        and not _names_an_interface(value, rank)
    }
    if lost:
        yield Finding(
            "environment",
            "FAIL",
            f"{', '.join(sorted(lost))} names no interface of this node",
            "unset it, or name one of `ip -br address`",
        )
    disabled = [n for n in QUIET if any(rank["settings"].get(n) == "1" for rank in ranks)]
    if disabled:
        yield Finding(
            "environment", "WARN", f"{', '.join(disabled)} is set: NCCL is slow then", "unset it"
        )
    if not (different or lost or disabled):
        names = ", ".join(sorted(ranks[0]["settings"])) or "nothing set"
        yield Finding("environment", "OK", names)


def _names_an_interface(value: str, rank: dict[str, Any]) -> bool:
    """Whether one of the named interfaces is there; what can't be told counts as there."""
    names = [name.partition(":")[0] for name in value.lstrip("^=").split(",")]
    if value.startswith("^") or any("/" in name or name == "all" for name in names):
        return True
    known = [*rank["interfaces"], *rank["infiniband"]]
    return any(there.startswith(name) for name in names for there in known)


def cores(ranks: Ranks) -> Iterator[Finding]:
    """Every rank has cores, and not those of others alone."""
    by_node: dict[str, list[int]] = defaultdict(list)
    for number, rank in enumerate(ranks):
        by_node[rank["node"]].append(number)
    for node, members in by_node.items():
        usable = {core for number in members for core in ranks[number]["cores"]}
        if len(members) > len(usable):
            all_cores = ranks[members[0]]["all_cores"]
            bound = len(usable) < all_cores
            yield Finding(
                "cores",
                "WARN",
                f"{len(members)} ranks share {len(usable)} of {all_cores} cores of {node}",
                "ask for --cpus-per-task, or mpirun --bind-to none"
                if bound
                else "start fewer ranks a node",
            )
            return
    yield Finding("cores", "OK", f"{len(ranks[0]['cores'])} of {ranks[0]['all_cores']} for a rank")


def limits(ranks: Ranks) -> Iterator[Finding]:
    """Memory that may be locked, open files, stack."""
    files = FILES[0] + FILES[1] * len(ranks)
    yield _limit(
        ranks, "open files", "nofile", files, _count, f"at least {files} are needed",
        "FAIL", "ulimit -n 65536 in the job script",
    )  # fmt: skip
    yield _limit(
        ranks, "stack", "stack", STACK, _bytes, "native code may need more",
        "WARN", "ulimit -s 8192 in the job script",
    )  # fmt: skip
    pinning = any(rank["infiniband"] or rank["gpus"]["count"] > 0 for rank in ranks)
    yield _limit(
        ranks, "locked memory", "memlock", MEMLOCK if pinning else 0, _bytes,
        "InfiniBand and GPUs lock what they transfer", "WARN",
        "ulimit -l unlimited, or PropagateResourceLimitsExcept=MEMLOCK in slurm.conf",
    )  # fmt: skip


def _limit(
    ranks: Ranks, check: str, name: str, least: int, show: Callable[[int], str], why: str,
    level: Level, fix: str,
) -> Finding:  # fmt: skip
    """Whether every rank's limit `name` is `least` or none."""
    low = _those(ranks, lambda rank: 0 <= rank["limits"][name] < least)
    if not low:
        return Finding(check, "OK", show(ranks[0]["limits"][name]))
    limit = show(ranks[low[0]]["limits"][name])
    return Finding(check, level, f"{limit} on {who(low, _hosts(ranks))}: {why}", fix)


def _count(number: int) -> str:
    return "unlimited" if number < 0 else str(number)


def _bytes(number: float) -> str:
    if number < 0:
        return "unlimited"
    for prefix in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            return f"{number:.3g} {prefix}"
        number /= 1024
    return f"{number:.3g} PiB"


def shared_memory(ranks: Ranks) -> Iterator[Finding]:
    """Room in /dev/shm for all ranks of a node."""
    hosts = _hosts(ranks)
    here = Counter(hosts)
    poor = _those(ranks, lambda rank: rank["shm"].get("free", 0) < SHM * here[rank["node"]])
    if poor:
        free = ranks[poor[0]]["shm"].get("free", 0)
        yield Finding(
            "/dev/shm",
            "FAIL",
            f"{_bytes(free)} free on {who(poor, hosts)}, {_bytes(SHM)} a rank are needed",
            "remove what earlier jobs left there, or give the container more (--shm-size, or bind "
            "the host's)",
        )
    else:
        yield Finding("/dev/shm", "OK", f"{_bytes(ranks[0]['shm']['free'])} free")


def sessions(ranks: Ranks) -> Iterator[Finding]:
    """No folder of a killed mpirun that keeps a later one, with the same pid, from starting."""
    hosts = _hosts(ranks)
    left = _those(ranks, lambda rank: bool(rank["sessions"]))
    if left:
        stale = ranks[left[0]]["sessions"]
        yield Finding(
            "mpirun",
            "WARN",
            f"{len(stale)} killed on {who(left, hosts)} left session folders; another one that "
            "gets such a pid won't start (\"PMIx server's listener thread failed\")",
            f"unless an mpirun runs in a container here: rm -r {' '.join(stale[:8])}"
            + (" and so on" if len(stale) > 8 else ""),
        )


def clocks(ranks: Ranks) -> Iterator[Finding]:
    """The same time on all nodes."""
    worst = max(range(len(ranks)), key=lambda rank: abs(ranks[rank]["clock"]))
    offset = ranks[worst]["clock"]
    way = "ahead of" if offset > 0 else "behind"
    wrong = abs(offset) > CLOCKS
    yield Finding(
        "clocks",
        "WARN" if wrong else "OK",
        f"{who([worst], _hosts(ranks))} is {abs(offset):.3g} s {way} rank 0"
        if wrong
        else f"at most {abs(offset) * 1e3:.2g} ms apart",
        "have the site repair its time service" if wrong else "",
    )


def gpus(ranks: Ranks) -> Iterator[Finding]:
    """A GPU for each rank, its own, and the same kind everywhere."""
    hosts = _hosts(ranks)
    counts = [rank["gpus"]["count"] for rank in ranks]
    if max(counts) < 1:
        hidden = _those(ranks, lambda rank: rank["gpus"]["nodes"] > 0)
        if hidden:
            visible = ranks[hidden[0]]["gpus"]["visible"]
            yield Finding(
                "GPUs",
                "FAIL",
                f"{who(hidden, hosts)} has GPUs but the driver shows none"
                + (f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ""),
                "ask Slurm for --gpus-per-node, or containers for --nv",
            )
        else:
            yield Finding("GPUs", "OK", "no GPU: the cpu backend will be used")
        return
    without = _those(ranks, lambda rank: rank["gpus"]["count"] < 1)
    if without:
        yield Finding(
            "GPUs", "FAIL", f"no GPU on {who(without, hosts)}, but on others",
            "ask for --gpus-per-node, the same on all nodes",
        )  # fmt: skip
        return
    yield from _own_gpu(ranks)
    yield from _kinds(ranks)


def _own_gpu(ranks: Ranks) -> Iterator[Finding]:
    hosts = _hosts(ranks)
    few = _those(ranks, lambda rank: rank["gpus"]["count"] < rank["local_size"])
    owners: dict[str, list[int]] = defaultdict(list)
    for number, rank in enumerate(ranks):
        owners[chosen_gpu(rank)["uuid"]].append(number)
    shared = next((members for members in owners.values() if len(members) > 1), [])
    if shared:
        rank = ranks[shared[0]]
        yield Finding(
            "GPUs",
            "FAIL",
            f"{who(shared, hosts)} share one GPU ({chosen_gpu(rank)['uuid']}): "
            f"{rank['local_size']} ranks on the node, {rank['gpus']['count']} GPUs visible",
            "start as many ranks a node as it has GPUs, and leave CUDA_VISIBLE_DEVICES alone",
        )
    elif few:
        yield Finding(
            "GPUs",
            "WARN",
            f"{who(few, hosts)} sees {ranks[few[0]]['gpus']['count']} of the node's GPUs: NCCL and "
            "peer copies between them don't work then",
            "use --gpus-per-node with --ntasks-per-node, not --gpus-per-task",
        )
    else:
        names = Counter(chosen_gpu(rank)["name"] for rank in ranks)
        kinds = ", ".join(f"{count} × {name}" for name, count in names.items())
        yield Finding("GPUs", "OK", f"{kinds}, one for each rank")


def every_rank_has_a_gpu(ranks: Ranks) -> bool:
    """Whether NCCL can be tried: every rank with a GPU of its own."""
    if not ranks or any(rank["gpus"]["count"] < 1 for rank in ranks):
        return False
    return len({chosen_gpu(rank)["uuid"] for rank in ranks}) == len(ranks)


def chosen_gpu(rank: dict[str, Any]) -> dict[str, Any]:
    """The GPU that a rank takes: by its place on the node."""
    devices = rank["gpus"]["devices"]
    return dict(devices[rank["local_rank"] % len(devices)])


def _kinds(ranks: Ranks) -> Iterator[Finding]:
    hosts = _hosts(ranks)
    drivers = [rank["gpus"]["driver"] for rank in ranks]
    kinds = ["SM {}.{}".format(*chosen_gpu(rank)["sm"]) for rank in ranks]
    for name, values in (("driver", drivers), ("GPU kind", kinds)):
        mixed = len(set(values)) > 1
        yield Finding(
            name,
            "WARN" if mixed else "OK",
            by_value(values, hosts) if mixed or name == "driver" else _engines(ranks[0]),
            "use nodes of one kind: the slowest decides" if mixed else "",
        )
    links = {ways for rank in ranks for row in rank["gpus"]["peers"] for ways in row} - {"itself"}
    broken = _those(ranks, lambda rank: any("no" in row for row in rank["gpus"]["peers"]))
    yield Finding(
        "peers",
        "WARN" if broken else "OK",
        f"GPUs of {who(broken, hosts)} can't reach each other's memory"
        if broken
        else f"over {' and '.join(sorted(links))}" if links else "one GPU a node",
        "check nvidia-smi topo -m, IOMMU and ACS; copies go through the host otherwise"
        if broken
        else "",
    )  # fmt: skip


def _engines(rank: dict[str, Any]) -> str:
    """What an SM can do with the engines that there are."""
    major, minor = chosen_gpu(rank)["sm"]
    backends = ["cuda"] if major >= 8 else []
    if "tensorrt" in rank["packages"]:
        backends.append("tensorrt" + (" (multi-device attention)" if major >= 10 else ""))
    if "tensorrt-rtx" in rank["packages"] and (major, minor) != (9, 0):
        backends.append("tensorrt-rtx")
    return f"SM {major}.{minor}: {', '.join(backends) or 'too old for any backend but cpu'}"


def nccl(ranks: Ranks) -> Iterator[Finding]:
    """One libnccl, not several."""
    hosts = _hosts(ranks)
    many = _those(ranks, lambda rank: len(rank["nccl"]) > 1)
    if many:
        paths = ranks[many[0]]["nccl"]
        yield Finding(
            "libnccl",
            "WARN",
            f"{len(paths)} on {who(many, hosts)}: {', '.join(paths)}",
            "put the folder of the first into LD_LIBRARY_PATH, so that TensorRT loads it too",
        )
    elif any(rank["gpus"]["count"] > 0 for rank in ranks) or ranks[0]["nccl"]:
        found = [", ".join(rank["nccl"]) or "none that was looked for" for rank in ranks]
        yield Finding("libnccl", "OK", by_value(found, hosts))


def folder(ranks: Ranks) -> Iterator[Finding]:
    """A folder that all ranks share, with room, and made to last."""
    hosts = _hosts(ranks)
    facts = ranks[0]["folder"]
    path = facts["path"]
    gone = _those(ranks, lambda rank: not rank["folder"]["exists"])
    if gone:
        yield Finding(
            "folder", "FAIL", f"{path} isn't there on {who(gone, hosts)}",
            "create it, or name one that all nodes mount with --folder",
        )  # fmt: skip
        return
    closed = _those(
        ranks, lambda rank: rank["folder"]["read_only"] or not rank["folder"]["writable"]
    )
    if closed:
        yield Finding(
            "folder", "FAIL", f"{path} can't be written on {who(closed, hosts)}",
            "take a folder of yours; compute nodes may mount home folders read-only",
        )  # fmt: skip
        return
    kind, nodes = facts["type"], len(set(hosts))
    if nodes > 1 and kind in LOCAL:
        yield Finding(
            "folder", "WARN", f"{path} is {kind}, which one node has for itself",
            "take a folder on the parallel file system",
        )  # fmt: skip
    elif kind.startswith("nfs") and nodes > 1:
        yield Finding(
            "folder", "WARN", f"{path} is {kind}: several nodes write one file slowly there",
            "take a folder on the parallel file system",
        )  # fmt: skip
    elif facts["stripes"] == 1 and len(ranks) > 1:
        yield Finding(
            "folder", "WARN", f"{path} is Lustre with one stripe: all ranks write to one server",
            f"lfs setstripe -c -1 {path}",
        )  # fmt: skip
    elif facts["free"] < ROOM:
        yield Finding(
            "folder", "WARN", f"{path} has {_bytes(facts['free'])} left",
            "make room: an output is as large as its queries",
        )  # fmt: skip
    else:
        stripes = f", {facts['stripes']} stripes" if facts["stripes"] else ""
        yield Finding("folder", "OK", f"{path}: {kind}{stripes}, {_bytes(facts['free'])} free")


CHECKS = (
    launcher, mpi, versions, environment, cores, limits, shared_memory, sessions, clocks, gpus,
    nccl, folder,
)  # fmt: skip


def judge_rates(name: str, tries: Sequence[dict[str, Any]], hosts: Sequence[str]) -> Finding:
    """A collective that was tried: right everywhere, and not absurdly slow."""
    wrong = [rank for rank, found in enumerate(tries) if not found["right"]]
    slow = SLOW_NCCL if "NCCL" in name else SLOW_MPI
    rate = min(found["rate"] for found in tries)
    if wrong:
        return Finding(
            name, "FAIL", f"wrong values on {who(wrong, hosts)}",
            "take these nodes out (sbatch --exclude) and tell the site",
        )  # fmt: skip
    if rate < slow and len(tries) > 1:
        return Finding(
            name, "WARN", f"{rate / 1e6:.3g} MB/s a rank",
            "check which network is used: jobs/mpi/ says how to choose",
        )  # fmt: skip
    return Finding(name, "OK", f"{rate / 1e9:.3g} GB/s a rank")


def judge_folder(tries: Sequence[dict[str, Any]], hosts: Sequence[str]) -> Iterator[Finding]:
    """What writing and reading one file together was like."""
    blind = [rank for rank, found in enumerate(tries) if not found["shared"]]
    failed = [rank for rank, found in enumerate(tries) if found["error"]]
    wrong = [rank for rank, found in enumerate(tries) if not found["right"]]
    locked_out = [rank for rank, found in enumerate(tries) if found["locks"]]
    if failed:
        yield Finding(
            "shared file", "FAIL", f"{tries[failed[0]]['error']} on {who(failed, hosts)}",
            "make room or take another folder",
        )  # fmt: skip
    elif blind:
        yield Finding(
            "shared file", "FAIL", f"{who(blind, hosts)} doesn't see the file of rank 0",
            "take a folder on a file system that all nodes share",
        )  # fmt: skip
    elif wrong:
        yield Finding(
            "shared file", "FAIL", f"{who(wrong, hosts)} reads other bytes than were written",
            "take another file system: this one doesn't keep nodes coherent",
        )  # fmt: skip
    else:
        rates = [
            BLOCK * len(tries) / max(1e-9, *(found[key] for found in tries))
            for key in ("write_seconds", "read_seconds")
        ]
        slow = rates[0] < SLOW_FOLDER
        yield Finding(
            "shared file",
            "WARN" if slow else "OK",
            f"written at {rates[0] / 1e6:.3g} MB/s, read at {rates[1] / 1e6:.3g} MB/s, together",
            "take another file system for the output" if slow else "",
        )
    if locked_out:
        yield Finding(
            "file locks", "WARN",
            f"{tries[locked_out[0]]['locks']} on {who(locked_out, hosts)}",
            "set HDF5_USE_FILE_LOCKING=FALSE",
        )  # fmt: skip
