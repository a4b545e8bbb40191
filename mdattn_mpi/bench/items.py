"""Datasets to measure with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from mdattn_mpi.problem import AttentionProblem

if TYPE_CHECKING:
    from mdattn_mpi.dataset.layout import Encoding, Layout


def make_dataset(
    path: str | os.PathLike[str],
    problems: Sequence[AttentionProblem],
    *,
    encoding: Encoding = "float",
    layout: Layout = "token_major",
    overwrite: bool = False,
) -> None:
    """Write items of random numbers, the same block of them again and again.

    Drawing them all, as `mdattn make-data` does, would take longer than measuring.
    """
    import numpy as np

    from mdattn_mpi.dataset import NUMPY, TENSORS, Item, create_dataset
    from mdattn_mpi.dataset.making import shapes

    items = [Item(f"item{number}", number, problem) for number, problem in enumerate(problems)]
    block = np.random.default_rng().standard_normal(1 << 24, np.float32)
    with create_dataset(
        path, items, encoding=encoding, layout=layout, overwrite=overwrite
    ) as dataset:
        for item in items:
            some = block.astype(NUMPY[item.problem.dtype])
            for tensor in TENSORS:
                left = prod(shapes(item.problem)[tensor])
                while left:
                    dataset.append(item, tensor, some[: min(left, some.size)])
                    left -= min(left, some.size)
