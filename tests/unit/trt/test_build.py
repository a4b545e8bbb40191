"""The real builder takes every network; the library's rules are as the code relies on them."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.trt.build import build_attention, build_network, cache_key, make_attention
from mdattn_mpi.trt.choice import spec_for
from mdattn_mpi.trt.library import LOGGER, Library, Log
from mdattn_mpi.trt.networks import define
from mdattn_mpi.trt.store import Cache, sha256_of
from mdattn_mpi.trt.versions import Form
from tests.support.tensorrt import library, needs_tensorrt

pytestmark = needs_tensorrt


def target(found: Library) -> tuple[int, int]:
    """A GPU that the library can build for from here."""
    from mdattn_mpi.trt.library import visible_sm

    sm = found.targets[-1] if found.targets else visible_sm()
    if sm is None:
        pytest.skip("full TensorRT builds on a GPU only")
    return sm


def problems(dtype: Any, causal: Any, lengths: tuple[int, ...]) -> list[AttentionProblem]:
    return [AttentionProblem(n, n, 8, 2, 64, 64, dtype, causal) for n in lengths]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
def test_every_network_builds(strategy: Any, ranks: int) -> None:
    found = library()
    static, dynamic = (4096,), (1000, 4096)
    for dtype, causal, lengths in (
        ("bfloat16", "upper_left", dynamic),
        ("float16", "none", static if ranks % 4 else dynamic),
    ):
        (spec,) = spec_for(problems(dtype, causal, lengths), strategy, ranks)
        engine = build_attention(found, spec, target(found))
        assert len(engine) > 10_000


def test_a_ring_of_one_builds_and_of_two_is_refused_with_what_works() -> None:
    found = library()
    (alone,) = spec_for(problems("bfloat16", "upper_left", (64, 128)), "ring", 1)
    assert build_attention(found, alone, target(found))
    (ring,) = spec_for(problems("bfloat16", "none", (128,)), "ring", 2)
    if found.flavour == "tensorrt_rtx":
        with pytest.raises(DeviceError, match="no multi-device attention") as caught:
            build_attention(found, ring, target(found))
        assert "full TensorRT" in caught.value.fix


def test_where_the_builder_returns_nothing_its_last_words_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = library()
    if found.flavour != "tensorrt_rtx":
        pytest.skip("full TensorRT builds it")
    monkeypatch.setattr("mdattn_mpi.trt.build.check_target", lambda *_: None)
    (ring,) = spec_for(problems("bfloat16", "none", (128,)), "ring", 2)
    with pytest.raises(DeviceError, match="RingAttention unsupported") as caught:
        build_attention(found, ring, target(found))
    assert caught.value.exit_code == 4
    assert str(found) in caught.value.what


@pytest.mark.parametrize("form", [Form(border=True), Form(wide=True), Form(True, True)])
def test_every_way_round_builds(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library()
    monkeypatch.setattr("mdattn_mpi.trt.build.form_of", lambda *_: form)
    for strategy, causal in (("allgather", "upper_left"), ("ulysses", "none")):
        (spec,) = spec_for(problems("float16", causal, (1000, 4096)), strategy, 2)  # type: ignore[arg-type]
        assert build_attention(found, spec, target(found))


def test_a_collective_that_was_fused_is_cast_at_its_border(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, forms = library(), []
    (spec,) = spec_for(problems("bfloat16", "none", (128,)), "allgather", 2)

    def define_noted(lib: Any, builder: Any, spec: Any, form: Form) -> Any:
        forms.append(form)
        return define(lib, builder, spec, form)

    def fails_at_first(lib: Any, builder: Any, network: Any, log: Log, *rest: Any) -> bytes:
        log.clear()
        if len(forms) == 1:
            severity = lib.api.ILogger.Severity.ERROR
            log.sink.log(severity, "CollectiveOperation not supported In toMyelinCommKind")
            raise log.error("TensorRT built no engine")
        return build_network(lib, builder, network, log, *rest)

    monkeypatch.setattr("mdattn_mpi.trt.build.define", define_noted)
    monkeypatch.setattr("mdattn_mpi.trt.build.build_network", fails_at_first)
    assert build_attention(found, spec, target(found))
    assert forms == [Form(), Form(border=True)]


def test_the_collector_does_not_run_inside_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """If it did, it could destroy a builder while TensorRT holds the lock that this takes."""
    running: list[bool] = []

    def note(record: logging.LogRecord) -> bool:
        running.append(gc.isenabled())
        return True

    found = library()
    gc.enable()
    caplog.handler.addFilter(note)
    with caplog.at_level(logging.DEBUG, LOGGER.name):
        (spec,) = spec_for(problems("bfloat16", "none", (64,)), "allgather", 2)
        build_attention(found, spec, target(found))
    caplog.handler.removeFilter(note)
    assert running
    assert not any(running)
    assert gc.isenabled()


def test_a_gpu_that_it_does_not_know() -> None:
    found = library()
    if found.flavour != "tensorrt_rtx":
        pytest.skip("full TensorRT knows them all")
    (spec,) = spec_for(problems("bfloat16", "none", (128,)), "allgather", 2)
    with pytest.raises(DeviceError, match=r"SM 9\.0"):
        build_attention(found, spec, (9, 0))


def test_from_the_cache_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, cache = library(), Cache(tmp_path / "engines")
    (spec,) = spec_for(problems("float16", "none", (128,)), "ulysses", 2)
    sm = target(found)
    first = make_attention(found, spec, sm, cache)
    assert not first.cached
    monkeypatch.setattr("mdattn_mpi.trt.build.build_attention", None)
    again = make_attention(found, spec, sm, cache)
    assert again.cached
    assert again.engine == first.engine
    assert again.manifest.sha256 == sha256_of(first.engine)
    assert again.manifest.attention() == spec


def test_the_key_tells_library_and_gpu_apart() -> None:
    found = library()
    newer = Library(found.flavour, "99", found.api)
    keys = {cache_key(lib, "x", sm) for lib in (found, newer) for sm in ((8, 0), (8, 6))}
    assert len(keys | {cache_key(found, "y", (8, 0))}) == 5


def networks(found: Library, strategy: Any, ranks: int) -> Any:
    (spec,) = spec_for(problems("bfloat16", "none", (128,)), strategy, ranks)
    log = Log(found)
    builder = found.api.Builder(log.sink)
    return builder, define(found, builder, spec), log


def attention_of(found: Library, network: Any) -> Any:
    from mdattn_mpi.trt.onnx_import import attentions

    (attention,) = attentions(found.api, network)
    return attention


def test_num_ranks_is_set_once() -> None:
    found = library()
    _kept, network, _log = networks(found, "ring", 4)
    attention = attention_of(found, network)
    assert attention.num_ranks == 4
    for value in (4, 8, 1, 0):
        with pytest.raises(RuntimeError):
            attention.num_ranks = value
    assert attention.num_ranks == 4


def test_num_ranks_below_one_is_refused_and_one_may_become_more() -> None:
    found = library()
    _kept, network, _log = networks(found, "ring", 1)
    attention = attention_of(found, network)
    assert attention.num_ranks == 1
    for value in (0, -1):
        with pytest.raises(RuntimeError):
            attention.num_ranks = value
    attention.num_ranks = 1
    attention.num_ranks = 2
    assert attention.num_ranks == 2


def test_only_the_ring_marks_the_attention() -> None:
    found = library()
    for strategy in ("allgather", "ulysses"):
        _kept, network, _log = networks(found, strategy, 4)
        assert attention_of(found, network).num_ranks == 1
        counts = [
            layer.num_ranks
            for layer in map(network.get_layer, range(network.num_layers))
            if layer.type == found.api.LayerType.DIST_COLLECTIVE
        ]
        assert counts == [4] * (2 if strategy == "allgather" else 4)


def test_the_scale_is_in_the_query_and_not_rounded() -> None:
    found = library()
    problem = AttentionProblem(64, 64, 8, 2, 64, 64, "bfloat16", scale=0.1)
    (spec,) = spec_for([problem], "allgather", 2)
    builder = found.api.Builder(Log(found).sink)
    network = define(found, builder, spec)
    constants = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == found.api.LayerType.CONSTANT:
            layer.__class__ = found.api.IConstantLayer
            constants.append(np.asarray(layer.weights))
    assert [c for c in constants if c.dtype == np.float32] == [np.float32(0.1)]


def test_a_sm_without_the_library_is_rejected_before_building() -> None:
    found = library()
    if not found.targets:
        pytest.skip("full TensorRT takes the GPU that is there")
    from mdattn_mpi.trt.build import _set_target

    builder = found.api.Builder(Log(found).sink)
    with pytest.raises(RejectedError, match=r"builds nothing for SM 9\.0"):
        _set_target(found, builder.create_builder_config(), (9, 0))
