"""Build a TensorRT engine that P ranks run together, and its manifest beside it.

  mdattn build data.h5 -s allgather -n 4 -o attn.engine
  mdattn build --problem tokens=1000:131072,heads=32/8,head_dim=128 \\
      -s ulysses -n 4 -o attn.engine
  mdattn build --onnx sharded.onnx -n 2 --tokens 1024:65536 -o block.engine
  mdattn build --adopt theirs.engine data.h5 -s allgather -n 4 -o attn.engine

One engine covers all lengths of a dataset. TensorRT-RTX builds for GPUs that aren't there (--sm);
full TensorRT needs the GPU. Jobs build what they need by themselves and keep it in a cache; this
command is for building on another machine, and for models.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, cast

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.text import quantity

if TYPE_CHECKING:
    from mdattn_mpi.problem import AttentionProblem, Causal, DTypeName
    from mdattn_mpi.trt.build import BuiltEngine
    from mdattn_mpi.trt.library import SM, Library
    from mdattn_mpi.trt.spec import EngineSpec
    from mdattn_mpi.trt.store import Manifest

EPILOG = """\
--problem takes NAME=VALUE pairs, separated by commas: tokens (or q_tokens and kv_tokens), a number
or a range A:B; heads, as QUERY/KV; head_dim; dtype (bf16, fp16); causal (none, upper_left,
lower_right); scale.

--adopt writes a manifest for an engine that was built elsewhere. An engine is native code: vouch
only for one whose origin you trust.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA.h5", help="build for the items of this dataset")
    add("--problem", metavar="NAME=VALUE,…", help="build for these shapes instead")
    add("--onnx", metavar="MODEL.onnx", help="build this model, sharded by `mdattn shard`, instead")
    add("--adopt", metavar="FILE", help="build nothing: vouch for the engine in FILE")
    add("-o", "--output", metavar="FILE.engine", required=True, help="FILE.engine.json goes beside")
    add("-n", "--ranks", type=int, metavar="P", required=True, help="ranks that run it together")
    add("-s", "--strategy", default="auto", metavar="NAME", help="auto, ring, allgather, ulysses")
    add("--sm", metavar="X.Y", help="the GPU to build for (default: the one that is here)")
    add("--items", default="*", metavar="PATTERN", help="only these items of DATA.h5")
    add("--tokens", metavar="A:B", help="with --onnx: tokens of the whole sequence")
    add("--no-cache", action="store_true", help="build even if the cache has it")
    add("--verbose", action="store_true", help="show TensorRT's whole log")
    add("--json", action="store_true", help="print the manifest")


def main(arguments: argparse.Namespace) -> int:
    """Build, or adopt; write engine and manifest; say what was done."""
    from mdattn_mpi.trt.library import find_library
    from mdattn_mpi.trt.store import write_engine

    if sum(bool(given) for given in (arguments.data, arguments.problem, arguments.onnx)) != 1:
        raise RejectedError("what is to be built?", fix="name one of DATA.h5, --problem, --onnx")
    if arguments.ranks < 1:
        raise RejectedError(f"-n {arguments.ranks}", fix="use at least one rank")
    if arguments.verbose:
        logging.basicConfig(format="%(message)s", level=logging.DEBUG)
    library = find_library()
    sm = target_of(library, arguments.sm)
    began = perf_counter()
    if arguments.onnx:
        built, how = _model(arguments, library, sm)
    else:
        built, how = _attention(arguments, library, sm)
    write_engine(Path(arguments.output), built.engine, built.manifest, built.known)
    if arguments.json:
        print(built.manifest.to_json().decode())
    else:
        print(_line(arguments, built.manifest, f"{how} in {perf_counter() - began:.2f} s"))
        for known in known_faults(built.manifest):
            print(f"  {known}")
        if built.manifest.unproven:
            print(f"  it can't be proven before it runs: {built.manifest.unproven}")
    return 0


def target_of(library: Library, named: str | None) -> SM:
    """Take the SM that the user named, else the one of the GPU that is here.

    Raises
    ------
    RejectedError
        Neither; or one that the library can't build for from here.

    """
    from mdattn_mpi.trt.library import parse_sm, show_sm, visible_sm

    here = visible_sm()
    sm = parse_sm(named) if named else here
    known = ", ".join(show_sm(target) for target in library.targets)
    if sm is None:
        raise RejectedError(
            "there is no GPU here to build for",
            fix=f"name one: --sm {known}" if known else "full TensorRT builds on the GPU itself",
        )
    if sm != here and sm not in library.targets:
        raise RejectedError(
            f"{library} can't build for SM {show_sm(sm)} from here",
            fix=f"use --sm {known}" if known else "full TensorRT builds on the GPU itself",
        )
    return sm


def _attention(arguments: argparse.Namespace, library: Library, sm: SM) -> tuple[BuiltEngine, str]:
    from mdattn_mpi.trt.build import BuiltEngine, make_attention
    from mdattn_mpi.trt.store import Cache, describe

    spec = spec_of(arguments, library, sm)
    if arguments.adopt:
        engine = _adopted(arguments.adopt)
        return BuiltEngine(engine, describe(engine, library, sm, spec)), "adopted"
    built = make_attention(library, spec, sm, None if arguments.no_cache else Cache.default())
    return built, "from the cache" if built.cached else "built"


def _adopted(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise RejectedError(
            f"cannot read the engine: {error.strerror}", file=path, fix="check the path"
        ) from error


def spec_of(arguments: argparse.Namespace, library: Library, sm: SM) -> EngineSpec:
    """Find the one engine that does all problems that the user named.

    Raises
    ------
    RejectedError, DeviceError
        No strategy can; or one engine isn't enough.

    """
    from mdattn_mpi.trt.choice import choose, spec_for
    from mdattn_mpi.trt.spec import any_length

    ranged = False
    if arguments.problem:
        problems, ranged = parse_problem(arguments.problem)
    else:
        problems = _problems_of(arguments.data, arguments.items)
    # The longest decides: what can do it can do the others.
    longest = max(problems, key=lambda problem: problem.q_tokens)
    name, _ = choose(longest, arguments.strategy, arguments.ranks, library, sm)
    specs = spec_for(problems, name, arguments.ranks)
    if len(specs) > 1:
        kinds = "; ".join(str(spec) for spec in specs)
        raise RejectedError(
            f"{len(specs)} engines would be needed: {kinds}",
            fix="pick items of one kind with --items",
        )
    return any_length(specs[0]) if ranged else specs[0]


def _problems_of(data: str, items: str) -> list[AttentionProblem]:
    from mdattn_mpi.dataset import open_dataset

    with open_dataset(data, select=items) as dataset:
        return [item.problem for item in dataset.items]


def parse_problem(text: str) -> tuple[list[AttentionProblem], bool]:
    """Read what ``--problem`` takes.

    Returns
    -------
    The problems of the shortest and the longest length, and whether these differ.

    Raises
    ------
    RejectedError
        An unknown name, a missing one, or a value that is none.

    """
    from mdattn_mpi.problem import DTYPES, AttentionProblem

    given: dict[str, str] = {}
    for pair in text.split(","):
        name, equals, value = pair.partition("=")
        if not equals or name.strip() not in _NAMES:
            raise RejectedError(f"--problem {pair!r}", fix=f"use NAME=VALUE with {_NAMES}")
        given[name.strip()] = value.strip()
    try:
        q_heads, _, kv_heads = given["heads"].partition("/")
        lengths = [given.get(name) or given["tokens"] for name in ("q_tokens", "kv_tokens")]
        (q_short, q_long), (kv_short, kv_long) = (parse_range(length) for length in lengths)
        longest = AttentionProblem(
            q_tokens=q_long,
            kv_tokens=kv_long,
            q_heads=int(q_heads),
            kv_heads=int(kv_heads or q_heads),
            head_dim=int(given["head_dim"]),
            v_head_dim=int(given["head_dim"]),
            dtype=cast("DTypeName", DTYPES.get(given.get("dtype", "bf16"), given.get("dtype"))),
            causal=cast("Causal", given.get("causal", "none")),
            scale=given.get("scale"),  # type: ignore[arg-type]
        )
    except KeyError as error:
        raise RejectedError(f"--problem without {error}", fix=f"name {_NAMES}") from error
    except ValueError as error:
        raise RejectedError(f"--problem {text!r}: {error}", fix=f"use {_NAMES}") from error
    shortest = replace(longest, q_tokens=q_short, kv_tokens=kv_short)
    return ([longest] if shortest == longest else [shortest, longest]), shortest != longest


_NAMES = "tokens, q_tokens, kv_tokens, heads, head_dim, dtype, causal, scale"


def parse_range(text: str) -> tuple[int, int]:
    """Read ``A`` or ``A:B``; raise ValueError for anything else."""
    first, colon, last = text.partition(":")
    low, high = int(first), int(last if colon else first)
    if not 1 <= low <= high:
        raise ValueError(f"{text!r} isn't a range of lengths")
    return low, high


def _model(arguments: argparse.Namespace, library: Library, sm: SM) -> tuple[BuiltEngine, str]:
    from mdattn_mpi.onnx.model import load_model
    from mdattn_mpi.trt.onnx_import import build_model

    if arguments.adopt:
        raise RejectedError("--adopt with --onnx", fix="build the model: its file is there")
    if not arguments.tokens:
        raise RejectedError("--onnx without --tokens", fix="name the lengths: --tokens 1024:65536")
    try:
        tokens = parse_range(arguments.tokens)
    except ValueError as error:
        raise RejectedError(f"--tokens {error}", fix="use A:B, or one number") from error
    path = Path(arguments.onnx)
    return build_model(library, load_model(path), path, arguments.ranks, tokens, sm), "built"


def known_faults(manifest: Manifest) -> Iterator[str]:
    """Say what the library that built an engine is known for, and what was done about it."""
    from mdattn_mpi.trt.versions import faults_of

    dtype = manifest.attention().dtype if manifest.spec else ""
    library = f"{manifest.flavour} {manifest.version}"
    for fault in faults_of(manifest.flavour, manifest.version, manifest.strategy, dtype):
        done = fault.way_round and manifest.spec
        yield f"{library} is known for {fault}; {'a way round is built in' if done else fault.fix}"


def _line(arguments: argparse.Namespace, manifest: Manifest, how: str) -> str:
    from mdattn_mpi.trt.library import show_sm

    what = str(manifest.attention()) if manifest.spec else f"model on {manifest.ranks} ranks"
    return (
        f"{arguments.output}: {what}; SM {show_sm(manifest.sm)}, {manifest.flavour} "
        f"{manifest.version}, {quantity(manifest.size, 'B')}, "
        f"SHA-256 {manifest.sha256[:16]}…; {how}"
    )
