"""What can't be cut is refused, with the node's name and the one true reason.

Each model takes ``x`` to ``y`` by a node ``bad`` that is wrong on a shard, and attends to ``y``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import RejectedError

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")

from mdattn_mpi.onnx.model import load_model  # noqa: E402
from mdattn_mpi.onnx.shard import shard_model  # noqa: E402
from tests.support.onnx_graph import BOOL, FLOAT, INT64, branch, graph, node  # noqa: E402

helper = onnx.helper
WIDTH = 32
SEQUENCE = [1, "S", WIDTH]
HEADS = {"q_num_heads": 4, "kv_num_heads": 4}


def integers(*values: int) -> Any:
    return np.array(values, np.int64)


def before(
    *nodes: Any,
    inputs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    opset: int = 23,
    x: Any = SEQUENCE,
) -> Any:
    """A model whose `nodes` take ``x`` to ``y``, to which it attends."""
    attend = node("Attention", "yyy", "o", name="att", **HEADS)
    return graph([*nodes, attend], {"x": x, **(inputs or {})}, {"o": x}, weights, opset)


def bad(kind: str, inputs: Sequence[str], outputs: Sequence[str] = "y", **attributes: Any) -> Any:
    return node(kind, inputs, outputs, name="bad", **attributes)


def centred(mean: Any, **weights: Any) -> Any:
    """Subtract what the node `mean` makes."""
    return before(mean, node("Sub", "xm", "y"), weights=weights)


def counted(*nodes: Any, **weights: Any) -> Any:
    """`nodes` read ``count``, the number of tokens."""
    one = node("Shape", "x", ["count"], start=1, end=2)
    return before(one, *nodes, weights=weights)


def held(mean: Callable[[str], Any]) -> Any:
    """Put a graph into an If in an If."""

    def outer(output: str) -> Any:
        inner = node(
            "If", "c", [output], name="inner", then_branch=mean("t"), else_branch=mean("e")
        )
        return branch([inner], output)

    nodes = [
        node("If", "c", "m", name="outer", then_branch=outer("a"), else_branch=outer("b")),
        node("Sub", "xm", "y"),
    ]
    return before(*nodes, inputs={"c": ([], BOOL)}, weights={"axes": integers(-2)})


def mean_in(output: str) -> Any:
    return branch([node("ReduceMean", ["x", "axes"], [output], name="bad", keepdims=1)], output)


def attention_in(output: str) -> Any:
    return branch([node("Attention", "xxx", [output], name="bad", **HEADS)], output)


def loop() -> Any:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            node("Identity", ["c"], ["c2"]),
            node("ReduceMean", ["p", "axes"], ["m"], keepdims=1),
            node("Sub", ["p", "m"], ["p2"]),
        ],
        "body",
        [value("i", INT64, []), value("c", BOOL, []), value("p", FLOAT, None)],
        [value("c2", BOOL, []), value("p2", FLOAT, None)],
    )
    weights = {"trips": np.int64(3), "axes": integers(1)}
    return before(bad("Loop", ["trips", "", "x"], body=body), weights=weights)


def capturing_loop() -> Any:
    """A Loop that is given nothing, and takes the tokens from outside."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            node("Identity", ["c"], ["c2"]),
            node("ReduceMean", ["x", "axes"], ["m"], keepdims=1),
            node("Add", ["p", "m"], ["p2"]),
        ],
        "body",
        [value("i", INT64, []), value("c", BOOL, []), value("p", FLOAT, [1, 1, WIDTH])],
        [value("c2", BOOL, []), value("p2", FLOAT, [1, 1, WIDTH])],
    )
    weights = {"trips": np.int64(3), "axes": integers(1), "p0": np.zeros((1, 1, WIDTH), "f4")}
    nodes = [bad("Loop", ["trips", "", "p0"], "z", body=body), node("Add", "xz", "y")]
    return before(*nodes, weights=weights)


def scan() -> Any:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Add", "ab", ["a2"]), node("Identity", ["a2"], ["b2"])],
        "body",
        [value(name, FLOAT, [WIDTH]) for name in "ab"],
        [value(name, FLOAT, [WIDTH]) for name in ("a2", "b2")],
    )
    nodes = [
        node("Squeeze", ["x", "zero"], ["rows"]),
        bad("Scan", ["start", "rows"], ["last", "sums"], body=body, num_scan_inputs=1),
        node("Unsqueeze", ["sums", "zero"], "y"),
    ]
    return before(*nodes, weights={"zero": integers(0), "start": np.zeros(WIDTH, "f4")})


def function() -> Any:
    """A function of the model's own with the name of a harmless operator."""
    inner = helper.make_function(
        "own",
        "Relu",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["axes"], value_ints=[1]),
            helper.make_node("ReduceMean", ["a", "axes"], ["m"], name="bad", keepdims=1),
            helper.make_node("Add", ["a", "m"], ["b"]),
        ],
        [helper.make_opsetid("", 23)],
    )
    whole = before(node("Relu", "x", "y", domain="own"))
    whole.functions.append(inner)
    whole.opset_import.append(helper.make_opsetid("own", 1))
    return whole


def part_of(first: int, step: int) -> Any:
    """Some of the tokens, of few one or none, and a mask of as many."""
    nodes = [
        bad("Slice", ["x", "first", "end", "one", "step"], "y"),
        node("Shape", "y", ["count"], start=1, end=2),
        node("Squeeze", ["count"], "n"),
        node("Range", ["start", "n", "next"], "p"),
        node("Unsqueeze", ["p", "one"], "r"),
        node("LessOrEqual", "pr", "m"),
        node("Attention", "yyym", "o", name="att", **HEADS),
    ]
    weights = {"first": integers(first), "end": integers(1 << 40), "one": integers(1)}
    weights |= {"step": integers(step), "start": np.int64(0), "next": np.int64(1)}
    return graph(nodes, {"x": SEQUENCE}, {"o": SEQUENCE}, weights)


def foreign(kind: str, domain: str) -> Any:
    """An operator of another domain, with the name of one of ONNX's own."""
    whole = before(bad(kind, "x", domain=domain))
    whole.opset_import.append(helper.make_opsetid(domain, 1))
    return whole


def sandwiched(kind: str, *more: str, weights: Mapping[str, Any], **attributes: Any) -> Any:
    """An operator over ``[B, C, S]``."""
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        bad(kind, ["t", *more], "u", **attributes),
        node("Transpose", "u", "y", perm=[0, 2, 1]),
    ]
    return before(*nodes, weights=weights)


def attention_with(number: int, shape: Any, opset: int = 23, **attributes: Any) -> Any:
    """An attention with one more input, at that place."""
    given = ["x", "x", "x", *[""] * (number - 3), "extra"]
    last = [node("Attention", given, "o", name="bad", **HEADS, **attributes)]
    return graph(last, {"x": SEQUENCE, "extra": shape}, {"o": SEQUENCE}, opset=opset)


ONES = np.ones(WIDTH, "f4")
ALONG = "works along the tokens"
VALUE = "uses the number of tokens as a value"
UNSEEN = r"depends on the number of tokens in an unknown way \(seen at (515|4099) tokens\)"
UNKNOWN = "isn't known to treat every token alike"
SUMS = "sums over the tokens"

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "mean": (lambda: centred(bad("ReduceMean", "xa", "m"), a=integers(1)), ALONG),
    "mean, negative axis": (lambda: centred(bad("ReduceMean", "xa", "m"), a=integers(-2)), ALONG),
    "mean over all": (lambda: centred(bad("ReduceMean", "x", "m")), ALONG),
    "mean, no axes": (lambda: centred(bad("ReduceMean", "xa", "m"), a=integers()), ALONG),
    "mean, axes as an attribute": (
        lambda: before(bad("ReduceMean", "x", "m", axes=[1]), node("Sub", "xm", "y"), opset=17),
        ALONG,
    ),
    "mean, axes at run time": (
        lambda: before(
            bad("ReduceMean", "xa", "m"), node("Sub", "xm", "y"), inputs={"a": ([1], INT64)}
        ),
        "takes 'a', which is no constant",
    ),
    "norm": (
        lambda: before(bad("LayerNormalization", "xg", axis=-2), weights={"g": ONES}),
        ALONG,
    ),
    "softmax": (lambda: before(bad("Softmax", "x", axis=1)), ALONG),
    "running sum": (lambda: before(bad("CumSum", "xa"), weights={"a": np.int64(-2)}), ALONG),
    "largest": (
        lambda: before(
            bad("TopK", "xk", ["t", "i"], axis=1),
            node("ReduceMax", "ta", "m"),
            node("Sub", "xm", "y"),
            weights={"k": integers(5), "a": integers(1)},
        ),
        ALONG,
    ),
    "last token": (lambda: centred(bad("Gather", "xi", "m", axis=1), i=integers(-1)), ALONG),
    "registers": (
        lambda: before(bad("Concat", "rx", axis=-2), weights={"r": np.ones((1, 4, WIDTH), "f4")}),
        ALONG,
    ),
    "split": (
        lambda: before(bad("Split", "x", ["y", "rest"], axis=1, num_outputs=2)),
        "doesn't take every number|works along",
    ),
    "repeated": (lambda: before(bad("Tile", "xr"), weights={"r": integers(1, 2, 1)}), ALONG),
    "first tokens": (
        lambda: before(bad("Slice", "xzea"), weights={
            "z": integers(0), "e": integers(-1), "a": integers(-2)
        }),
        "cuts along the tokens",
    ),
    "every 64th token": (lambda: part_of(0, 64), "cuts along the tokens"),
    "group norm": (
        lambda: sandwiched(
            "GroupNormalization", "g", "b", weights={"g": ONES, "b": ONES}, num_groups=4
        ),
        ALONG,
    ),
    "instance norm": (
        lambda: sandwiched("InstanceNormalization", "g", "b", weights={"g": ONES, "b": ONES}),
        ALONG,
    ),
    "convolution": (
        lambda: sandwiched(
            "Conv", "w", weights={"w": np.ones((WIDTH, WIDTH, 3), "f4")}, pads=[1, 1]
        ),
        UNKNOWN,
    ),
    "batch statistics": (
        lambda: sandwiched(
            "BatchNormalization", "g", "b", "g", "g", weights={"g": ONES, "b": ONES},
            training_mode=1,
        ),
        "is in training mode|doesn't take every number",
    ),
    "quantized by its range": (
        lambda: before(
            bad("DynamicQuantizeLinear", "x", ["b", "scale", "zero"]),
            node("DequantizeLinear", ["b", "scale", "zero"], "y"),
        ),
        "scales by the range of all tokens",
    ),
    "triangle": (lambda: before(bad("Trilu", "x")), UNKNOWN),
    "padding": (
        lambda: before(bad("Pad", "xp"), weights={"p": integers(0, 1, 0, 0, 0, 0)}), UNKNOWN
    ),
    "noise": (lambda: before(bad("RandomNormalLike", "x", "r"), node("Add", "xr", "y")), UNKNOWN),
    "the same noise": (
        lambda: before(bad("RandomNormal", [], "r", shape=[1, 1, WIDTH]), node("Add", "xr", "y")),
        "draws random numbers",
    ),
    "features by features": (
        lambda: before(
            node("Transpose", "x", "t", perm=[0, 2, 1]),
            bad("MatMul", "tx", "m"),
            node("MatMul", "xm", "y"),
        ),
        SUMS,
    ),
    "einsum": (
        lambda: before(
            bad("Einsum", "xx", "m", equation="bsd,bse->bde"), node("MatMul", "xm", "y")
        ),
        SUMS,
    ),
    "heads before tokens": (
        lambda: before(
            bad("Reshape", "xp", "h"),
            node("Relu", "h", "r"),
            node("Reshape", "rq", "y"),
            weights={"p": integers(1, 4, -1, 8), "q": integers(1, -1, WIDTH)},
        ),
        "mixes the tokens with another dim",
    ),
    "mean by hand": (
        lambda: counted(
            node("Cast", ["count"], "f", to=FLOAT), bad("Div", "xf")
        ),
        VALUE,
    ),
    "size": (
        lambda: before(
            node("Size", "x", "n"), node("Cast", "n", "f", to=FLOAT), bad("Div", "xf")
        ),
        VALUE,
    ),
    "long or short": (
        lambda: counted(
            node("Greater", ["count", "limit"], "b"), bad("Where", "bxz"),
            limit=integers(512), z=np.zeros(1, "f4"),
        ),
        UNSEEN,
    ),
    "a branch by length": (
        lambda: counted(
            node("Squeeze", ["count"], "n"), node("Greater", ["n", "limit"], "c"),
            bad("If", "c", then_branch=branch([node("Relu", "x", "t")], "t"),
                else_branch=branch([node("Neg", "x", "e")], "e")),
            limit=np.int64(512),
        ),
        UNSEEN,
    ),
    "at most 4096": (
        lambda: counted(
            node("Min", ["count", "limit"], "n"), node("Concat", ["one", "n", "one"], "s", axis=0),
            node("Expand", "vs", "e"), bad("Add", "xe", "y"),
            limit=integers(4096), one=integers(1), v=np.ones((1, 1, WIDTH), "f4"),
        ),
        UNSEEN,
    ),
    "a rotation from 0": (
        lambda: before(
            bad("RotaryEmbedding", ["x", "t", "t", "p"], num_heads=4),
            weights={"t": np.ones((64, 4), "f4"), "p": np.zeros((1, 1), np.int64)},
        ),
        "takes 'p', which isn't cut like its tokens",
    ),
    "a mean in a branch of a branch": (lambda: held(mean_in), f"inside node 'inner'.*{ALONG}"),
    "an attention in a branch": (lambda: held(attention_in), "is an attention in a branch"),
    "a loop": (loop, UNKNOWN),
    "a loop that captures": (capturing_loop, UNKNOWN),
    "a scan": (scan, UNKNOWN),
    "an operator of another domain": (lambda: foreign("Relu", "own"), UNKNOWN),
    "an attention of another domain": (lambda: foreign("Attention", "own"), UNKNOWN),
    "an attention without its inputs": (
        lambda: foreign("Attention", "com.microsoft"), "lacks an input that it must have"
    ),
    "a mask": (lambda: attention_with(3, ["S", "S"]), "has a mask"),
    "past keys": (lambda: attention_with(4, [1, 4, "P", 8], is_causal=1), "has past keys"),
    "a count of keys": (
        lambda: attention_with(6, ([1], INT64), opset=24, is_causal=1), "has a count of keys"
    ),
    "shared already": (
        lambda: graph(
            [node("Attention", "xxx", "o", name="bad", nb_rank=4, **HEADS)],
            {"x": SEQUENCE}, {"o": SEQUENCE},
        ),
        "is shared already",
    ),
    "a scale for each place": (
        lambda: before(bad("RMSNormalization", "xp"), weights={"p": np.ones((96, WIDTH), "f4")}),
        "whose dim 0 lies along the tokens and isn't cut",
    ),
    "whatever is 1": (
        lambda: before(
            bad("Squeeze", "x", "q"), node("Unsqueeze", "qz", "y"), weights={"z": integers(0)}
        ),
        "drops whatever dim is 1",
    ),
    "learned positions of a fixed length": (
        lambda: before(
            bad("Add", "xp"), weights={"p": np.ones((1, 96, WIDTH), "f4")}, x=[1, 96, WIDTH]
        ),
        "doesn't take every number of tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("name", MODELS)
def test_a_node_that_is_not_the_same_on_a_shard(name: str, strategy: Any, tmp_path: Path) -> None:
    make, why = MODELS[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    with pytest.raises(RejectedError, match=rf"node 'bad' .*({why})") as caught:
        shard_model(load_model(path), strategy, 2, {})
    assert caught.value.fix


def test_a_mask_of_no_tokens() -> None:
    """As there is where a model makes fewer tokens of its input, of a few samples none."""
    with pytest.raises(RejectedError, match=r"(?s)'att' .*has a mask that can't .*'bad' .*cuts"):
        shard_model(part_of(64, 1), "allgather", 2, {})


def test_a_mask_of_one_number_of_tokens() -> None:
    """As there is where a model was exported without a dynamic length."""
    mask = node("Greater", ["triangle", "half"], "m")
    weights = {"triangle": np.tri(9, dtype=np.float32), "half": np.float32(0.5)}
    attend = node("Attention", "xxxm", "o", name="att", **HEADS)
    whole = graph([mask, attend], {"x": SEQUENCE}, {"o": SEQUENCE}, weights)
    with pytest.raises(RejectedError, match=r"'att' .*has a mask that is of one") as caught:
        shard_model(whole, "allgather", 2, {})
    assert "with a dynamic number of tokens" in str(caught.value)


def test_a_mean_in_a_function(tmp_path: Path) -> None:
    """It is written out where it is called, whatever its name."""
    path = tmp_path / "model.onnx"
    path.write_bytes(function().SerializeToString())
    with pytest.raises(RejectedError, match=rf"\(ReduceMean\) {ALONG}"):
        shard_model(load_model(path), "allgather", 2, {})


def test_a_second_input_that_was_not_named() -> None:
    """Counted as 1 it would be spread over the tokens."""
    add = bad("Add", "xp")
    for inputs, x in (({"p": [1, "T", WIDTH]}, SEQUENCE), ({"p": [1, 96, WIDTH]}, [1, 96, WIDTH])):
        whole = before(add, inputs=inputs, x=x)
        with pytest.raises(RejectedError, match=r"node 'bad' \(Add\)") as caught:
            shard_model(whole, "allgather", 2, {"x": 1})
        assert "--shard INPUT:DIM" in caught.value.fix
        shard_model(whole, "allgather", 2, {"x": 1, "p": 1})


def test_two_inputs_with_one_symbol_are_both_cut() -> None:
    from mdattn_mpi.onnx.sharding import read_sharding

    whole = before(bad("Add", "xp"), inputs={"p": SEQUENCE})
    for named in ({}, {"x": 1}):
        sharded, _ = shard_model(whole, "allgather", 2, named)
        assert read_sharding(sharded, Path()).axes == {"x": 1, "p": 1, "o": 1}


def test_an_input_of_tokens_by_tokens() -> None:
    whole = before(bad("MatMul", "Ax"), inputs={"A": ["S", "S"]})
    with pytest.raises(RejectedError, match=r"takes 'A', \[S, S\], of which no single dim"):
        shard_model(whole, "allgather", 2, {})


def test_a_count_of_tokens_as_an_output() -> None:
    whole = before(node("Shape", "x", "n"), node("Relu", "x", "y"))
    whole.graph.output.append(helper.make_tensor_value_info("n", INT64, [3]))
    with pytest.raises(RejectedError, match="the model gives 'n', computed from the number"):
        shard_model(whole, "allgather", 2, {})


CROSS = {"q": [1, 4, "S", 8], "k": [1, 4, 20, 8]}


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("Attention", {"is_causal": 1}),
        ("TRT_Attention", {"causal_kind": "upper_left"}),
        ("TRT_Attention", {"causal_kind": "lower_right"}),
    ],
)
@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
def test_a_causal_attention_over_whole_keys(
    kind: str, attributes: dict[str, Any], strategy: Any
) -> None:
    nodes = [
        node("Attention", "qqq", "a"),
        node(kind, "akk", "o", name="bad", **attributes),
    ]
    whole = graph(nodes, CROSS, {"o": CROSS["q"]})
    with pytest.raises(RejectedError, match=r"'bad' .*over keys that no rank cuts") as caught:
        shard_model(whole, strategy, 2, {})
    if "lower_right" in attributes.values():
        assert caught.value.fix == "use -n 1"
    else:
        assert caught.value.fix.startswith("cut the keys too: -s ulysses --shard q:2 --shard k:2;")
        shard_model(whole, "ulysses", 2, {"q": 2, "k": 2})
    assert shard_model(whole, strategy, 1, {})[1] == [
        "one rank has all tokens; the model is left as it is"
    ]


def test_keys_and_values_that_are_not_cut_alike() -> None:
    shapes = {"q": SEQUENCE, "k": [1, "T", WIDTH], "v": [1, "U", WIDTH]}
    whole = graph([node("Attention", "qkv", "o", name="bad", **HEADS)], shapes, {"o": SEQUENCE})
    with pytest.raises(RejectedError, match=r"'bad' .*'k' and values 'v' that aren't cut alike"):
        shard_model(whole, "allgather", 2, {"q": 1, "k": 1})
    shard_model(whole, "allgather", 2, {})


def test_inputs_that_would_be_taken_for_numbers_of_keys() -> None:
    whole = before(bad("Add", ["x", "keys_gain"]), inputs={"keys_gain": [WIDTH]})
    with pytest.raises(
        RejectedError, match="'keys_gain' would be taken for one that sharding adds"
    ):
        shard_model(whole, "allgather", 2, {})


@pytest.mark.parametrize(
    ("mask", "data"),
    [(node("Add", "sm", "w"), "m"), (node("Add", "ms", "w"), "m"),
     (node("Where", "csf", "w"), "c"), (node("Where", "cfs", "w"), "c")],
    ids=["added", "added first", "seen", "blocked"],
)  # fmt: skip
def test_a_mask_in_single_steps(mask: Any, data: str) -> None:
    """Made of values, not of lengths: floats are no padding, and ``c`` is read elsewhere too."""
    nodes = [
        node("Transpose", "k", "t", perm=[0, 1, 3, 2]),
        node("MatMul", "qt", "s"),
        mask,
        node("Softmax", "w", "p", axis=-1),
        node("MatMul", "pk", "a"),
        node("Slice", ["c", "zero", "one", "zero"], ["first"]),
        node("Transpose", ["first"], "d", perm=[1, 0]),
        node("Where", "daa", "o"),
    ]
    shape = [1, 4, "S", 8]
    inputs = {"q": shape, "k": shape, "m": ["S", "S"], "c": (["S", "S"], BOOL)}
    weights = {"f": np.float32(-np.inf), "zero": integers(0), "one": integers(1)}
    with pytest.raises(RejectedError, match=f"has a mask that is made of '{data}'"):
        shard_model(graph(nodes, inputs, {"o": shape}, weights), "allgather", 2, {})


def test_single_steps_without_a_dim_of_heads() -> None:
    nodes = [
        node("Transpose", "k", "t", perm=[0, 2, 1]),
        node("MatMul", "qt", "s"),
        node("Softmax", "s", "p", axis=-1, name="bad"),
        node("MatMul", "pk", "o"),
    ]
    shape = [4, "S", 8]
    with pytest.raises(RejectedError, match=r"'bad' .* isn't over the keys in the last of four"):
        shard_model(graph(nodes, {"q": shape, "k": shape}, {"o": shape}), "allgather", 2, {})
