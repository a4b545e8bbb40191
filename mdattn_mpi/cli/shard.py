"""Make an ONNX model that P ranks run together, each on its own tokens.

  mdattn shard block.onnx -n 4 -s ring -o sharded.onnx
  mdattn build --onnx sharded.onnx -n 4 --tokens 1024:65536 -o block.engine

Attention is found as the operators Attention (opset 23 and later) and TRT_Attention, and as
MatMul-Softmax-MatMul. ring marks it for TensorRT's multi-device attention; allgather and ulysses
put DistCollective nodes around it. Everything else must treat every token alike: a node that
isn't known to is refused by name, in branches too.

The attentions tell which dims of the inputs count tokens. Where they can't, name every one of them:

  mdattn shard block.onnx -n 4 -s ulysses --shard hidden:1 --shard positions:1 -o sharded.onnx
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import STRATEGY_NAMES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL.onnx")
    add("-o", "--output", metavar="OUT.onnx", required=True, help="the sharded model")
    add("-n", "--ranks", type=int, metavar="P", required=True, help="ranks that run it together")
    add("-s", "--strategy", required=True, choices=STRATEGY_NAMES)
    add(
        "--shard",
        action="append",
        default=[],
        metavar="INPUT:DIM",
        help="the dim of an input that counts tokens (default: what the attentions tell)",
    )
    add("--json", action="store_true", help="print how it is sharded")


def main(arguments: argparse.Namespace) -> int:
    """Shard; write; say what was done to which node."""
    from mdattn_mpi.onnx.model import load_model, save_model
    from mdattn_mpi.onnx.shard import shard_model
    from mdattn_mpi.onnx.sharding import read_sharding

    if arguments.ranks < 1:
        raise RejectedError(f"-n {arguments.ranks}", fix="use at least one rank")
    logging.basicConfig(format="mdattn: %(message)s", stream=sys.stderr)
    source, target = Path(arguments.model), Path(arguments.output)
    if source.resolve() == target.resolve():
        raise RejectedError("the output is the model itself", file=str(target), fix="name another")
    model = load_model(source)
    try:
        sharded, done = shard_model(
            model, arguments.strategy, arguments.ranks, parse_axes(arguments.shard)
        )
    except RejectedError as error:
        error.file = error.file or str(source)
        raise
    save_model(sharded, source, target)
    sharding = read_sharding(sharded, target)
    if arguments.json:
        print(
            json.dumps(
                {
                    "strategy": sharding.strategy,
                    "ranks": sharding.ranks,
                    "axes": sharding.axes,
                    "done": done,
                },
                indent=1,
            )
        )
        return 0
    for line in done:
        print(line)
    axes = ", ".join(f"{name}:{axis}" for name, axis in sharding.axes.items())
    print(f"{target}: {sharding.strategy} on {sharding.ranks} ranks; tokens in {axes}")
    return 0


def parse_axes(pairs: list[str]) -> dict[str, int]:
    """Read ``INPUT:DIM`` pairs.

    Raises
    ------
    RejectedError
        No colon, or a dim that isn't a number.

    """
    axes: dict[str, int] = {}
    for pair in pairs:
        name, colon, dim = pair.rpartition(":")
        if not colon or not name or not dim.lstrip("-").isdecimal():
            raise RejectedError(f"--shard {pair!r}", fix="write INPUT:DIM, for example hidden:0")
        axes[name] = int(dim)
    return axes
