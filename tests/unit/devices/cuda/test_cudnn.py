"""cuDNN plans over a double of its front end: masks, layouts, handles, refusals."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from mdattn_mpi.devices.cuda import cudnn as kernels
from mdattn_mpi.devices.cuda.attention import AttentionCall
from mdattn_mpi.devices.cuda.cudnn import CudnnEngine, batch_first
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import FULL, Band

CALL = AttentionCall(
    q_tokens=6, kv_tokens=10, q_heads=4, kv_heads=2, head_dim=16, v_head_dim=8,
    dtype="bfloat16", out_dtype="bfloat16", band=FULL, scale=0.25, softcap=0.0,
    q=(64, 16, 1), k=(32, 16, 1), v=(16, 8, 1), output=(32, 8, 1), lse=(4, 1),
)  # fmt: skip


class NotSupportedError(Exception):
    """What the front end raises where there is no kernel."""


class Tensor:
    """A tensor of a graph; remembers what it was told."""

    def __init__(self, **told: Any) -> None:
        self.told = told

    def __getattr__(self, name: str) -> Any:
        def tell(value: Any) -> Tensor:
            self.told[name.removeprefix("set_")] = value
            return self

        return tell


class Graph:
    """What ``cudnn.pygraph`` is."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.calls: list[str] = []
        self.executed: list[Any] = []
        self.output, self.stats = Tensor(), Tensor()
        self.tensors: dict[str, Tensor] = {}
        self.attention: dict[str, Any] = {}

    def tensor(self, **told: Any) -> Tensor:
        self.tensors[told["name"]] = Tensor(**told)
        return self.tensors[told["name"]]

    def sdpa(self, **told: Any) -> tuple[Tensor, Tensor]:
        self.attention = told
        return self.output, self.stats

    def check_support(self) -> None:
        if self.tensors["q"].told["dim"][3] % 8:
            raise NotSupportedError("hidden_dim should be multiple of 8")

    def get_workspace_size(self) -> int:
        return 256

    def execute(self, addresses: Any, workspace: int, handle: Any) -> None:
        self.executed.append((addresses, workspace, handle))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a front end without the call below the public one
            raise AttributeError(name)
        return lambda *arguments: self.calls.append(name)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Any:
    handles: list[Any] = []

    def create_handle() -> Any:
        handles.append(SimpleNamespace(stream=None, alive=True))
        return handles[-1]

    module = SimpleNamespace(
        data_type=SimpleNamespace(BFLOAT16="bf16", HALF="fp16", FLOAT="fp32"),
        diagonal_alignment=SimpleNamespace(BOTTOM_RIGHT="bottom right"),
        heur_mode=SimpleNamespace(A="a", FALLBACK="fallback"),
        cudnnGraphNotSupportedError=NotSupportedError,
        pygraph=Graph,
        handles=handles,
        create_handle=create_handle,
        set_stream=lambda handle, stream: setattr(handle, "stream", stream),
        destroy_handle=lambda handle: setattr(handle, "alive", False),
        backend_version_string=lambda: "9.99",
    )
    monkeypatch.setattr(kernels, "_load", lambda: module)
    return module


def graph_of(engine: CudnnEngine, call: AttentionCall) -> Any:
    return engine.prepare(call)._graph


def test_token_major_arrays_stay_as_they_are(cudnn: Any) -> None:
    graph = graph_of(CudnnEngine((9, 0)), CALL)
    assert graph.tensors["q"].told["dim"] == [1, 4, 6, 16]
    assert graph.tensors["q"].told["stride"] == [6 * 64, 16, 64, 1]
    assert graph.tensors["v"].told["dim"] == [1, 2, 10, 8]
    assert graph.output.told["stride"] == [6 * 32, 8, 32, 1]
    assert graph.stats.told["dim"] == [1, 4, 6, 1]
    assert graph.stats.told["stride"] == [6 * 4, 1, 4, 1]
    assert graph.stats.told["data_type"] == "fp32"
    assert graph.options["io_data_type"] == "bf16"
    assert batch_first((6, 4, 16), (64, 16, 1)) == ([1, 4, 6, 16], [384, 16, 64, 1])


def test_the_masks(cudnn: Any) -> None:
    engine = CudnnEngine((9, 0))
    bounds = ((None, None), (None, 0), (3, 0), (0, 2), (5, None))
    graphs = [graph_of(engine, CALL._replace(band=Band(*each))) for each in bounds]
    assert "diagonal_alignment" not in graphs[0].attention
    for graph, (before, after) in zip(graphs, bounds, strict=True):
        told = graph.attention
        if (before, after) != FULL:
            assert told["diagonal_alignment"] == "bottom right"
        assert told.get("diagonal_band_right_bound") == after
        counted = None if before is None else before + 1  # the key on the diagonal is in it
        assert told.get("diagonal_band_left_bound") == counted
        assert graph.attention["generate_stats"]
        assert graph.attention["attn_scale"] == 0.25


def test_a_handle_a_stream_all_destroyed(cudnn: Any) -> None:
    engine = CudnnEngine((9, 0))
    launch = engine.prepare(CALL)
    one, other = SimpleNamespace(handle=5), SimpleNamespace(handle=6)
    for stream in (one, other, one):
        launch.run((10, 20, 30, 40, 50), 60, stream)
    runs = launch._graph.executed
    assert [handle.stream for _, _, handle in runs] == [5, 6, 5]
    assert runs[0][:2] == ({1: 10, 2: 20, 3: 30, 4: 40, 5: 50}, 60)
    engine.close()
    assert len(cudnn.handles) == 3  # one to build with
    assert not any(handle.alive for handle in cudnn.handles)


def test_each_thread_builds_with_a_handle_of_its_own(cudnn: Any) -> None:
    engine = CudnnEngine((9, 0))
    own = graph_of(engine, CALL).options["handle"]
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(graph_of, engine, CALL).result().options["handle"]
    assert other is not own
    assert graph_of(engine, CALL).options["handle"] is own


def test_a_refusal_says_what_where_and_why(cudnn: Any) -> None:
    engine = CudnnEngine((8, 6))
    assert not engine.refusal(CALL)
    assert "multiple of 8" in engine.refusal(CALL._replace(head_dim=12))
    assert "16 bits" in engine.refusal(CALL._replace(out_dtype="float32"))
    with pytest.raises(
        RejectedError, match=r"cuDNN 9\.99.*SM 8\.6.*multiple of 8.*--kernel flash, or -b cpu"
    ):
        engine.prepare(CALL._replace(head_dim=12))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(RejectedError, match=r"cuDNN.*\[cuda\]"):
        CudnnEngine((9, 0))
