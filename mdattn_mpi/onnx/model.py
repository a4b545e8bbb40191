"""Read and write ONNX files, which may come from anywhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.files import whole_file, write_whole
from mdattn_mpi.text import install

LOGGER = logging.getLogger("mdattn_mpi.onnx")

RANK_COUNT = "nb_rank"  # what the parser honours
MISSPELLED = ("nbRanks", "nb_ranks", "num_ranks")  # what it ignores without a word
WINDOW = "mdattn_window"  # of an attention: keys before and after a query that it sees; -1: all
INNER_HEADS = "_mdattn_heads"  # ends the name of an attention's output before heads are joined
_RANDOM = "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
RANDOM = frozenset(_RANDOM.split())
LARGE = 1 << 16  # bytes of a weight that may be handed over, or lie, beside its model
LARGEST = 2**31 - 2**24  # bytes of weights in a file: protobuf writes less than 2 GiB
STANDARD = ("", "ai.onnx")  # the domain of ONNX's own operators
ATTENTION = ("Attention", "TRT_Attention")

Labels = dict[str, list[str | int]]  # of every dim of every input: a symbol, or its length


def import_onnx() -> Any:
    """Import the package `onnx`, or raise RejectedError."""
    try:
        import onnx
    except ImportError as error:
        raise RejectedError(f"the package onnx is needed ({error})", fix=install("onnx")) from error
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
            f"not an ONNX file, or a part of one ({type(error).__name__})",
            file=str(path),
            fix="name an ONNX model that is there in full, and no pointer of Git LFS to one",
        ) from error
    if not model.ir_version or not model.graph.node:
        raise RejectedError(
            "not an ONNX file, or one without a single node",
            file=str(path),
            fix="name an ONNX model",
        )
    if model.functions:
        model = _inlined(model, path)
    for tensor in _external(model):
        _check_external(tensor, path)
    for line in mend(model):
        LOGGER.warning("%s: %s", path, line)
    return model


def _inlined(model: Any, path: Path) -> Any:
    """Write the functions that a model defines where they are called."""
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except Exception as error:
        raise RejectedError(
            f"the functions of the model can't be written out: {error}",
            file=str(path),
            fix="export it without functions of its own",
        ) from error


def subgraphs(node: Any) -> list[tuple[str, Any]]:
    """List the graphs that a node holds, with the names of the attributes that hold them."""
    parts = [(each.name, part) for each in node.attribute for part in (each.g, *each.graphs)]
    return [(name, part) for name, part in parts if part.node or part.output]


def all_nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for _, part in subgraphs(node):
            yield from all_nodes(part)


def reads(node: Any) -> list[str]:
    """List the tensors that a node reads: its inputs, and what its subgraphs take from outside."""
    found = [name for name in node.input if name]
    for _, part in subgraphs(node):
        own = {value.name for value in (*part.input, *part.initializer)}
        for inner in part.node:
            found += [name for name in reads(inner) if name not in own]
            own.update(inner.output)
        found += [value.name for value in part.output if value.name not in own]
    return list(dict.fromkeys(found))


def operator(node: Any) -> str:
    """Name a node's operator: plain for one of ONNX itself, else with its domain before it."""
    if node.domain in STANDARD:
        return str(node.op_type)
    return f"{node.domain}::{node.op_type}"


def _tensors(graph: Any) -> list[Any]:
    """List all tensors that hold or name data, in subgraphs too."""
    found = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        found += [sparse.values, sparse.indices]
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute.t, *attribute.tensors]
        for _, part in subgraphs(node):
            found += _tensors(part)
    return found


def _external(model: Any) -> list[Any]:
    """List the tensors whose data lies in other files."""
    outside = import_onnx().TensorProto.EXTERNAL
    return [tensor for tensor in _tensors(model.graph) if tensor.data_location == outside]


def external_files(model: Any, path: Path) -> list[Path]:
    """List the files beside `path` that hold data of `model`, which was read from it."""
    return [path.resolve().parent / name for name in sorted(set(map(_location, _external(model))))]


def _entries(tensor: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _location(tensor: Any) -> str:
    return _entries(tensor).get("location", "")


def _check_external(tensor: Any, path: Path) -> None:
    """Refuse data outside of the model's folder, or that isn't there in full."""
    entries = _entries(tensor)
    named, folder = _location(tensor), path.resolve().parent
    if not named or not (folder / named).resolve().is_relative_to(folder):
        raise RejectedError(
            f"initializer {tensor.name!r} has its data in {named!r}, outside the model's folder",
            file=str(path),
            fix="put the data file beside the model, and save it so",
        )
    data = folder / named
    if not data.is_file():
        raise RejectedError(
            f"initializer {tensor.name!r} has its data in {named!r}, which isn't there",
            file=str(path),
            fix=f"copy {named} from where the model comes from into its folder",
        )
    try:
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    except ValueError:
        end = 0  # onnx tells when it reads
    if end > (size := data.stat().st_size):
        raise RejectedError(
            f"initializer {tensor.name!r} has its data in {named!r} up to byte {end}, which "
            f"has {size}",
            file=str(path),
            fix=f"copy {named} from where the model comes from again",
        )


def mend(model: Any) -> list[str]:
    """Rename rank counts that TensorRT's parser would ignore; return what was done, in words.

    The documentation spells the attribute ``nbRanks``. The parser takes ``nb_rank`` only, and makes
    an engine of one rank out of anything else.
    """
    done = []
    for node in all_nodes(model.graph):
        if operator(node) not in ATTENTION:
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
    return f"node {node.name or node.output[0]!r} ({operator(node)})"


def graph_inputs(model: Any) -> list[Any]:
    """List the inputs that aren't initializers."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def labels_of(value: Any) -> list[str | int]:
    """Return the dims of an input: symbols (one of its own where there is none), or lengths."""
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_dim{number}"
        for number, dim in enumerate(value.type.tensor_type.shape.dim)
    ]


def constant_of(graph: Any, name: str) -> Any:
    """Return the array of an initializer or Constant node; None for anything else."""
    onnx = import_onnx()
    for tensor in graph.initializer:
        if tensor.name == name and tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
    for node in graph.node:
        if operator(node) == "Constant" and name in node.output:
            value = onnx.helper.get_attribute_value(node.attribute[0])
            if isinstance(value, onnx.TensorProto):
                return onnx.numpy_helper.to_array(value)
            return np.asarray(value) if node.attribute[0].name.startswith("value_") else None
    return None


def copied(model: Any) -> Any:
    """Copy a model."""
    found = import_onnx().ModelProto()
    found.CopyFrom(model)
    return found


def take_out(tensor: Any, location: str, offset: int) -> bytes:
    """Take the data out of a tensor, say where it lies instead, and return it."""
    data: bytes = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = import_onnx().TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", len(data))):
        tensor.external_data.add(key=key, value=str(value))
    return data


def save_model(model: Any, source: Path, target: Path) -> None:
    """Write `model`, which was read from `source`, whole or not at all.

    Weights that are too many for one file are taken out of it, into ``X.onnx.data`` beside it.

    Raises
    ------
    RejectedError
        The folder can't be written; or external data would be left behind.

    """
    if _external(model) and source.resolve().parent != target.resolve().parent:
        raise RejectedError(
            "the model's external data is named relative to its folder",
            file=str(target),
            fix=f"write to {source.resolve().parent / target.name}",
        )
    try:
        if sum(len(tensor.raw_data) for tensor in _tensors(model.graph)) > LARGEST:
            _save_weights(model, target.with_name(f"{target.name}.data"))
        write_whole(target, model.SerializeToString())
    except OSError as error:
        raise RejectedError(
            f"cannot write the model: {error.strerror}",
            file=str(target),
            fix="name a folder that is there, may be written and has room",
        ) from error


def _save_weights(model: Any, path: Path) -> None:
    offset = 0
    with whole_file(path) as temporary, temporary.open("wb") as file:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= LARGE:
                offset += file.write(take_out(tensor, path.name, offset))
