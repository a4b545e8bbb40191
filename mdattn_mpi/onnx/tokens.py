"""Which dim of which tensor counts tokens, and does every node treat tokens alike?

A model may be cut into token shards when each of its nodes, attention apart, does the same to every
token and nothing across tokens. The dim is found by shape inference with two different numbers of
tokens: the dim that follows is the one. Then each node is held against what its operator does
along that dim; what isn't known to be harmless is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.model import (
    ATTENTION,
    attribute_of,
    constant_of,
    graph_inputs,
    import_onnx,
    name_of,
)

PROBES = (1009, 1013)  # two primes: no other dim is likely to be one of them
SMALL = 64  # initializers up to so many elements may be shapes

Shape = tuple[int, ...]

_EACH_ELEMENT = """
Abs Add And BitwiseAnd Cast CastLike Ceil Clip Cos Div Dropout Elu Equal Erf Exp Floor Gelu Greater
GreaterOrEqual HardSigmoid HardSwish Identity IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish
Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub
Sum Swish Tan Tanh Where QuantizeLinear DequantizeLinear
"""
_MOVE = "Transpose Reshape Squeeze Unsqueeze Flatten Expand Shape Size"
_ALONG_ONE = "Softmax LogSoftmax Concat Split Gather CumSum ArgMax ArgMin TopK"

ELEMENTWISE = frozenset(_EACH_ELEMENT.split())
MOVES = frozenset(_MOVE.split())
ALONG_ONE = frozenset(_ALONG_ONE.split())
ALONG_LAST = frozenset(("LayerNormalization", "RMSNormalization"))
UNIFORM = frozenset(("ConstantOfShape", "Expand"))


class Tokens:
    """Where the tokens are in a model.

    Parameters
    ----------
    model
        Without external data.
    axes
        The dim that counts tokens, for each input that has one.

    Raises
    ------
    RejectedError
        The number of tokens is baked into the model.

    """

    def __init__(self, model: Any, axes: Mapping[str, int]) -> None:
        self._model = model
        values = [_infer(model, axes, count) for count in PROBES]
        self._shapes = tuple(_shapes(model, each) for each in values)
        self._dtypes = {v.name: v.type.tensor_type.elem_type for v in values[0]}

    def dtype(self, tensor: str) -> int:
        """Return a tensor's element type, as ONNX counts these."""
        return int(self._dtypes[tensor])

    def shape(self, tensor: str) -> Shape | None:
        """Return a tensor's shape at the first probe; dims that aren't known are -1."""
        return self._shapes[0].get(tensor)

    def axis(self, tensor: str) -> int | None:
        """Return the dim of `tensor` that counts tokens; None where none does.

        Raises
        ------
        RejectedError
            A dim depends on the number of tokens without being it.

        """
        first, second = (shapes.get(tensor) for shapes in self._shapes)
        if first is None or second is None or first == second:
            return None
        found = [i for i, pair in enumerate(zip(first, second, strict=True)) if pair == PROBES]
        if len(found) == 1 and sum(a != b for a, b in zip(first, second, strict=True)) == 1:
            return found[0]
        node = next((node for node in self._model.graph.node if tensor in node.output), None)
        raise _refuse(
            node,
            f"makes {tensor!r} of shape {list(first)} for {PROBES[0]} tokens: no single dim "
            "counts them",
        )

    def check(self, ignore: Collection[str]) -> None:
        """Make sure that all nodes, but operators of `ignore`, treat tokens alike.

        Raises
        ------
        RejectedError
            Naming the first node that doesn't, or isn't known to.

        """
        for node in self._model.graph.node:
            if node.op_type in ignore:
                continue
            self._check_known(node)
            if self._has_tokens(node.input):
                self._check_node(node)
            elif node.op_type not in UNIFORM and self._has_tokens(node.output):
                raise _refuse(node, "numbers the tokens, which every rank would do from 0")

    def _check_known(self, node: Any) -> None:
        """Any dim of which nothing is known could be the tokens."""
        for name in filter(None, node.output):
            shape = self.shape(name)
            if shape is None or -1 in shape:
                raise _refuse(node, f"makes {name!r}, whose shape isn't known")

    def _has_tokens(self, tensors: Iterable[str]) -> bool:
        return any(self.axis(name) is not None for name in tensors)

    def _check_node(self, node: Any) -> None:
        kind = node.op_type
        if kind == "MatMul" or kind == "Gemm":
            self._check_product(node)
        elif kind in MOVES:
            self._check_move(node)
        elif kind in ALONG_ONE or kind in ALONG_LAST or kind.startswith("Reduce"):
            self._check_along(node)
        elif kind == "Slice":
            self._check_slice(node)
        elif kind not in ELEMENTWISE:
            raise _refuse(node, "isn't known to treat every token alike")
        if kind not in ("Shape", "Size") and all(self.axis(out) is None for out in node.output):
            shape = list(self.shape(node.output[0]) or ())
            raise _refuse(node, f"makes {shape} of any number of tokens")

    def _check_product(self, node: Any) -> None:
        for name, contracted in zip(node.input[:2], self._contracted(node), strict=True):
            axis, shape = self.axis(name), self.shape(name)
            if axis is not None and shape is not None and axis == contracted % len(shape):
                raise _refuse(node, "sums over the tokens outside of an attention")

    def _contracted(self, node: Any) -> tuple[int, int]:
        if node.op_type == "MatMul":
            second = self.shape(node.input[1])
            return -1, -1 if second is not None and len(second) == 1 else -2
        first = 0 if attribute_of(node, "transA", 0) else 1
        return first, 1 if attribute_of(node, "transB", 0) else 0

    def _check_move(self, node: Any) -> None:
        """Tokens must stay in order: as many elements before their dim as there were."""
        if node.op_type in ("Shape", "Size", "Transpose", "Expand"):
            return
        axis_in, axis_out = self.axis(node.input[0]), self.axis(node.output[0])
        shape_in, shape_out = self.shape(node.input[0]), self.shape(node.output[0])
        if axis_in is None or axis_out is None or shape_in is None or shape_out is None:
            return
        if prod(shape_in[:axis_in]) != prod(shape_out[:axis_out]):
            raise _refuse(node, "mixes the tokens with another dim")

    def _check_along(self, node: Any) -> None:
        name = node.input[0]
        shape = self.shape(name)
        assert shape is not None
        if node.op_type == "Gather" and self.axis(name) is None:
            return  # an embedding: one look-up a token
        tokens = [self.axis(each) for each in node.input]
        if node.op_type in ALONG_LAST:
            first = attribute_of(node, "axis", -1) % len(shape)
            along = set(range(first, len(shape)))
        else:
            along = {axis % len(shape) for axis in self._axes(node, len(shape))}
        if any(axis in along for axis in tokens):
            raise _refuse(node, "works along the tokens")

    def _axes(self, node: Any, dims: int) -> tuple[int, ...]:
        single = attribute_of(node, "axis")
        if node.op_type == "CumSum":
            return self._constant(node, 1)
        if not node.op_type.startswith("Reduce"):
            standard = -1 if node.op_type in ("Softmax", "LogSoftmax", "TopK") else 0
            return (standard if single is None else int(single),)
        given = attribute_of(node, "axes")
        if given is not None:
            return tuple(int(axis) for axis in given)
        if len(node.input) > 1 and node.input[1]:
            return self._constant(node, 1)
        return tuple(range(dims))

    def _check_slice(self, node: Any) -> None:
        axes = self._constant(node, 3) if len(node.input) > 3 else tuple(range(99))
        shape = self.shape(node.input[0])
        assert shape is not None
        if self.axis(node.input[0]) in {axis % len(shape) for axis in axes}:
            raise _refuse(node, "cuts along the tokens")

    def _constant(self, node: Any, number: int) -> tuple[int, ...]:
        values = constant_of(self._model, node.input[number])
        if values is None:
            raise _refuse(node, f"takes {node.input[number]!r}, which is no constant")
        return tuple(int(value) for value in values.reshape(-1))


def _refuse(node: Any, why: str) -> RejectedError:
    named = name_of(node) if node else "the model"
    return RejectedError(
        f"{named} {why}: it can't be cut into token shards",
        fix="shard the attention block alone, or run the model on one rank",
    )


def token_axes(model: Any, queries: Iterable[str], named: Mapping[str, int]) -> dict[str, int]:
    """Find the dim that counts tokens in each input: as named, or by its symbol.

    Parameters
    ----------
    model
        The model.
    queries
        Tensors whose last dim but one counts tokens: the queries of the attentions.
    named
        What the user said: dims by input.

    Raises
    ------
    RejectedError
        A name that is no input, a dim that it hasn't, or nothing to tell tokens by.

    """
    inputs = {value.name: _dims(value) for value in graph_inputs(model)}
    if named:
        for name, axis in named.items():
            if name not in inputs or not -len(inputs[name]) <= axis < len(inputs[name]):
                known = ", ".join(
                    f"{known} with {len(dims)} dims" for known, dims in inputs.items()
                )
                raise RejectedError(f"no dim {axis} of an input {name!r}", fix=f"there are {known}")
        return {name: axis % len(inputs[name]) for name, axis in named.items()}
    symbols = {dim for dims in inputs.values() for dim in dims if isinstance(dim, str)}
    if len(symbols) > 1:
        symbols &= _symbols_of(model, queries)
    if len(symbols) != 1:
        raise RejectedError(
            "which dim counts tokens? "
            + "; ".join(f"{name} has {list(dims)}" for name, dims in inputs.items()),
            fix="name it for every input that has one: --shard INPUT:DIM",
        )
    (symbol,) = symbols
    return {name: dims.index(symbol) for name, dims in inputs.items() if symbol in dims}


def _symbols_of(model: Any, tensors: Iterable[str]) -> set[str]:
    """Return the symbols of the last dim but one of `tensors`, as far as inference carries them."""
    onnx = import_onnx()
    inferred = onnx.shape_inference.infer_shapes(_skeleton(model), data_prop=True)
    wanted = set(tensors)
    values = (*inferred.graph.value_info, *inferred.graph.input)
    dims = [_dims(value) for value in values if value.name in wanted]
    return {each[-2] for each in dims if len(each) > 1 and isinstance(each[-2], str)}


def _dims(value: Any) -> tuple[int | str, ...]:
    """Return numbers and symbols; -1 for a dim without either."""
    return tuple(
        dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else -1)
        for dim in value.type.tensor_type.shape.dim
    )


def _infer(model: Any, axes: Mapping[str, int], tokens: int) -> list[Any]:
    """Infer the types of all tensors for a number of tokens; other symbols count 1."""
    onnx = import_onnx()
    skeleton = _skeleton(model)
    del skeleton.graph.value_info[:]
    for value in skeleton.graph.input:
        for position, dim in enumerate(value.type.tensor_type.shape.dim):
            if axes.get(value.name) == position:
                dim.dim_value = tokens
            elif not dim.HasField("dim_value"):
                dim.dim_value = 1
    for value in skeleton.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, strict_mode=True, data_prop=True)
    except Exception as error:
        raise RejectedError(
            f"the model doesn't fit {tokens} tokens: {str(error).strip().splitlines()[-1]}",
            fix="export it with a dynamic number of tokens",
        ) from error
    return [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]


def _shapes(model: Any, values: Iterable[Any]) -> dict[str, Shape]:
    """Return the shapes of tensors by name; dims that aren't known are -1."""
    found = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in values:
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
    return found


def _skeleton(model: Any) -> Any:
    """Copy the model without its weights, and with operators that shape inference knows."""
    onnx = import_onnx()
    copy = onnx.ModelProto()
    copy.ir_version = model.ir_version
    copy.opset_import.extend(model.opset_import)
    graph = copy.graph
    graph.name = "skeleton"
    graph.input.extend(graph_inputs(model))
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            shape = list(tensor.dims)
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape)
            )
    for node in model.graph.node:
        if node.op_type in ATTENTION:  # its output is shaped like its query
            graph.node.append(
                onnx.helper.make_node("Identity", node.input[:1], node.output[:1], name=node.name)
            )
        else:
            graph.node.append(node)
    return copy
