"""Build engines: with the real builder, once, from the cache the next time."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.trt.choice import check_target
from mdattn_mpi.trt.library import SM, Library, Log, show_sm, uncollected
from mdattn_mpi.trt.networks import define, form_of
from mdattn_mpi.trt.spec import EngineSpec, Extent
from mdattn_mpi.trt.store import Cache, Manifest, describe
from mdattn_mpi.trt.versions import Form, recognize

REVISION = 2  # goes up when a network of the same spec is written otherwise
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Profile = dict[str, Range]


class BuiltEngine(NamedTuple):
    """A serialized engine and its manifest; whether it lay in the cache; a model's known run."""

    engine: bytes | memoryview
    manifest: Manifest
    cached: bool = False
    known: bytes | memoryview = b""


def make_attention(library: Library, spec: EngineSpec, sm: SM, cache: Cache | None) -> BuiltEngine:
    """Take the engine of `spec` from `cache`, or build it and put it there."""
    key = cache_key(library, spec.digest, sm)
    found = cache.get(key) if cache else None
    if found is not None:
        return BuiltEngine(*found, cached=True)
    engine = build_attention(library, spec, sm)
    manifest = describe(engine, library, sm, spec)
    if cache:
        cache.put(key, engine, manifest)
    return BuiltEngine(engine, manifest)


def cache_key(library: Library, network: str, sm: SM) -> str:
    """Hash what decides the bytes of an engine: network and profile, flavour, version, GPU."""
    return hashlib.sha256(f"{REVISION} {network} {library} {show_sm(sm)}".encode()).hexdigest()


@uncollected()
def build_attention(library: Library, spec: EngineSpec, sm: SM) -> bytes:
    """Build the attention engine of `spec` for GPUs of `sm`.

    Where the builder fails as it is known to, it gets the network in the form that avoids this.

    Raises
    ------
    DeviceError
        `sm` can't run it, or TensorRT built nothing; its last words are in the message.

    """
    check_target(library, spec.strategy, spec.ranks, sm)
    log = Log(library)
    builder = library.api.Builder(log.sink)

    def build(form: Form) -> bytes:
        network = define(library, builder, spec, form)
        return build_network(library, builder, network, log, sm, _profile(spec), str(spec))

    form = form_of(library, spec)
    try:
        return build(form)
    except DeviceError:
        fault = recognize(log.last_words(), library.flavour, library.version)
        if fault is None or fault.way_round != "border" or form.border:
            raise
    return build(form._replace(border=True))


def _profile(spec: EngineSpec) -> Profile:
    """Shapes of the inputs, and the value of ``keys``, at the ends of the spec's extents."""

    def rows(extent: Extent, heads: int) -> Range:
        low, tuned, high = ((n, heads, spec.head_dim) for n in (extent.min, extent.opt, extent.max))
        return low, tuned, high

    return {
        "query": rows(spec.q, spec.q_heads),
        "key": rows(spec.kv, spec.kv_heads),
        "value": rows(spec.kv, spec.kv_heads),
        "keys": ((spec.keys.min,), (spec.keys.opt,), (spec.keys.max,)),
    }


def build_network(
    library: Library,
    builder: Any,
    network: Any,
    log: Log,
    sm: SM,
    ranges: Profile,
    what: str,
) -> bytes:
    """Build any network for GPUs of `sm`, with one optimization profile, or raise DeviceError."""
    log.clear()
    config = builder.create_builder_config()
    config.profiling_verbosity = library.api.ProfilingVerbosity.DETAILED  # for the inspector
    _set_target(library, config, sm)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, *ranges[tensor.name])
        elif -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *ranges[tensor.name])
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise log.error(
            f"TensorRT built no engine for {what} (SM {show_sm(sm)}, {library})", BUILD_FIX
        )
    return bytes(serialized)


BUILD_FIX = "use another strategy or -b cuda; `mdattn build --verbose` shows TensorRT's log"


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
