"""`mdattn bench tensorrt`: everything is tried, failures are noted, one small file says it all."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.ranks import on_ranks
from tests.support.tensorrt import library, needs_tensorrt

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.world import World

pytestmark = needs_tensorrt


@on_ranks(2, 3)
def test_the_file_tells_what_ran_and_what_did_not(world: World, folder: Path) -> None:
    from mdattn_mpi import backends
    from mdattn_mpi.bench import tensorrt as bench
    from tests.support.tensorrt_double import DoubleBackend

    real = backends.open_backend

    def open_double(name: str, group: Any, **more: Any) -> Any:
        if name == "tensorrt":
            return DoubleBackend(group, library(), version="11.2.3", lies="fp16")
        return real("cpu", group, threads=1)

    parser = argparse.ArgumentParser()
    bench.add_options(parser)
    parser.add_argument("--json", action="store_true")
    shape = "--lengths 96 --q-heads 6 --kv-heads 6 --head-dims 64 --rounds 1 --json"
    arguments = parser.parse_args([*shape.split(), "-o", str(folder / "found.json")])
    backends.open_backend = open_double
    try:
        bench.measure(world, arguments)
    finally:
        backends.open_backend = real
    if world.rank:
        return
    text = (folder / "found.json").read_text()
    assert len(text) < 8192 * (world.size - 1)
    found = json.loads(text)
    assert found["facts"]["tensorrt"] == "11.2.3"
    rows = found["rows"]
    assert len(rows) == 12 * (world.size - 1)
    for row in rows:
        if row["strategy"] == "ring" and row["mask"] != "none":
            assert "has no mask" in row["tensorrt"]["error"]
        elif row["dtype"] == "float16":
            assert "summed in FP16" in row["tensorrt"]["error"]
        else:
            assert row["tensorrt"]["item_ms"] > 0
            assert "proven on" in row["tensorrt"]["proof"]
        assert row["cuda"]["item_ms"] > 0
