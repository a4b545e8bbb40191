"""A sharded model in ONNX Runtime: everything between two exchanges is one segment.

Attentions and collectives aren't run here. A rank's run is a generator that asks for them, so that
whoever drives it decides what ranks are: threads of MPI, or the generators of one process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.model import ATTENTION, import_onnx, operator, reads

OUTSIDE = frozenset((*ATTENTION, "DistCollective"))

LARGE = 1 << 16  # bytes of a weight that a session gets beside its model
MUCH = 1 << 24  # bytes of a segment's outputs, after which memory is given back
Arrays = dict[str, Any]
Run = Generator["Call", Any, Arrays]


class Call(NamedTuple):
    """A node that the driver computes, and what the rank gives it (None: no such input)."""

    node: Any
    inputs: list[Any]


class _Segment(NamedTuple):
    session: Any
    inputs: list[str]
    outputs: list[str]


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, or raise RejectedError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RejectedError(
            f"ONNX Runtime is needed ({error})", fix="pip install 'mdattn_mpi[fast]'"
        ) from error
    return onnxruntime


def open_session(
    model: Any, threads: int = 0, providers: Sequence[Any] = ("CPUExecutionProvider",)
) -> Any:
    """Load a model into ONNX Runtime, on the CPU unless other `providers` are named.

    Large weights are handed over beside the model, which holds them once then and not twice.

    Raises
    ------
    RejectedError
        It isn't installed, can't load the model, or not by the first of the providers.

    """
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.use_deterministic_compute = True
    # Every session has an arena of its own, and keeps in it the most that it ever needed.
    options.enable_cpu_mem_arena = False
    # The highest level (1.32) crashes on some parts of models.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        weights = _hand_over_weights(model, options, runtime)  # noqa: F841 it must live so long
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=list(providers)
        )
    except Exception as error:
        raise RejectedError(
            f"ONNX Runtime can't load the model: {' '.join(str(error).split())}",
            fix="use another precision, or TensorRT",
        ) from error
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != first:  # it goes on without what it can't load
        raise RejectedError(
            f"ONNX Runtime can't load its {first}; it has printed why",
            fix="install the CUDA and cuDNN that it names: pip install 'mdattn_mpi[fast-cuda]'; or "
            "use -b cpu",
        )
    return session


def _hand_over_weights(model: Any, options: Any, runtime: Any) -> list[Any]:
    """Take large weights out of a model, as if they lay in a file, and put them into `options`.

    Return them: a session copies them when it is made, and nobody else holds them until then.
    """
    onnx = import_onnx()
    names, values = [], []
    for tensor in model.graph.initializer:
        size = len(tensor.raw_data)
        if size < LARGE:
            continue
        names.append(tensor.name)
        array = onnx.numpy_helper.to_array(tensor)
        values.append(runtime.OrtValue.ortvalue_from_numpy(array))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "given"), ("offset", 0), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
    if names:
        options.add_external_initializers(names, values)
    return values


def _give_memory_back() -> None:
    """Return what glibc keeps of arrays that are gone: it would be more with every segment."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


class Place(Protocol):
    """Where the tensors are that go from segment to segment, and what computes there.

    Attributes
    ----------
    providers
        ONNX Runtime's, in the order of their preference.

    """

    providers: Sequence[Any]

    def put(self, array: Any) -> Any:
        """Bring an array of NumPy's there."""
        ...

    def run(self, session: Any, names: list[str], given: Mapping[str, Any]) -> list[Any]:
        """Run a segment on tensors that are there; return those of these names."""
        ...

    def take(self, tensors: Sequence[Any]) -> list[Any]:
        """Bring tensors to the host, as arrays of NumPy's."""
        ...


class OnHost:
    """Arrays of NumPy's, and ONNX Runtime on the CPU."""

    providers: Sequence[Any] = ("CPUExecutionProvider",)

    def put(self, array: Any) -> Any:
        """Return it."""
        return array

    def run(self, session: Any, names: list[str], given: Mapping[str, Any]) -> list[Any]:
        """Run a segment, and keep no more memory than its outputs need."""
        found: list[Any] = session.run(names, dict(given))
        if sum(array.nbytes for array in found) >= MUCH:
            _give_memory_back()
        return found

    def take(self, tensors: Sequence[Any]) -> list[Any]:
        """Return them."""
        return list(tensors)


class Segments:
    """A model, cut at its attentions and collectives.

    Parameters
    ----------
    model
        A sharded one, as `shard.shard_model` makes it; its weights are in it.
    types
        Of its tensors, in ONNX's numbers: what goes from segment to segment is declared.
    wanted
        Tensors to give back; the outputs of the model if None.
    threads
        Of ONNX Runtime; 0 for as many as there are cores.
    place
        Where it runs.

    """

    def __init__(
        self,
        model: Any,
        types: Mapping[str, int],
        wanted: Sequence[str] | None = None,
        threads: int = 0,
        place: Place | None = None,
    ) -> None:
        self._place: Place = place or OnHost()
        self.wanted = list(wanted or [value.name for value in model.graph.output])
        self._model: Any = model
        self._types = dict(types)
        self._steps: list[_Segment | Any] = []
        self._last: dict[str, int] = {}  # the last step that reads a tensor
        groups = _levels(model.graph.node)
        for number, group in enumerate(groups):
            if operator(group[0]) in OUTSIDE:
                # A copy: a node keeps all of its model in memory.
                self._steps += [type(node).FromString(node.SerializeToString()) for node in group]
            else:
                later = [node for each in groups[number + 1 :] for node in each]
                self._steps.append(self._segment(group, later, threads))
        self._model = None
        for number, step in enumerate(self._steps):
            names = step.inputs if isinstance(step, _Segment) else step.input
            self._last.update(dict.fromkeys(names, number))

    def _segment(self, nodes: list[Any], later: list[Any], threads: int) -> _Segment:
        onnx = import_onnx()
        needed = {name for node in later for name in reads(node)} | set(self.wanted)
        made = [name for node in nodes for name in node.output if name]
        read = dict.fromkeys(name for node in nodes for name in reads(node))
        weights = [each for each in self._model.graph.initializer if each.name in read]
        known = {*made, *(each.name for each in weights)}
        inputs = [name for name in read if name not in known]
        outputs = [name for name in made if name in needed]

        def value(name: str) -> Any:
            return onnx.helper.make_tensor_value_info(name, self._types[name], None)

        graph = onnx.helper.make_graph(
            nodes, "segment", [*map(value, inputs)], [*map(value, outputs)], weights
        )
        model = onnx.helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )
        session = open_session(model, threads, self._place.providers)
        return _Segment(session, inputs, outputs)

    def run(self, feeds: Mapping[str, Any]) -> Run:
        """Run a rank; yield each `Call`, and be sent what its node gives."""
        values = dict(feeds)
        for number, step in enumerate(self._steps):
            if isinstance(step, _Segment):
                given = {name: values[name] for name in step.inputs}
                found = self._place.run(step.session, step.outputs, given) if step.outputs else []
                values.update(zip(step.outputs, found, strict=True))
            else:
                values[step.output[0]] = yield Call(step, [values.get(name) for name in step.input])
            for name in [*values]:
                if self._last.get(name, -1) <= number and name not in self.wanted:
                    del values[name]
        return {name: values[name] for name in self.wanted}


def _levels(nodes: Sequence[Any]) -> list[list[Any]]:
    """Group nodes: those that run together, then the attentions and collectives that follow."""
    level: dict[str, int] = {}
    groups: dict[int, list[Any]] = {}
    for node in nodes:
        own = max((level.get(name, 0) for name in reads(node)), default=0)
        outside = operator(node) in OUTSIDE
        own += outside == (own % 2 == 0)  # segments are even, what is outside is odd
        groups.setdefault(own, []).append(node)
        level.update(dict.fromkeys(node.output, own))
    return [groups[number] for number in sorted(groups)]


def load_weights(model: Any, path: Path) -> Any:
    """Bring external data, which lies beside `path`, into the model."""
    import_onnx().external_data_helper.load_external_data_for_model(
        model, str(path.resolve().parent)
    )
    return model
