"""Make an ONNX model that P ranks run together, each on its own tokens.

  mdattn shard block.onnx -n 4 -s ring -o sharded.onnx
  mdattn build --onnx sharded.onnx -n 4 --tokens 1024:65536 -o block.engine

Attention is found as the operators Attention (opset 23 and later) and TRT_Attention, as those of
ONNX Runtime (MultiHeadAttention, GroupQueryAttention, Attention), and as MatMul-Softmax-MatMul,
with masks that are made of lengths. ring marks it for TensorRT's multi-device attention; allgather
and ulysses put DistCollective nodes around it. Positions become an input. Everything else must
treat every token alike: nodes that aren't known to are refused by name, all of them at once, in
branches too.

Where ONNX Runtime is installed, the sharded model is run against the whole one, on the shards of P
ranks in one process. Exit codes: 0 right or inconclusive, which is said; 1 wrong, and nothing is
written; 2 refused.

The attentions tell which dims of the inputs count tokens. Where they can't, name every one of them:

  mdattn shard block.onnx -n 4 -s ulysses --shard hidden:1 \\
      --shard positions:1 -o sharded.onnx
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import DTYPES, FLAT_STRATEGIES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL.onnx")
    add("-o", "--output", metavar="OUT.onnx", required=True, help="the sharded model")
    add("-n", "--ranks", type=int, metavar="P", required=True, help="ranks that run it together")
    add("-s", "--strategy", required=True, choices=FLAT_STRATEGIES)
    add(
        "--shard",
        action="append",
        default=[],
        metavar="INPUT:DIM",
        help="the dim of an input that counts tokens (default: what the attentions tell)",
    )
    add(
        "--until",
        action="append",
        default=[],
        metavar="TENSOR",
        help="end the model at this tensor: before a pooling over the tokens, for example",
    )
    add(
        "--dtype",
        choices=["fp16", "bf16", "fp32"],
        help="of products and attentions that are in float32, which TensorRT's attention isn't "
        "made for (fp32: leave them)",
    )
    add(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="run it against the whole model in ONNX Runtime (default: where that is installed)",
    )
    add("--json", action="store_true", help="print how it is sharded")


def main(arguments: argparse.Namespace) -> int:
    """Shard; check; write; say what was done to which node."""
    from mdattn_mpi.onnx.cast import has_float32_attention
    from mdattn_mpi.onnx.model import load_model, save_model
    from mdattn_mpi.onnx.segments import load_weights
    from mdattn_mpi.onnx.shard import end_at, shard_model
    from mdattn_mpi.onnx.sharding import read_sharding

    if arguments.ranks < 1:
        raise RejectedError(f"-n {arguments.ranks}", fix="use at least one rank")
    logging.basicConfig(format="mdattn: %(message)s", stream=sys.stderr)
    source, target = Path(arguments.model), Path(arguments.output)
    if source.resolve() == target.resolve():
        raise RejectedError("the output is the model itself", file=str(target), fix="name another")
    model = load_model(source)
    dtype = DTYPES.get(arguments.dtype)
    if dtype:
        model = load_weights(model, source)
    try:
        if arguments.until:
            end_at(model, arguments.until)
        sharded, done = shard_model(
            model, arguments.strategy, arguments.ranks, parse_axes(arguments.shard), dtype
        )
        if arguments.ranks > 1 and not arguments.dtype and has_float32_attention(sharded):
            raise RejectedError(
                "its attentions are in float32, which TensorRT has no kernel for",
                fix="add --dtype fp16 or bf16; or --dtype fp32 to leave them, for ONNX Runtime",
            )
    except RejectedError as error:
        error.file = error.file or str(source)
        raise
    sharding = read_sharding(sharded, target)
    verdict, told = _check(arguments, model, sharded, sharding, dtype)
    if verdict == "wrong":
        print("\n".join(told), "nothing was written", sep="\n", file=sys.stderr)
        return 1
    save_model(sharded, source, target)
    if arguments.json:
        print(
            json.dumps(
                {
                    "strategy": sharding.strategy,
                    "ranks": sharding.ranks,
                    "axes": sharding.axes,
                    "done": done,
                    "check": verdict,
                },
                indent=1,
            )
        )
        return 0
    for line in [*done, *told]:
        print(line)
    axes = ", ".join(f"{name}:{axis}" for name, axis in sharding.axes.items())
    print(f"{target}: {sharding.strategy} on {sharding.ranks} ranks; tokens in {axes}")
    return 0


def _check(
    arguments: argparse.Namespace, model: Any, sharded: Any, sharding: Any, dtype: Any
) -> tuple[str, list[str]]:
    """Hold the sharded model against the whole one; return the verdict and lines about it.

    One that is cast is checked before and after.
    """
    from mdattn_mpi.onnx.compare import compare
    from mdattn_mpi.onnx.segments import import_onnxruntime
    from mdattn_mpi.onnx.shard import shard_model

    if arguments.check is False or arguments.ranks == 1:
        return "not checked", []
    source = Path(arguments.model)
    try:
        import_onnxruntime()
        found = []
        axes = parse_axes(arguments.shard)
        if dtype:
            plain, _ = shard_model(model, arguments.strategy, arguments.ranks, axes)
            found.append(compare(model, source, plain, sharding))
        if dtype != "bfloat16":  # which ONNX Runtime doesn't compute in
            found.append(compare(model, source, sharded, sharding, dtype=dtype, named_axes=axes))
    except RejectedError as error:
        if arguments.check:
            raise
        return "not checked", [f"not checked: {error}"]
    verdicts = [each.verdict for each in found]
    worst = next((each for each in ("wrong", "inconclusive") if each in verdicts), "right")
    names = ["in float32", f"in {dtype}"] if dtype else ["as it is"]
    return worst, [f"{name}: {each}" for name, each in zip(names, found, strict=False)]


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
