"""An ONNX model on the double of the GPU: segments in ONNX Runtime, in a stream's order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.backends import StrategyBackend
from mdattn_mpi.devices.cuda.device import CudaDevice
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.partition import equal_shards
from mdattn_mpi.problem import ModelProblem, TensorSpec
from tests.support.fake_gpu import Machine
from tests.support.fake_group import FakeGroup
from tests.unit.devices.cuda.test_device import in_group

pytest.importorskip("onnx", reason="the package onnx isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")

from mdattn_mpi.onnx.segments import open_session  # noqa: E402
from mdattn_mpi.runner.on_gpu import OnGpu  # noqa: E402
from mdattn_mpi.runner.segmented import SegmentedModel  # noqa: E402
from tests.support.onnx_job import LENGTHS, MODELS, random_items, whole_output  # noqa: E402


class OnDouble(OnGpu):
    """ONNX Runtime on the host, which is the double's memory, once the stream has come so far."""

    def _providers(self) -> Any:
        self._memory = "cpu", 0
        self._values: list[Any] = []  # kept: a GPU's are freed in the order of the stream
        return ("CPUExecutionProvider",)

    def run(self, session: Any, names: list[str], given: Mapping[str, Any]) -> list[Any]:
        machine = self._device._gpu.machine  # type: ignore[attr-defined]
        machine.until(lambda: not machine.streams[self._stream].queue)
        found = super().run(session, names, given)
        self._values += found
        return found


def run(device: CudaDevice, path: Path, strategy: str, inputs: list[dict[str, Any]]) -> list[Any]:
    """Do as a batch does: begin an item before the one before it is enqueued."""
    group: Any = FakeGroup(device.rank, device.ranks, {})
    backend = StrategyBackend("cuda", device)
    model = SegmentedModel(backend, group, path, strategy, 1, "float16")
    results, running = [], None
    for arrays in [*inputs, None]:
        following = None
        if arrays is not None:
            tokens = next(iter(arrays.values())).shape[1]
            plan = model.plan(ModelProblem(tokens, (TensorSpec("out", (-1,), "float32", 0),)))
            span = equal_shards(tokens, device.ranks)[device.rank]
            shards = []
            for tensor in model.inputs:
                own = arrays[tensor.name][:, span.slice]
                shards.append(model.host_empty(own.shape, own.dtype))
                shards[-1][...] = own
            following = model.begin(plan, *shards)
        if running is not None:
            model.enqueue(running)
            results.append(model.collect(running).wait()[0])
        running = following
    assert model.describe()["onnxruntime"]
    return results


def error(found: Any, right: Any) -> float:
    """Of all values together, relative to them."""
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_batch(
    kind: str, strategy: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the whole model gives it, up to what 16 bits make of it."""
    monkeypatch.setattr("mdattn_mpi.runner.on_gpu.OnGpu", OnDouble)
    model, path = MODELS[kind](), tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    inputs = random_items(model)
    found = in_group(ranks, lambda device: run(device, path, strategy, inputs))
    for number, arrays in enumerate(inputs):
        whole = whole_output(model, arrays)
        shards = [each[number] for each in found]
        joined = np.concatenate(shards, 1)
        assert joined.shape == whole.shape
        assert error(joined, whole) < 1e-2
        if ranks > 1 and LENGTHS[number] > ranks:
            first = shards[0].shape[1]
            alone = whole_output(model, {name: array[:, first:] for name, array in arrays.items()})
            assert error(alone, whole[:, first:]) > 0.1


def test_an_onnx_runtime_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RejectedError, match="computes by CPUExecutionProvider, not by CUDA") as why:
        in_group(1, OnGpu, machine=Machine(0))
    assert "fast-cuda" in str(why.value)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_an_onnx_runtime_that_goes_on_without_cuda() -> None:
    """As it does where its libraries are missing: by a provider that isn't the one asked for."""
    model = MODELS["joined"]()
    with pytest.raises(RejectedError, match="can't load its CUDAExecutionProvider"):
        open_session(model, 1, [("CUDAExecutionProvider", {}), "CPUExecutionProvider"])


def test_what_it_asks_of_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own stream, on its own GPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    for rank, found in enumerate(
        in_group(2, lambda device: (OnGpu(device).providers[0], device.lend_stream()))
    ):
        (name, options), (ordinal, _) = found
        assert name == "CUDAExecutionProvider"
        assert options["device_id"] == str(rank) == str(ordinal)
        assert int(options["user_compute_stream"]) > 0
