"""What the operators of ONNX do along the dim that counts tokens.

A rule gives the dims of its inputs that a node works along: none of them may be the tokens. What
can't be said by dims, it checks itself. An operator without a rule isn't known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

from mdattn_mpi.onnx.axes import TokenDim
from mdattn_mpi.onnx.model import attribute_of, operator
from mdattn_mpi.onnx.tokens import Shape, Tokens

_ELEMENTWISE = """
Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
Cast CastLike Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual
HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul
Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt
Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
"""
_REDUCE = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"

ELEMENTWISE = frozenset(_ELEMENTWISE.split())
REDUCE = frozenset(f"Reduce{kind}" for kind in _REDUCE.split())
Dims = Iterable[int]  # of every input; negative ones count from the end
Rule = Callable[[Any, Tokens], Dims]

EXTRA_INPUTS = {3: "a mask", 4: "past keys", 5: "past values", 6: "a count of keys"}


def check(node: Any, tokens: Tokens) -> None:
    """Refuse a node that reads tokens, or a shape made of their number, and may mix them."""
    kind = operator(node)
    if kind not in RULES:
        raise tokens.refuse(node, "isn't known to treat every token alike")
    for dim in RULES[kind](node, tokens):
        for name in node.input:
            if _dim(name, tokens) == dim % len(tokens.shape(name) or (0,)):
                does = "cuts" if kind == "Slice" else "works"
                raise tokens.refuse(node, f"{does} along the tokens")
    for name in filter(None, node.output):
        if tokens.place(name) is None:
            raise tokens.refuse(node, f"makes {tokens.show(name)} of any number of tokens")


def _shape(name: str, tokens: Tokens) -> Shape:
    shape = tokens.shape(name)
    assert shape is not None  # tokens lie only in what has a shape
    return shape


def _dim(name: str, tokens: Tokens) -> int | None:
    place = tokens.place(name) if name else None
    return place.dim if place else None


def _constants(node: Any, number: int, tokens: Tokens) -> tuple[int, ...]:
    values = tokens.constant(node.input[number])
    if values is None:
        raise tokens.refuse(node, f"takes {node.input[number]!r}, which is no constant")
    return tuple(int(value) for value in values.reshape(-1))


def elementwise(node: Any, tokens: Tokens) -> Dims:
    """Tensors are aligned at their last dims.

    One that isn't cut must have no dim of tokens: neither a length, nor a symbol that counts 1.
    """
    _check_aligned(node, node.input, tokens)
    return ()


def expand(node: Any, tokens: Tokens) -> Dims:
    """The same, but for the second input, which is a shape."""
    _check_aligned(node, node.input[:1], tokens)
    return ()


def _check_aligned(node: Any, names: Iterable[str], tokens: Tokens) -> None:
    for output in filter(None, node.output):
        place = tokens.place(output)
        if place:
            _check_uncut(node, names, tokens, place.dim - len(_shape(output, tokens)))


def _check_uncut(node: Any, names: Iterable[str], tokens: Tokens, from_end: int) -> None:
    for name in filter(None, names):
        shape = _shape(name, tokens)
        dim = from_end + len(shape)
        if dim < 0 or tokens.place(name) is not None:
            continue
        if shape[dim] != 1 or tokens.may_stretch(name, from_end):
            raise tokens.refuse(
                node,
                f"reads {name!r}, whose dim {dim} lies along the tokens and isn't cut",
                fix="name the dim of every input that counts tokens: --shard INPUT:DIM",
            )


def along_last(node: Any, tokens: Tokens) -> Dims:
    """All dims from one on; scale and bias are spread over the rest."""
    dims = len(_shape(node.input[0], tokens))
    yield from range(attribute_of(node, "axis", -1) % dims, dims)
    yield from elementwise(node, tokens)


def reduction(node: Any, tokens: Tokens) -> Dims:
    """Some dims, named by an attribute or an input; all of them where none is."""
    dims: Dims | None = attribute_of(node, "axes")
    if dims is None and len(node.input) > 1 and node.input[1]:
        dims = _constants(node, 1, tokens)
    if not dims and not attribute_of(node, "noop_with_empty_axes", 0):
        dims = range(len(_shape(node.input[0], tokens)))
    return dims or ()


def batch_normalization(node: Any, tokens: Tokens) -> Dims:
    """A fixed scale for each place of dim 1."""
    if attribute_of(node, "training_mode", 0):
        raise tokens.refuse(node, "takes the statistics of all tokens: it is in training mode")
    return [1]


def dropout(node: Any, tokens: Tokens) -> Dims:
    """Nothing, unless in training mode."""
    if len(node.input) > 2 and node.input[2] and any(_constants(node, 2, tokens)):
        raise tokens.refuse(node, "draws random numbers: it is in training mode")
    return ()


def quantization(node: Any, tokens: Tokens) -> Dims:
    """A fixed scale, or one for each place of a dim, or blocks of it."""
    scale = _shape(node.input[1], tokens)
    if len(scale) > 1:
        return elementwise(node, tokens)
    return [attribute_of(node, "axis", 1)] if prod(scale) != 1 else ()


def quantization_by_range(node: Any, tokens: Tokens) -> Dims:
    """One scale for all tokens, made of the largest and the smallest of their values."""
    raise tokens.refuse(
        node,
        "scales by the range of all tokens",
        "shard the model as it was before it was quantized; --dtype makes 16 bits of it",
    )


def product(node: Any, tokens: Tokens) -> Dims:
    """A sum over one dim of each operand, which mustn't be the tokens."""
    if operator(node) == "MatMul":
        vector = len(_shape(node.input[1], tokens)) == 1
        contracted = (-1, -1 if vector else -2)
    else:
        contracted = (
            0 if attribute_of(node, "transA", 0) else 1,
            1 if attribute_of(node, "transB", 0) else 0,
        )
    for name, dim in zip(node.input[:2], contracted, strict=True):
        if _dim(name, tokens) == dim % len(_shape(name, tokens)):
            raise tokens.refuse(node, "sums over the tokens outside of an attention")
    place = tokens.place(node.output[0])
    if place:
        from_end = place.dim - len(_shape(node.output[0], tokens))
        aligned = node.input if from_end < -2 else node.input[2:]  # batches; or what is added
        _check_uncut(node, aligned, tokens, from_end)
    return ()


def einsum(node: Any, tokens: Tokens) -> Dims:
    """The letter of the tokens must be one of the result, and in no operand that isn't cut."""
    equation = attribute_of(node, "equation", b"").decode().replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if "." in equation or not arrow:
        raise tokens.refuse(node, "isn't known to treat every token alike")
    operands = list(zip(node.input, terms.split(","), strict=True))
    places = [(_dim(name, tokens), letters) for name, letters in operands]
    cut = {letters[dim] for dim, letters in places if dim is not None}
    for dim, letters in places:
        if set(letters) & cut - set(result) or len(set(letters) & cut) != (dim is not None):
            raise tokens.refuse(node, "sums over the tokens outside of an attention")
    return ()


def transpose(node: Any, tokens: Tokens) -> Dims:
    """Tokens stay what they are wherever their dim goes."""
    return ()


def regroup(node: Any, tokens: Tokens) -> Dims:
    """Tokens must stay in order: as many elements before their dim as there were."""
    before, after = (_dim(name, tokens) for name in (node.input[0], node.output[0]))
    if before is None or after is None:
        return ()  # refused by `check`
    old, new = (_shape(name, tokens) for name in (node.input[0], node.output[0]))
    if operator(node) == "Squeeze" and len(node.input) < 2:
        raise tokens.refuse(node, "drops whatever dim is 1, as a shard's tokens may be")
    if prod(old[:before]) != prod(new[:after]):
        raise tokens.refuse(node, "mixes the tokens with another dim")
    return ()


def look_up(node: Any, tokens: Tokens) -> Dims:
    """Each index takes from its own place in the other dims, along one dim from anywhere."""
    place = tokens.place(node.input[1])
    axis = attribute_of(node, "axis", 0) % len(_shape(node.input[1], tokens))
    if place and place.dim != axis:
        _check_uncut(node, node.input[:1], tokens, place.dim - len(_shape(node.input[1], tokens)))
    return [axis] if tokens.place(node.input[0]) else ()


def look_up_each(node: Any, tokens: Tokens) -> Dims:
    """One look-up a token, as long as no index is one of several tokens."""
    if attribute_of(node, "batch_dims", 0) or tokens.place(node.input[0]):
        raise tokens.refuse(node, "looks up by tokens in what is cut, or one of a batch")
    place = tokens.place(node.input[1])
    if place and place.dim == len(_shape(node.input[1], tokens)) - 1:
        raise tokens.refuse(node, "makes one index of several tokens")
    return ()


def part(node: Any, tokens: Tokens) -> Dims:
    """A part of other dims; a part of the tokens would be one of every shard."""
    if len(node.input) > 3 and node.input[3]:
        return _constants(node, 3, tokens)
    return range(_shape(node.input[1], tokens)[0])


def rotary(node: Any, tokens: Tokens) -> Dims:
    """An angle for each token, looked up by its position or given for it."""
    data, cosine, sine = node.input[:3]
    given = [node.input[3]] if len(node.input) > 3 and node.input[3] else [cosine, sine]
    place = tokens.place(data)
    if place is None or place.dim != len(_shape(data, tokens)) - 2:
        raise tokens.refuse(node, "turns what isn't cut along its tokens")
    for name in given:
        own = tokens.place(name)
        if own is None or own.sequence != place.sequence or own.dim != 1:
            raise tokens.refuse(
                node,
                f"takes {name!r}, which isn't cut like its tokens: every rank would begin at 0",
                fix="make the positions an input of the model, cut like the tokens",
            )
    return ()


def check_attention(node: Any, tokens: Tokens) -> None:
    """Refuse an attention with further inputs, or whose tokens lie where it can't be shared."""
    if tokens.nested:
        raise tokens.refuse(node, "is an attention in a branch")
    places = [tokens.place(name) for name in node.input[:3]]
    for number, name in enumerate(node.input):
        if name and number > 2 and not _is_mask_of_whole_keys(name, number, places, tokens):
            what = EXTRA_INPUTS.get(number, "more inputs than are known")
            raise tokens.refuse(node, f"has {what}", "use a model without one, or use -n 1")
    if len([name for name in node.output if name]) > 1:
        raise tokens.refuse(node, "gives more than its output", "use -n 1")
    if any(name in tokens.counts for name in node.input):
        raise tokens.refuse(node, "takes what is computed from the number of tokens")
    query, key, value = places
    if [place and place.dim for place in places] == [0, 0, 0]:
        return  # tokens are its batch: each has an attention of its own
    for name, place in zip(node.input, places, strict=False):
        if place and place.dim != len(_shape(name, tokens)) - 2:
            raise tokens.refuse(
                node, f"takes {name!r}, {tokens.show(name)}, whose dim {place.dim} counts tokens"
            )
    if query is None:
        raise tokens.refuse(
            node,
            f"takes queries {node.input[0]!r} that no rank cuts, over keys that are cut",
            "name the dim that counts tokens for every input: --shard INPUT:DIM",
        )
    if (key and key.sequence) != (value and value.sequence):
        raise tokens.refuse(
            node,
            f"takes keys {node.input[1]!r} and values {node.input[2]!r} that aren't cut alike",
            "name the dim that counts tokens for every input: --shard INPUT:DIM",
        )


def _is_mask_of_whole_keys(
    name: str, number: int, places: list[TokenDim | None], tokens: Tokens
) -> bool:
    """Whether an input is a mask that is the same for all queries, of keys that no rank cuts."""
    if number != 3 or places[1] or places[2] or tokens.place(name):
        return False
    return len(_shape(name, tokens)) > 1 and not tokens.may_stretch(name, -2)


def along(default: int) -> Rule:
    """One dim, named by an attribute."""
    return lambda node, tokens: [attribute_of(node, "axis", default)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(REDUCE, reduction),
    **dict.fromkeys(("ArgMax", "ArgMin", "Concat", "Split"), along(0)),
    **dict.fromkeys(("LogSoftmax", "LpNormalization", "Softmax", "TopK"), along(-1)),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), regroup),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), along_last),
    # Only dim 0, the batch, may be the tokens.
    **dict.fromkeys(
        ("InstanceNormalization", "GroupNormalization"),
        lambda node, tokens: range(1, len(_shape(node.input[0], tokens))),
    ),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), quantization),
    "DynamicQuantizeLinear": quantization_by_range,
    **dict.fromkeys(("MatMul", "Gemm"), product),
    "BatchNormalization": batch_normalization,
    "ConstantOfShape": transpose,
    "GatherElements": look_up,
    "GatherND": look_up_each,
    "CumSum": lambda node, tokens: _constants(node, 1, tokens),
    "Dropout": dropout,
    "Einsum": einsum,
    "Expand": expand,
    # Of what isn't cut it is an embedding: one look-up a token.
    "Gather": lambda node, tokens: along(0)(node, tokens) if tokens.place(node.input[0]) else (),
    "RotaryEmbedding": rotary,
    "Slice": part,
    "Tile": lambda node, tokens: [
        dim for dim, count in enumerate(_constants(node, 1, tokens)) if count != 1
    ],
    "Transpose": transpose,
}
