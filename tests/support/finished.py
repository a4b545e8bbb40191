"""A dataset and the finished output of it, made without running a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from mdattn_mpi.dataset import create_output, open_dataset, open_output
from mdattn_mpi.partition import partition
from mdattn_mpi.problem import AttentionProblem, StrategyName
from tests.support.group import take
from tests.support.reference import DTYPES, Array, attention, random_inputs

Inputs = tuple[AttentionProblem, tuple[Array, ...]]


class Files(NamedTuple):
    """Where the two are."""

    data: Path
    output: Path


def write_dataset(path: Path, tensors: Mapping[str, Inputs]) -> None:
    """Write inputs; BF16 as ``uint16`` with an attribute."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "mdattn-dataset", "version": 1})
        for name, (problem, arrays) in tensors.items():
            group = file.create_group(f"items/{name}")
            group.attrs.update({"causal": problem.causal, "scale": problem.scale})
            group.attrs.update({"window": problem.window, "softcap": problem.softcap})
            if problem.sinks:
                group.create_dataset("sinks", data=arrays[3])
            if problem.segments:
                group.create_dataset("segments", data=np.array(problem.segments))
            for tensor, array in zip(("query", "key", "value"), arrays, strict=False):
                if problem.dtype == "float16":
                    group.create_dataset(tensor, data=array)
                else:
                    made = group.create_dataset(tensor, data=array.view(np.uint16))
                    made.attrs["dtype"] = problem.dtype


def finished(
    folder: Path,
    problems: Mapping[str, AttentionProblem],
    *,
    ranks: int = 2,
    strategy: StrategyName = "ring",
    lse: bool = False,
    seed: int = 0,
) -> Files:
    """Write a dataset, and an output with every item right and done."""
    files = Files(folder / "data.h5", folder / "out.h5")
    inputs = {name: (p, random_inputs(p, seed + n)) for n, (name, p) in enumerate(problems.items())}
    write_dataset(files.data, inputs)
    with open_dataset(files.data) as dataset:
        attributes = {**dataset.identity, "backend": "cpu", "items": "*", "layout": "auto"}
        create_output(files.output, dataset.items, ranks=ranks, lse=lse, attributes=attributes)
    with open_output(files.output, writable=True) as output:
        for item in output.items:
            assert isinstance(item.problem, AttentionProblem)
            out, sums = attention(item.problem, *inputs[item.name][1])
            out, sums = out.astype(DTYPES[item.problem.dtype]), sums.astype(np.float32)
            arrays = {"output": out, "lse": sums} if lse else {"output": out}
            shards = partition(item.problem, strategy, ranks).query
            crc32s = [
                output.write(item, spans, {name: take(a, spans) for name, a in arrays.items()})
                for spans in shards
            ]
            output.ledger.commit(item, crc32s, strategy, shards)
    return files
