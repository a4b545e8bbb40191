"""From an ONNX file to a network and an engine, with every rank count checked."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.files import sha256_of_files
from mdattn_mpi.onnx.cast import has_float32_attention
from mdattn_mpi.onnx.compare import LONGEST
from mdattn_mpi.onnx.known import known_run
from mdattn_mpi.onnx.model import (
    ATTENTION,
    RANK_COUNT,
    attribute_of,
    external_files,
    load_model,
    operator,
)
from mdattn_mpi.onnx.segments import load_weights
from mdattn_mpi.onnx.shard import shard_model
from mdattn_mpi.onnx.sharding import NOTE, POSITIONS, Sharding, read_sharding
from mdattn_mpi.partition import shard_length
from mdattn_mpi.problem import DTypeName, StrategyName
from mdattn_mpi.trt.build import BuiltEngine, Profile, build_network, cache_key
from mdattn_mpi.trt.choice import check_target
from mdattn_mpi.trt.library import SM, Library, Log, uncollected
from mdattn_mpi.trt.store import Cache, describe, sha256_of

KNOWN_TOKENS = 16  # a rank, of a known run, where the engine takes so few
LOGGER = logging.getLogger("mdattn_mpi.onnx")


def parse_model(
    library: Library, builder: Any, log: Log, model: Any, path: Path
) -> tuple[Any, Sharding]:
    """Parse a sharded model into a network whose attentions have the rank count they declare.

    `path` tells where its external data lies.

    Returns
    -------
    The ``INetworkDefinition``, and how it is sharded.

    Raises
    ------
    RejectedError
        Not sharded, or nothing that TensorRT's parser takes; with its words.

    """
    sharding = read_sharding(model, path)
    api = library.api
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, log.sink)
    if not parser.parse(model.SerializeToString(), str(path)):
        words = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise RejectedError(
            f"TensorRT's parser refuses the model: {' | '.join(words) or log.last_words()}",
            file=str(path),
            fix="see the node that it names; docs/onnx.md tells what is taken",
        )
    check_rank_counts(api, network, declared_ranks(model), path)
    return network, sharding


def declared_ranks(model: Any) -> dict[str, int]:
    """Return the rank count that each attention of a model declares, by the node's name."""
    return {
        node.name: int(attribute_of(node, RANK_COUNT, 1))
        for node in model.graph.node
        if operator(node) in ATTENTION
    }


def declared_collectives(model: Any) -> Counter[str]:
    """Count the collectives of a model by their operation."""
    return Counter(
        attribute_of(node, "collective_operation").decode().upper()
        for node in model.graph.node
        if node.op_type == "DistCollective"
    )


def check_rank_counts(api: Any, network: Any, declared: Mapping[str, int], path: Path) -> None:
    """Make sure that each attention of a parsed network has the rank count it was to have.

    The parser ignores what it doesn't know. One that it left at 1 is set here.
    """
    found = attentions(api, network)
    if len(found) != len(declared):
        raise RejectedError(
            f"the model has {len(declared)} attentions, TensorRT made {len(found)} of them",
            file=str(path),
            fix="give every node a name of its own, and parse again",
        )
    for (name, ranks), attention in zip(declared.items(), found, strict=True):
        if attention.num_ranks == 1 < ranks:
            attention.num_ranks = ranks
            LOGGER.warning("%s: node %r: the parser left 1 rank; set to %d", path, name, ranks)
        if attention.num_ranks != ranks:
            raise RejectedError(
                f"node {name!r} declares {ranks} ranks, TensorRT has {attention.num_ranks}",
                file=str(path),
                fix="shard the original model again",
            )


def attentions(api: Any, network: Any) -> list[Any]:
    """List the ``IAttention`` of a network, in order."""
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == api.LayerType.ATTENTION_INPUT:
            layer.__class__ = api.IAttentionBoundaryLayer
            found.append(layer.attention)
    return found


def profile_of(network: Any, sharding: Sharding, tokens: tuple[int, int]) -> Profile:
    """Cover sequences of `tokens` (shortest, longest); other dynamic dims are 1."""
    shortest, longest = tokens
    lengths = (1, *(shard_length(count, sharding.ranks) for count in (longest, longest)))
    if sharding.strategy == "ring":
        lengths = (shard_length(shortest, sharding.ranks), *lengths[1:])
    profile: Profile = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        given = sharding.given_by_rank(tensor.name)
        if given == POSITIONS:
            profile[tensor.name] = ((lengths[0],), (lengths[1],), (lengths[2],))
            continue
        if given:
            most = shard_length(longest, sharding.ranks) * sharding.ranks
            profile[tensor.name] = ((1,), (longest,), (most,))
            continue
        axis = sharding.axes.get(tensor.name)
        shapes = [
            tuple(
                (length if position == axis else 1) if dim == -1 else dim
                for position, dim in enumerate(tuple(tensor.shape))
            )
            for length in lengths
        ]
        profile[tensor.name] = (shapes[0], shapes[1], shapes[2])
    return profile


def build_model(
    library: Library, model: Any, path: Path, ranks: int, tokens: tuple[int, int], sm: SM
) -> BuiltEngine:
    """Build the engine of a sharded model, and find out what it must give for known inputs.

    `path` tells where its external data lies; `tokens` are the shortest and the longest sequence.

    Raises
    ------
    RejectedError, DeviceError
        The model is sharded for another number of ranks; see `parse_model`, `build_network`.

    """
    sharding = read_sharding(model, path)
    if sharding.ranks != ranks:
        raise RejectedError(
            f"the model is sharded for {sharding.ranks} ranks, -n says {ranks}",
            file=str(path),
            fix=f"use -n {sharding.ranks}, or shard the original model for {ranks}",
        )
    check_target(library, sharding.strategy, ranks, sm)
    engine = serialize(library, model, path, tokens, sm)
    known, why = known_of(model, path, sharding, tokens)
    digest = sha256_of(model.SerializeToString())
    manifest = describe(engine, library, sm, sharding, digest, declared_collectives(model))
    manifest = replace(manifest, known=sha256_of(known) if known else "", unproven=why)
    return BuiltEngine(engine, manifest, known=known)


@uncollected()
def serialize(library: Library, model: Any, path: Path, tokens: tuple[int, int], sm: SM) -> bytes:
    """Parse a sharded model and build its engine."""
    log = Log(library)
    builder = library.api.Builder(log.sink)
    network, sharding = parse_model(library, builder, log, model, path)
    profile = profile_of(network, sharding, tokens)
    return build_network(library, builder, network, log, sm, profile, path.name)


def make_model(
    library: Library,
    path: Path,
    ranks: int,
    strategy: str,
    dtype: DTypeName,
    longest: int,
    sm: SM,
    cache: Cache | None,
) -> BuiltEngine:
    """Take the engine of a model from `cache`, or build it; shard the model first if it isn't yet.

    Parameters
    ----------
    library, sm
        What builds, and for which GPU.
    path
        The model as an exporter wrote it, or sharded.
    ranks, strategy
        That run it together, and how; ``auto`` gathers keys and values.
    dtype
        Of products and attentions that are in float32.
    longest
        Tokens of the longest sequence.
    cache
        Where engines are kept; None for nowhere.

    Raises
    ------
    RejectedError, DeviceError
        It can't be sharded so, or is for other ranks or another strategy; nothing was built.

    """
    model = load_model(path)
    if any(entry.key == NOTE for entry in model.metadata_props):
        shared_by = read_sharding(model, path).strategy
        if strategy not in ("auto", shared_by):
            raise RejectedError(
                f"-s {strategy} with a model that is sharded for {shared_by}",
                file=str(path),
                fix=f"use -s {shared_by}, or the model as it was exported",
            )
    else:
        name = cast(StrategyName, "allgather" if strategy == "auto" else strategy)
        model = _sharded(load_weights(model, path), name, ranks, dtype)
    digest = sha256_of(model.SerializeToString())
    weights = sha256_of_files(external_files(model, path))  # those that lie beside a sharded one
    key = cache_key(library, f"{digest} {weights} {longest}", sm)
    found = cache.get(key) if cache else None
    if cache and found:
        return BuiltEngine(*found, cached=True, known=cache.get_known(key, found[1]))
    built = build_model(library, model, path, ranks, (1, longest), sm)
    if cache:
        cache.put(key, built.engine, built.manifest, bytes(built.known))
    return built


def _sharded(model: Any, strategy: StrategyName, ranks: int, dtype: DTypeName) -> Any:
    sharded, _ = shard_model(model, strategy, ranks, {})
    if has_float32_attention(sharded):
        sharded, _ = shard_model(model, strategy, ranks, {}, dtype)
    return sharded


def known_of(
    model: Any, path: Path, sharding: Sharding, tokens: tuple[int, int]
) -> tuple[bytes, str]:
    """Compute what a sharded model gives for known inputs; or say why that can't be.

    `tokens` are the shortest and the longest sequence that its engine takes.
    """
    shortest = shard_length(tokens[0], sharding.ranks) if sharding.strategy == "ring" else 1
    length = max(shortest, min(KNOWN_TOKENS, shard_length(tokens[1], sharding.ranks)))
    whole = length * sharding.ranks
    if whole > LONGEST:
        return b"", f"its shortest sequence, of {whole} tokens, is too long to compute here"
    uneven = length > 1 and sharding.strategy != "ring"
    try:
        return known_run(model, path, sharding, whole - uneven).to_bytes(), ""
    except RejectedError as error:
        return b"", str(error)
