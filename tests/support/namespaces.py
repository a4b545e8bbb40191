"""Network namespaces as hosts: each has an address and a name of its own, and a cable to a switch.

They share the machine's files and processors, as nodes of a cluster share a file system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# HOST COMMAND…, as ssh would; bash -c takes what the launcher has quoted for a shell.
AGENT = """\
#!/bin/sh
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host && $*"
"""


def why_not() -> str:
    """Why this machine can't do it; empty where it can."""
    if os.geteuid():
        return "making network namespaces takes root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "there is no ip or unshare here; Debian: iproute2, util-linux"
    name = f"md{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this kernel, or container, lets nobody make network namespaces"
    _ip("netns", "del", name)
    return ""


class Hosts:
    """Hosts of one switch."""

    def __init__(self, names: list[str], agent: Path) -> None:
        self.names = names
        self.agent = agent

    def mpirun(self, program: str, each: int = 1) -> tuple[str, ...]:
        """Open MPI's `program`, on the first host, with `each` ranks on each, over TCP alone."""
        return (
            "ip", "netns", "exec", self.names[0], "unshare", "--uts",
            "sh", "-c", f'hostname {self.names[0]} && exec "$@"', "sh",
            program, "--host", ",".join(f"{name}:{each}" for name in self.names),
            "--prtemca", "plm", "ssh", "--prtemca", "plm_ssh_agent", str(self.agent),
            "--mca", "pml", "ob1", "--mca", "btl", "tcp,self",
        )  # fmt: skip

    def cut(self, name: str) -> None:
        """Pull the cable of a host."""
        _ip("-n", name, "link", "set", "cable", "down")


@contextmanager
def hosts(folder: Path, count: int = 2) -> Iterator[Hosts]:
    """Make `count` hosts, and take them away."""
    tag = uuid.uuid4().hex[:4]
    switch, names = f"md{tag}s", [f"md{tag}n{number}" for number in range(count)]
    agent = folder / "agent.sh"
    agent.write_text(AGENT)
    agent.chmod(0o755)
    table = "127.0.0.1 localhost\n" + "".join(
        f"10.77.0.{number + 1} {name}\n" for number, name in enumerate(names)
    )
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for number, name in enumerate(names):
            (Path("/etc/netns") / name).mkdir(parents=True)
            (Path("/etc/netns") / name / "hosts").write_text(table)
            _ip("netns", "add", name)
            _ip("-n", name, "link", "add", "cable", "type", "veth", "peer", "name", f"port{number}",
                "netns", switch)  # fmt: skip
            _ip("-n", switch, "link", "set", f"port{number}", "master", "switch", "up")
            _ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield Hosts(names, agent)
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
