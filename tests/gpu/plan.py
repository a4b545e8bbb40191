"""``mdattn plan`` against jobs: what it says before, and what they take.

  python tests/gpu/plan.py --gpus-per-node 2 --folder /dev/shm
  python tests/gpu/plan.py --ranks-per-node 2 --folder /tmp --rows long,short,mixed

Not a test: it prints seconds, and memory where there are GPUs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mdattn_mpi.bench.job import MIXED, make_dataset
from mdattn_mpi.problem import AttentionProblem, Causal

# Items, tokens, q and kv heads, head dim, mask, group size: of GPUs, and of cores.
Row = tuple[int, tuple[int, ...], int, int, int, Causal, str]
GPU_ROWS: dict[str, Row] = {
    "files": (8, (65536,), 32, 8, 128, "none", "all"),
    "long": (4, (524288,), 4, 1, 128, "none", "all"),
    "mixed": (24, MIXED, 16, 4, 128, "upper_left", "auto"),
}
CORE_ROWS: dict[str, Row] = {
    "long": (4, (8192,), 4, 4, 128, "none", "all"),
    "short": (150, (512,), 8, 2, 128, "none", "1"),
    "mixed": (18, tuple(500 + 270 * n for n in range(18)), 8, 2, 64, "upper_left", "auto"),
}


def main() -> None:
    """Print a line a row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", metavar="NAME,NAME", help="default: all")
    parser.add_argument("--tokens", nargs=2, metavar=("FILE", "MODEL"), help="a model's job too")
    given = parser.parse_args()
    rows = GPU_ROWS if given.gpus_per_node else CORE_ROWS
    data = given.folder / "plan-data.h5"
    for name in rows if given.rows is None else filter(None, given.rows.split(",")):
        count, lengths, heads, kv_heads, dim, causal, size = rows[name]
        problems = [
            AttentionProblem(length, length, heads, kv_heads, dim, dim, causal=causal)
            for length in lengths
        ]
        make_dataset(data, [problems[n % len(problems)] for n in range(count)])
        compare(name, given, str(data), ["--group-size", size])
        data.unlink()
    if given.tokens:
        path, model = given.tokens
        compare("model", given, path, ["--group-size", "auto", "--model", model])


def compare(name: str, given: argparse.Namespace, data: str, options: list[str]) -> None:
    """Plan, run, and print both."""
    out = given.folder / "plan-out.h5"
    gpus, ranks = given.gpus_per_node, given.gpus_per_node or given.ranks_per_node
    where = ["--gpus-per-node", str(gpus)] if gpus else ["--ranks-per-node", str(ranks)]
    plan = mdattn("plan", data, "-o", str(out), "--nodes", "1", *where, *options, "--json")
    said = json.loads(plan)
    expected = said["plans"][said["asked"]]
    peaks = Peaks(gpus > 0)
    began = time.perf_counter()
    backend = "cuda" if gpus else "cpu"
    run = ["run", data, "-o", str(out), "-b", backend, *options, "--overwrite", "-q"]
    run += [] if gpus else ["--threads", "1"]
    mdattn(*run, launcher=["mpirun", "-n", str(ranks), "--bind-to", "none"])
    took = time.perf_counter() - began
    gpu, host = peaks.stop()
    seconds = json.loads(Path(f"{out}.run/summary.json").read_text())["seconds"]
    items = expected["seconds"] - expected["starting_seconds"]
    print(
        f"{name}: {took:.2f} s, plan {expected['seconds']:.2f} "
        f"({expected['seconds'] / took:.2f}); items {seconds['items']:.2f}, plan {items:.2f} "
        f"({items / seconds['items']:.2f}); launching {seconds['launching']:.2f}, opening "
        f"{seconds['opening']:.2f}; GiB a GPU {gpu / 2**30:.2f}, plan "
        f"{expected['gpu_memory_bytes'] / 2**30:.2f}; a node {host / 2**30:.2f}, plan "
        f"{expected['host_memory_bytes'] / 2**30:.2f}; waits for {expected['waits_for']}; "
        f"groups {expected['items_by_group_size']}; {'; '.join(said['notes'])}",
        flush=True,
    )


class Peaks:
    """Looks now and then at the fullest GPU's memory, and at what the ranks hold."""

    def __init__(self, gpus: bool) -> None:
        self._gpus, self._ended = gpus, threading.Event()
        self._gpu = self._host = 0
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> tuple[int, int]:
        """Bytes of a GPU and of all ranks, at most."""
        self._ended.set()
        self._thread.join()
        return self._gpu, self._host

    def _look(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._ended.wait(0.2):
            if self._gpus:
                used = subprocess.run(query, capture_output=True, text=True, check=True).stdout
                self._gpu = max(self._gpu, *(int(word) << 20 for word in used.split()))
            resident = sum(resident_bytes(path) for path in Path("/proc").glob("[0-9]*"))
            self._host = max(self._host, resident)


def resident_bytes(process: Path) -> int:
    """What a rank of this program holds for itself; 0 for any other process."""
    try:
        if b"plan-out.h5\0" not in (process / "cmdline").read_bytes():
            return 0
        status = (process / "status").read_text()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if "RssAnon" in line)


def mdattn(*words: str, launcher: list[str] | None = None) -> str:
    """Run a command; what it printed."""
    command = [*(launcher or []), sys.executable, "-m", "mdattn_mpi", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
