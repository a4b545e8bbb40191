"""A small model for `mdattn run --bind`: ``python -m tests.support.model_job run …`` runs it.

TensorRT's runtime and the GPU are doubles; what the engine computes is right. `prepare` writes the
files, `expected` is the model in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BIND = ("hidden=items/*/hidden:0", "output=items/*/out")


def prepare(
    folder: Path,
    ranks: int,
    lengths: Sequence[int],
    strategy: Any = "allgather",
    known: bool = False,
) -> None:
    """Write ``data.h5`` and ``block.engine``: an attention block that `ranks` run together.

    With what ONNX Runtime gives for known inputs beside it, if wanted.
    """
    from dataclasses import replace

    import h5py
    import numpy as np

    from mdattn_mpi.onnx.shard import shard_model
    from mdattn_mpi.onnx.sharding import read_sharding
    from mdattn_mpi.trt.onnx_import import known_of
    from mdattn_mpi.trt.store import describe, sha256_of, write_engine
    from tests.support.onnx_block import HEAD_DIM, HEADS
    from tests.support.tensorrt import library

    sharded, _ = shard_model(model(), strategy, ranks, {})
    engine = sharded.SerializeToString()
    sharding = read_sharding(sharded, folder)
    manifest = describe(engine, library(), (12, 0), sharding, model="0")
    run, why = known_of(sharded, folder, sharding, (1, 1 << 20)) if known else (b"", "not wanted")
    manifest = replace(manifest, known=sha256_of(run) if run else "", unproven=why)
    write_engine(folder / "block.engine", engine, manifest, run)
    random = np.random.default_rng()
    with h5py.File(folder / "data.h5", "w") as file:
        for number, tokens in enumerate(lengths):
            hidden = random.standard_normal((tokens, 1, HEADS * HEAD_DIM))
            file[f"items/item{number}/hidden"] = hidden.astype(np.float16)


def model() -> Any:
    """Return the block as an ONNX model, the same every time."""
    from tests.support.onnx_block import HEADS, make_block

    return make_block(kv_heads=HEADS, causal=True)


def expected(folder: Path, number: int) -> Any:
    """Compute an item in float64."""
    import h5py

    from tests.support.onnx_block import HEADS, evaluate

    with h5py.File(folder / "data.h5") as data:
        hidden = data[f"items/item{number}/hidden"][:]
    return evaluate(model(), hidden, HEADS, causal=True)


def command(folder: Path, *options: str, bind: Sequence[str] = BIND, model: str = "") -> list[str]:
    """Arguments for ``python`` that run the job: the engine, or an ONNX file `model`."""
    files = [str(folder / "data.h5"), "-o", str(folder / "out.h5")]
    bound = [word for each in bind for word in ("--bind", each)]
    engine = ["--engine", str(folder / "block.engine")]
    if model:
        engine = ["--model", str(folder / model), "-b", "tensorrt"]
    return ["-m", "tests.support.model_job", "run", *files, *engine, *bound, *options]


def main() -> int:
    from mdattn_mpi.cli import main as cli_main
    from mdattn_mpi.cli import run

    work = run._work

    def with_doubles(arguments: argparse.Namespace) -> int:
        """Only in the rank: its watchdog must not import NumPy."""
        from mdattn_mpi.runner import model as module
        from mdattn_mpi.trt import onnx_import
        from tests.support.tensorrt import library
        from tests.support.tensorrt_double import DoubleRuntime

        def open_double(group: Any) -> DoubleRuntime:
            return DoubleRuntime(group, library())

        module.open_runtime = open_double  # type: ignore[attr-defined]
        onnx_import.serialize = lambda library, model, *rest: model.SerializeToString()
        return work(arguments)

    run._work = with_doubles
    return cli_main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
