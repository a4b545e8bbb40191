"""A real Slurm on this one machine: munged, slurmctld, and a slurmd for every node.

Everything lives in one folder, talks over loopback on ports that were free, and is gone afterwards.
Nothing of an installed Slurm's own configuration is touched.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

from tests.support.mpirun import MARK, environment, kill_all

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY",
    "BOOT_FAIL", "DEADLINE",
}  # fmt: skip


def why_not() -> str:
    """Why this machine can't run Slurm for us; empty where it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]
    if missing:
        return f"Slurm isn't installed (no {', '.join(missing)}); Debian: slurm-wlm, munge"
    if os.geteuid():
        return "starting a Slurm needs root"
    return ""


class Slurm:
    """Clients of one running cluster."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self.env = dict(env)

    def run(self, *command: str | Path, check: bool = True, cwd: Path | None = None) -> str:
        """Run a client; what it printed."""
        done = subprocess.run(
            [str(word) for word in command], check=False,
            env=self.env, cwd=cwd or self.folder, text=True, capture_output=True, timeout=60,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def submit(self, script: Path, *options: str, arguments: Sequence[str | Path] = ()) -> str:
        """Submit `script`; its job id. What it prints goes to ``FOLDER/NAME-ID.log``."""
        output = [] if _names_its_log(script, options) else [f"--output={self.folder}/%x-%j.log"]
        return self.run("sbatch", "--parsable", *output, *options, script, *arguments).strip()

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by key."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        first = text.splitlines()[0]
        return dict(word.split("=", 1) for word in first.split() if "=" in word)

    def state(self, job: str) -> str:
        """For example RUNNING."""
        return self.job(job)["JobState"]

    def until(self, what: str, happened: Callable[[], bool], patience: float = 60.0) -> None:
        """Wait for `happened`; fail with the cluster's logs."""
        end = time.monotonic() + patience
        while not happened():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {patience:.0f} s for: {what}\n{self.logs()}")
            time.sleep(0.1)

    def wait(self, job: str, patience: float = 120.0) -> dict[str, str]:
        """Wait for the end of `job`."""
        self.until(f"the end of job {job}", lambda: self.state(job) in ENDED, patience)
        return self.job(job)

    def log(self, job: str) -> str:
        """What `job` has printed so far."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        """The queue, and the ends of all logs."""
        parts = [self.run("squeue", "--long", check=False), self.run("sinfo", "-R", check=False)]
        for path in sorted(self.folder.glob("*.log")):
            parts.append(f"--- {path.name}\n{path.read_text()[-3000:]}")
        return "\n".join(parts)

    def clear(self) -> None:
        """Cancel everything and wait until the nodes are free."""
        self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        self.run("scancel", "--user=root", check=False)
        self.until("an empty queue", lambda: not self.run("squeue", "--noheader").strip(), 30.0)


def _names_its_log(script: Path, options: Sequence[str]) -> bool:
    return "#SBATCH --output" in script.read_text() or any("--output" in one for one in options)


@contextmanager
def slurm(folder: Path, nodes: int = 2, cpus: int = 2, gpus: int = 2) -> Iterator[Slurm]:
    """Run a cluster of `nodes` in `folder`.

    Partition ``low`` (the default) is preempted by ``high`` and requeued then. Every node claims
    `cpus` processors and `gpus` GPUs, whatever the machine has.
    """
    ports = _free_ports(nodes + 1)
    _configure(folder, ports, nodes, cpus, gpus)
    env = environment({"SLURM_CONF": str(folder / "slurm.conf")})
    for name in [name for name in env if name.startswith(("SLURM_", "SBATCH_"))]:
        if name != "SLURM_CONF":
            del env[name]
    env["PATH"] = f"{env['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"
    cluster = Slurm(folder, env)
    daemons = []
    try:
        daemons.append(_munged(folder, env))
        daemons.append(_daemon(folder, env, "slurmctld", "slurmctld", "-D", "-i"))
        for node in range(1, nodes + 1):
            daemons.append(
                _daemon(folder, env, f"slurmd-n{node}", "slurmd", "-D", "-N", f"n{node}")
            )
        cluster.until("idle nodes", lambda: _idle(cluster) == nodes, 20.0)
        yield cluster
        cluster.clear()
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        kill_all(env[MARK])  # jobs and step daemons inherit the mark


def _idle(cluster: Slurm) -> int:
    return len(cluster.run("sinfo", "-hN", "-p", "low", "-t", "idle", check=False).splitlines())


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _munged(folder: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    daemon = _daemon(
        folder, env, "munged", "munged", "--foreground", "--force", f"--key-file={key}",
        f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid",
        f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
    )  # fmt: skip
    end = time.monotonic() + 20
    while not (folder / "munge.socket").exists():
        if daemon.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"munged: {(folder / 'munged.log').read_text()}")
        time.sleep(0.05)
    return daemon


def _daemon(
    folder: Path, env: Mapping[str, str], log: str, program: str, *options: str
) -> subprocess.Popen[bytes]:
    path = shutil.which(program, path=SEARCH)
    assert path
    with (folder / f"{log}.log").open("ab") as file:
        return subprocess.Popen(
            [path, *options], env=dict(env), cwd=folder, stdin=subprocess.DEVNULL, stdout=file,
            stderr=file, start_new_session=True,
        )  # fmt: skip


def _configure(folder: Path, ports: Sequence[int], nodes: int, cpus: int, gpus: int) -> None:
    for name in ("state", *(f"{kind}-n{n + 1}" for kind in ("spool", "tmp") for n in range(nodes))):
        (folder / name).mkdir()
    host = socket.gethostname()
    lines = [
        f"NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[node]} CPUs={cpus} "
        f"RealMemory=1000 Gres=gpu:{gpus} State=UNKNOWN"
        for node in range(1, nodes + 1)
    ]
    text = f"""\
        ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        SlurmUser=root
        SlurmctldPort={ports[0]}
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/slurmd-%n.pid
        SlurmdSpoolDir={folder}/spool-%n
        TmpFS={folder}/tmp-%n
        StateSaveLocation={folder}/state
        AuthType=auth/munge
        # A requeued job may not start again before the credential of its first life has expired.
        AuthInfo=socket={folder}/munge.socket,cred_expire=5
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        MpiDefault=none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_CPU
        GresTypes=gpu
        SlurmdParameters=config_overrides
        SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0
        PreemptType=preempt/partition_prio
        PreemptMode=REQUEUE
        JobRequeue=1
        KillWait=5
        MinJobAge=300
        ReturnToService=2
        SwitchType=switch/none
        PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=10 GraceTime=20
        PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=10
    """
    (folder / "slurm.conf").write_text(dedent(text) + "\n".join(lines) + "\n")
    # Slurm counts the device files of GPUs, and doesn't look at what they are.
    devices = [Path(f"{folder}/gpu{gpu}") for gpu in range(gpus)]
    for device in devices:
        device.symlink_to("/dev/null")
    gres = [f"NodeName=n[1-{nodes}] Name=gpu File={device}" for device in devices]
    (folder / "gres.conf").write_text("\n".join(gres) + "\n")


if __name__ == "__main__":  # a cluster to play with: python -m tests.support.slurm FOLDER
    place = Path(sys.argv[1])
    place.mkdir(parents=True)
    with slurm(place) as running:
        print(f"export SLURM_CONF={running.env['SLURM_CONF']}", flush=True)
        sys.stdin.read()
