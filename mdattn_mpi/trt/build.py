"""Build engines: with the real builder, once, from the cache the next time."""

from __future__ import annotations

import hashlib
from typing import Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.trt.choice import check_target
from mdattn_mpi.trt.library import SM, Library, Log, show_sm
from mdattn_mpi.trt.networks import define
from mdattn_mpi.trt.spec import EngineSpec, Extent
from mdattn_mpi.trt.store import Cache, Manifest, describe


def cached_engine(
    library: Library, spec: EngineSpec, sm: SM, cache: Cache | None
) -> tuple[bytes, Manifest]:
    """Take the engine of `spec` from `cache`, or build it and put it there."""
    key = cache_key(library, spec.digest, sm)
    found = cache.get(key) if cache else None
    if found is None:
        engine = build_attention(library, spec, sm)
        found = engine, describe(engine, library, sm, spec.ranks, spec.facts())
        if cache:
            cache.put(key, *found)
    return found


def cache_key(library: Library, network: str, sm: SM) -> str:
    """Hash what decides the bytes of an engine: network and profile, flavour, version, GPU."""
    return hashlib.sha256(f"{network} {library} {show_sm(sm)}".encode()).hexdigest()


def build_attention(library: Library, spec: EngineSpec, sm: SM) -> bytes:
    """Build the attention engine of `spec` for GPUs of `sm`.

    Raises
    ------
    DeviceError
        `sm` can't run it, or TensorRT built nothing; its last words are in the message.

    """
    check_target(library, spec.strategy, spec.ranks, sm)
    log = Log(library)
    builder = library.api.Builder(log.sink)
    network = define(library, builder, spec)
    ranges = {"query": spec.q, "key": spec.kv, "value": spec.kv, "keys": spec.keys}
    return build_network(library, builder, network, log, sm, ranges, str(spec))


def build_network(
    library: Library,
    builder: Any,
    network: Any,
    log: Log,
    sm: SM,
    ranges: dict[str, Extent],
    what: str,
) -> bytes:
    """Build any network for GPUs of `sm`, with one optimization profile.

    Parameters
    ----------
    library, builder, network, log
        What the network was made with.
    sm
        The GPU that the engine is for.
    ranges
        The extent of every dynamic dim, by input; a shape input's value. All dynamic dims of one
        input have the same extent.
    what
        What is being built, for the message.

    Raises
    ------
    DeviceError
        TensorRT built nothing; its last words are in the message.

    """
    log.clear()
    config = builder.create_builder_config()
    _set_target(library, config, sm)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            extent = ranges[tensor.name]
            profile.set_shape_input(tensor.name, [extent.min], [extent.opt], [extent.max])
        elif -1 in tuple(tensor.shape):
            extent = ranges[tensor.name]
            lengths = (extent.min, extent.opt, extent.max)
            profile.set_shape(tensor.name, *(_at(tensor.shape, length) for length in lengths))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise log.error(
            f"TensorRT built no engine for {what} (SM {show_sm(sm)}, {library})", BUILD_FIX
        )
    return bytes(plan)


BUILD_FIX = "use another strategy or -b cuda; MDATTN_LOG=debug shows TensorRT's whole log"


def _at(shape: Any, length: int) -> tuple[int, ...]:
    return tuple(length if dim == -1 else dim for dim in tuple(shape))


def _set_target(library: Library, config: Any, sm: SM) -> None:
    """Choose the GPU, where the library can build for one that isn't there."""
    if not library.targets:
        return
    if sm not in library.targets:
        known = ", ".join(show_sm(target) for target in library.targets)
        raise RejectedError(
            f"{library} builds nothing for SM {show_sm(sm)}", fix=f"use --sm {known}"
        )
    names = library.api.ComputeCapability
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(names, f"SM{sm[0]}{sm[1]}"), 0)
