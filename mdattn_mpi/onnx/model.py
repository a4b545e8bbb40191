"""Read and write ONNX files, which may come from anywhere."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.trt.spec import Sharding

LOGGER = logging.getLogger("mdattn_mpi.onnx")

RANK_COUNT = "nb_rank"  # what the parser honours
MISSPELLED = ("nbRanks", "nb_ranks", "num_ranks")  # what it ignores without a word
ATTENTION = ("Attention", "TRT_Attention")
KEY = "mdattn"


def import_onnx() -> Any:
    """Import the package `onnx`.

    Raises
    ------
    RejectedError
        It isn't installed.

    """
    try:
        import onnx
    except ImportError as error:
        raise RejectedError(
            f"the package onnx is needed ({error})", fix="pip install 'mdattn_mpi[onnx]'"
        ) from error
    return onnx


def load_model(path: Path) -> Any:
    """Read a model without its external data, and mend the rank counts that it misspells.

    Raises
    ------
    RejectedError
        Not there, not ONNX, or external data outside its folder.

    """
    onnx = import_onnx()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise RejectedError(
            f"cannot read the model: {error.strerror}", file=str(path), fix="check the path"
        ) from error
    except Exception as error:  # protobuf's own DecodeError, or a wrong text format
        raise RejectedError(
            f"not an ONNX file ({type(error).__name__})", file=str(path), fix="name an ONNX model"
        ) from error
    if not model.ir_version or not model.graph.node:
        raise RejectedError(
            "not an ONNX file, or one without a single node",
            file=str(path),
            fix="name an ONNX model",
        )
    for tensor in _tensors(model.graph, onnx):
        _check_external(tensor, path, onnx)
    for line in mend(model):
        LOGGER.warning("%s: %s", path, line)
    return model


def _tensors(graph: Any, onnx: Any) -> list[Any]:
    """List all tensors that hold or name data, in subgraphs too."""
    found = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        found += [sparse.values, sparse.indices]
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute.t, *attribute.tensors]
            for part in (attribute.g, *attribute.graphs):
                if part.node or part.initializer:
                    found += _tensors(part, onnx)
    return found


def _check_external(tensor: Any, path: Path, onnx: Any) -> None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    named = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
    folder = path.resolve().parent
    if not named or not (folder / named).resolve().is_relative_to(folder):
        raise RejectedError(
            f"initializer {tensor.name!r} has its data in {named!r}, outside the model's folder",
            file=str(path),
            fix="put the data file beside the model, and save it so",
        )


def has_external_data(model: Any) -> bool:
    """Whether part of the model lies in other files."""
    onnx = import_onnx()
    tensors = _tensors(model.graph, onnx)
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors)


def mend(model: Any) -> list[str]:
    """Rename rank counts that TensorRT's parser would ignore; return what was done, in words.

    The documentation spells the attribute ``nbRanks``. The parser takes ``nb_rank`` only, and makes
    an engine of one rank out of anything else.
    """
    done = []
    for node in model.graph.node:
        if node.op_type not in ATTENTION:
            continue
        for attribute in node.attribute:
            if attribute.name in MISSPELLED:
                done.append(
                    f"node {node.name!r}: attribute {attribute.name} = {attribute.i} is ignored by "
                    f"TensorRT's parser; renamed to {RANK_COUNT}"
                )
                attribute.name = RANK_COUNT
    return done


def attribute_of(node: Any, name: str, default: Any = None) -> Any:
    """Return the value of an attribute of `node`."""
    onnx = import_onnx()
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


def name_of(node: Any) -> str:
    """Name a node as a user finds it in a viewer."""
    return f"node {node.name or node.output[0]!r} ({node.op_type})"


def graph_inputs(model: Any) -> list[Any]:
    """List the inputs that aren't initializers."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def constant_of(model: Any, name: str) -> Any:
    """Return the array of an initializer or Constant node; None for anything else."""
    onnx = import_onnx()
    for tensor in model.graph.initializer:
        if tensor.name == name and tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
    for node in model.graph.node:
        if node.op_type == "Constant" and name in node.output:
            value = attribute_of(node, "value")
            return None if value is None else onnx.numpy_helper.to_array(value)
    return None


def write_sharding(model: Any, sharding: Sharding) -> None:
    """Note in the file how it is sharded."""
    entry = model.metadata_props.add()
    entry.key = KEY
    entry.value = json.dumps(
        {"strategy": sharding.strategy, "ranks": sharding.ranks, "axes": sharding.axes}
    )


def read_sharding(model: Any, path: Path) -> Sharding:
    """Read what `write_sharding` noted.

    Raises
    ------
    RejectedError
        Nothing was noted, or something else.

    """
    notes = [entry.value for entry in model.metadata_props if entry.key == KEY]
    try:
        fields = json.loads(notes[-1])
        axes = {str(name): int(axis) for name, axis in fields["axes"].items()}
        return Sharding(str(fields["strategy"]), int(fields["ranks"]), axes)
    except (IndexError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RejectedError(
            "nothing in this model tells how it is sharded",
            file=str(path),
            fix="shard it first: mdattn shard MODEL.onnx -n P -s STRATEGY -o OUT.onnx",
        ) from error


def save_model(model: Any, source: Path, target: Path) -> None:
    """Write `model`, which was read from `source`, whole or not at all.

    Raises
    ------
    RejectedError
        The folder can't be written; or external data would be left behind.

    """
    if has_external_data(model) and source.resolve().parent != target.resolve().parent:
        raise RejectedError(
            "the model's external data is named relative to its folder",
            file=str(target),
            fix=f"write to {source.resolve().parent / target.name}",
        )
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_bytes(model.SerializeToString())
        part.replace(target)
    except OSError as error:
        raise RejectedError(
            f"cannot write the model: {error.strerror}",
            file=str(target),
            fix="name a folder that is there, may be written and has room",
        ) from error
