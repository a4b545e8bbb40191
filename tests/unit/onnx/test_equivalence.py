"""A sharded model computes what the whole one does: executed on 2 and 3 ranks, and compared.

Every form that `mdattn shard` takes stands here. The whole model runs in onnx's own reference
evaluator. Lengths don't divide, shards are filled up with what must not count, and the same with
attention inside each rank alone must be seen to be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.support.tensorrt import library, needs_tensorrt

onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
from tests.support.onnx_graph import BOOL, FLOAT, INT64, branch, graph, node  # noqa: E402

helper = onnx.helper
STRATEGIES = ("ring", "allgather", "ulysses")
TOKENS, OTHERS = 11, 7  # of the queries, and of the keys in cross attention
HEADS, DIM = 12, 4


class Form(NamedTuple):
    """A model, inputs for it, and what of it can't be."""

    model: Any
    inputs: dict[str, Any]
    keys: str = "tokens"
    refused: Sequence[str] = ()  # strategies
    tensorrt: bool = True  # whether its parser, and the interpreter of networks, take it


RANDOM = np.random.default_rng(7)


def normal(*shape: int) -> Any:
    return (1.5 * RANDOM.standard_normal(shape)).astype(np.float32)


def plain(
    kv_heads: int = HEADS,
    v_dim: int = DIM,
    cross: bool = False,
    kind: str = "Attention",
    refused: Sequence[str] = (),
    **attributes: Any,
) -> Form:
    """One attention of queries, keys and values that come in, heads first."""
    keys, count = ("T", OTHERS) if cross else ("S", TOKENS)
    inputs = {
        "q": [1, HEADS, "S", DIM],
        "k": [1, kv_heads, keys, DIM],
        "v": [1, kv_heads, keys, v_dim],
    }
    arrays = {
        "q": normal(1, HEADS, TOKENS, DIM),
        "k": normal(1, kv_heads, count, DIM),
        "v": normal(1, kv_heads, count, v_dim),
    }
    whole = graph([node(kind, "qkv", "o", **attributes)], inputs, {"o": [1, HEADS, "S", v_dim]})
    return Form(whole, arrays, "T" if cross else "tokens", refused, tensorrt=v_dim == DIM)


def joined(kv_heads: int = HEADS, cross: bool = False, v_dim: int = DIM, **more: Any) -> Form:
    """One attention of 3-D inputs, heads in the last dim."""
    keys, count = ("T", OTHERS) if cross else ("S", TOKENS)
    widths = {"q": HEADS * DIM, "k": kv_heads * DIM, "v": kv_heads * v_dim}
    symbols = {"q": "S", "k": keys, "v": keys}
    lengths = {"q": TOKENS, "k": count, "v": count}
    refused = more.pop("refused", ())
    heads = {"q_num_heads": HEADS, "kv_num_heads": kv_heads}
    whole = graph(
        [node("Attention", "qkv", "o", **heads, **more)],
        {name: [1, symbols[name], width] for name, width in widths.items()},
        {"o": [1, "S", HEADS * v_dim]},
    )
    arrays = {name: normal(1, lengths[name], width) for name, width in widths.items()}
    return Form(whole, arrays, "T" if cross else "tokens", refused, tensorrt=v_dim == DIM)


def static(*shape: int, **attributes: Any) -> Form:
    """The same with lengths that the file fixes."""
    whole = graph(
        [node("Attention", "qkv", "o", **attributes)],
        {name: list(shape) for name in "qkv"},
        {"o": list(shape)},
    )
    return Form(whole, {name: normal(*shape) for name in "qkv"})


def layers(count: int = 2, causal: bool = False) -> Form:
    """Several layers, with positions that come in, norms and an embedding of token ids."""
    width = HEADS * DIM
    heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    weights: dict[str, Any] = {"table": normal(50, width), "places": normal(64, width)}
    nodes = [
        node("Gather", ["table", "ids"], ["words"]),
        node("Gather", ["places", "positions"], ["where"]),
        node("Add", ["words", "where"], ["x0"]),
    ]
    for n in range(count):
        weights |= {f"w{name}{n}": normal(width, width) / 3 for name in "qkv"}
        weights[f"gain{n}"] = 1 + 0.1 * normal(width)
        nodes += [
            node("RMSNormalization", [f"x{n}", f"gain{n}"], [f"n{n}"]),
            *(node("MatMul", [f"n{n}", f"w{name}{n}"], [f"{name}{n}"]) for name in "qkv"),
            node(
                "Attention", [f"q{n}", f"k{n}", f"v{n}"], [f"a{n}"], is_causal=int(causal), **heads
            ),
            node("Add", [f"x{n}", f"a{n}"], [f"x{n + 1}"]),
        ]
    whole = graph(
        nodes,
        {"ids": ([1, "S"], INT64), "positions": ([1, "S"], INT64)},
        {f"x{count}": [1, "S", width]},
        weights,
    )
    ids = {"ids": RANDOM.integers(0, 50, (1, TOKENS)), "positions": np.arange(TOKENS)[None]}
    return Form(whole, ids, refused=("ring",) if causal else ())


def decoder() -> Form:
    """Causal attention of the queries' own tokens, then of those of another sequence."""
    heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    width = HEADS * DIM
    nodes = [
        node("Attention", "xxx", "a", is_causal=1, **heads),
        node("Add", "xa", "b"),
        node("Attention", "bcc", "o", **heads),
    ]
    whole = graph(nodes, {"x": [1, "S", width], "c": [1, "T", width]}, {"o": [1, "S", width]})
    return Form(
        whole, {"x": normal(1, TOKENS, width), "c": normal(1, OTHERS, width)}, "", ("ring",)
    )


def context() -> Form:
    """Cross attention over keys of a fixed number, which every rank has whole."""
    nodes = [node("Attention", "qkv", "a"), node("Attention", ["a", "kc", "vc"], ["o"])]
    own, fixed = [1, HEADS, "S", DIM], [1, HEADS, 5, DIM]
    whole = graph(nodes, {**dict.fromkeys("qkv", own), "kc": fixed, "vc": fixed}, {"o": own})
    arrays = {name: normal(1, HEADS, TOKENS, DIM) for name in "qkv"}
    return Form(whole, arrays | {name: normal(1, HEADS, 5, DIM) for name in ("kc", "vc")})


def steps(kv_heads: int = HEADS) -> Form:
    """MatMul–Softmax–MatMul, as older opsets have it."""
    nodes = [
        node("Transpose", "k", "t", perm=[0, 1, 3, 2]),
        node("MatMul", "qt", "s"),
        node("Div", ["s", "two"], ["d"]),
        node("Softmax", "d", "p", axis=-1),
        node("MatMul", "pv", "o"),
    ]
    shapes = {"q": [1, HEADS, "S", DIM], **{name: [1, kv_heads, "S", DIM] for name in "kv"}}
    weights = {"two": np.float32(2)}
    whole = graph(nodes, shapes, {"o": shapes["q"]}, weights, opset=17)
    heads = {"q": HEADS, "k": kv_heads, "v": kv_heads}
    return Form(whole, {name: normal(1, n, TOKENS, DIM) for name, n in heads.items()})


def reshaped() -> Form:
    """Shapes made of the number of tokens, a scale made of the head dim, a rotation."""
    width = HEADS * DIM
    nodes = [
        node("Shape", "x", ["size"]),
        node("Gather", ["size", "one"], ["count"], axis=0),
        node("Concat", ["minus", "count", "heads", "dim"], ["shape"], axis=0),
        node("Reshape", ["x", "shape"], ["split"]),
        node("Transpose", ["split"], ["first"], perm=[0, 2, 1, 3]),
        node("RotaryEmbedding", ["first", "cos", "sin", "positions"], ["turned"]),
        node("Shape", ["turned"], ["last"], start=-1),
        node("Cast", ["last"], ["width"], to=FLOAT),
        node("Sqrt", ["width"], ["root"]),
        node("Div", ["turned", "root"], ["q"]),
        node("Attention", ["q", "turned", "first"], ["a"], scale=2.0),
        node("Transpose", ["a"], ["back"], perm=[0, 2, 1, 3]),
        node("Shape", ["x"], ["whole"]),
        node("Reshape", ["back", "whole"], ["o"]),
    ]
    weights = {
        name: np.array([value])
        for name, value in {"one": 1, "minus": 1, "heads": HEADS, "dim": DIM}.items()
    }
    angles = np.arange(64)[:, None] * np.array([0.3, 0.05])
    weights |= {"cos": np.cos(angles).astype("f4"), "sin": np.sin(angles).astype("f4")}
    whole = graph(
        nodes,
        {"x": [1, "S", width], "positions": ([1, "S"], INT64)},
        {"o": [1, "S", width]},
        weights,
    )
    inputs = {"x": normal(1, TOKENS, width), "positions": np.arange(TOKENS)[None]}
    return Form(whole, inputs, tensorrt=False)


def linear() -> Form:
    """Linear layers with a bias, as exporters write them for ``[S, width]``."""
    width = HEADS * DIM
    nodes = [
        node("Gemm", ["x", "w", "bias"], "g", transB=1),
        node("LayerNormalization", ["g", "gain", "bias"], "n"),
        node("Unsqueeze", ["n", "zero"], "u"),
        node("Attention", "uuu", "a", q_num_heads=HEADS, kv_num_heads=HEADS),
        node("Squeeze", ["a", "zero"], "s"),
        node("Einsum", ["s", "w"], "e", equation="sd,de->se"),
        node("MatMul", ["e", "w"], "m"),
        node("Add", ["m", "bias"], "o"),
    ]
    weights = {
        "w": normal(width, width) / 9,
        "bias": normal(width),
        "gain": normal(width),
        "zero": np.array([0]),
    }
    whole = graph(nodes, {"x": ["S", width]}, {"o": ["S", width]}, weights)
    return Form(whole, {"x": normal(TOKENS, width)}, tensorrt=False)


def branches() -> Form:
    """An If whose branches treat every token alike."""

    shape = [1, HEADS, "S", DIM]

    def times(factor: str, output: str) -> Any:
        return branch([node("Mul", ["x", factor], [output])], output, shape)

    nodes = [
        node("If", "c", "y", then_branch=times("two", "double"), else_branch=times("w", "half")),
        node("Attention", "yyy", "o"),
    ]
    weights = {"two": np.float32(2), "w": np.float32(0.5)}
    whole = graph(nodes, {"x": shape, "c": ([], BOOL)}, {"o": shape}, weights)
    inputs = {"x": normal(1, HEADS, TOKENS, DIM), "c": np.array(True)}
    return Form(whole, inputs, tensorrt=False)


def function() -> Form:
    """A function of the model's own around the attention; `load_model` writes it out."""
    form = plain()
    inner = helper.make_function(
        "own", "Around", ["a"], ["b"], [helper.make_node("Attention", "aaa", "b")],
        [helper.make_opsetid("", 23)],
    )  # fmt: skip
    shape = [1, HEADS, "S", DIM]
    whole = graph([helper.make_node("Around", "x", "o", domain="own")], {"x": shape}, {"o": shape})
    whole.functions.append(inner)
    whole.opset_import.append(helper.make_opsetid("own", 1))
    return Form(whole, {"x": form.inputs["q"]})


def counted(*nodes: Any, weights: dict[str, Any] | None = None, **attributes: Any) -> Form:
    """`nodes` make ``y`` of ``x`` and of ``count``, its number of tokens; then an attention."""
    shape = [1, "S", HEADS * DIM]
    first = node("Shape", "x", ["count"], start=1, end=2)
    last = node("Attention", "yyy", "o", q_num_heads=HEADS, kv_num_heads=HEADS, **attributes)
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "start": np.int64(0),
        "step": np.int64(1),
        **(weights or {}),
    }
    whole = graph([first, *nodes, last], {"x": shape}, {"o": shape}, constants)
    return Form(whole, {"x": normal(1, TOKENS, HEADS * DIM)})


POSITIONS = [node("Squeeze", ["count"], "n"), node("Range", ["start", "n", "step"], "p")]


def embedded() -> Form:
    """Positions by Range look up a table, and turn into angles."""
    nodes = [
        *POSITIONS,
        node("Gather", "tp", "w"),
        node("Cast", "p", "f", to=FLOAT),
        node("Unsqueeze", ["f", "one"], "a"),
        node("Sin", "a", "b"),
        node("Add", "xw", "z"),
        node("Mul", "zb", "y"),
    ]
    return counted(*nodes, weights={"t": normal(90, HEADS * DIM)})


def buffered() -> Form:
    """A slice of a table of positions."""
    cut = node("Slice", ["t", "zero", "count", "one"], "p")
    return counted(cut, node("Add", "xp", "y"), weights={"t": normal(1, 90, HEADS * DIM)})


def picked() -> Form:
    """Positions that GatherND looks up, each by an index of its own."""
    nodes = [
        *POSITIONS,
        node("Unsqueeze", ["p", "one"], "i"),
        node("GatherND", "ti", "w"),
        node("Add", "xw", "y"),
    ]
    return counted(*nodes, weights={"t": normal(90, HEADS * DIM)})


def expanded() -> Form:
    """Tokens, in the last dim, that are given the shape that they have."""
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("Concat", ["one", "width", "count"], "s", axis=0),
        node("Expand", "ts", "e"),
        node("Transpose", "e", "y", perm=[0, 2, 1]),
    ]
    return counted(*nodes, weights={"width": np.array([HEADS * DIM])})


def summed() -> Form:
    """Positions are sums of ones."""
    nodes = [
        node("ConstantOfShape", ["count"], "c"),
        node("Add", ["c", "step"], "d"),
        node("Cast", "d", "e", to=INT64),
        node("CumSum", ["e", "start"], "p"),
        node("Gather", "tp", "w"),
        node("Add", "xw", "y"),
    ]
    whole = counted(*nodes, weights={"t": normal(90, HEADS * DIM)})
    (made,) = (each for each in whole.model.graph.node if each.op_type == "ConstantOfShape")
    value = onnx.numpy_helper.from_array(np.array([0], np.int64))
    made.attribute.append(helper.make_attribute("value", value))
    return whole


def masked(
    seen: Sequence[Any], refused: Sequence[str] = (), steps: str = "", padding: bool = False
) -> Form:
    """An attention with a mask ``m``, made by `seen` of rows ``r`` and columns ``p``."""
    shape = [1, HEADS, "S", DIM]
    nodes = [
        node("Shape", "q", ["count"], start=2, end=3),
        *POSITIONS,
        node("Unsqueeze", ["p", "one"], "r"),
        *seen,
    ]
    if steps:
        nodes += [
            node("Transpose", "k", "t", perm=[0, 1, 3, 2]),
            node("MatMul", "qt", "s"),
            *{
                "chosen": [node("Where", "msf", "w")],
                "added": [node("Where", "mgf", "b"), node("Add", "sb", "w")],
            }[steps],
            node("Softmax", "w", "a", axis=-1),
            node("IsNaN", "a", "i"),
            node("Where", "iga", "j"),
            node("MatMul", "jv", "o"),
        ]
    else:
        nodes.append(node("Attention", "qkvm", "o"))
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "start": np.int64(0),
        "step": np.int64(1),
        "three": np.int64(3),
        "f": np.float32(-np.inf),
        "g": np.float32(0),
    }
    inputs = {**dict.fromkeys("qkv", shape), **({"h": ([1, "S"], INT64)} if padding else {})}
    arrays = {name: normal(1, HEADS, TOKENS, DIM) for name in "qkv"}
    if padding:
        arrays["h"] = np.ones((1, TOKENS), np.int64)
    whole = graph(nodes, inputs, {"o": shape}, constants)
    return Form(whole, arrays, refused=refused)


CAUSAL = [node("LessOrEqual", "pr", "m")]
EVERY = [node("GreaterOrEqual", ["r", "start"], "c"), node("Or", "cc", "e"),
         node("Concat", ["count", "count"], "u", axis=0), node("Expand", "eu", "m")]  # fmt: skip
NEAR = [node("Sub", "rp", "c"), node("Abs", "c", "e"), node("LessOrEqual", ["e", "three"], "m")]
BEFORE = [node("Sub", "rp", "c"), node("Less", ["c", "three"], "e"),
          node("LessOrEqual", "pr", "l"), node("And", "el", "m")]  # fmt: skip
PADDED = [node("Cast", "h", "c", to=BOOL), node("LessOrEqual", "pr", "e"), node("And", "ce", "m")]

FORMS: dict[str, Callable[[], Form]] = {
    "positions": embedded,
    "a table of positions": buffered,
    "positions, each by an index": picked,
    "sums of ones": summed,
    "a shape of its own": expanded,
    "a mask of all": lambda: masked(EVERY),
    "a causal mask": lambda: masked(CAUSAL, refused=("ring",)),
    "a window": lambda: masked(NEAR, refused=("ring",)),
    "a window before": lambda: masked(BEFORE, refused=("ring",)),
    "padding": lambda: masked(PADDED, refused=("ring",), padding=True),
    "a mask of all, chosen": lambda: masked(EVERY, steps="chosen"),
    "a causal mask, added": lambda: masked(CAUSAL, refused=("ring",), steps="added"),
    "a window, added": lambda: masked(NEAR, refused=("ring",), steps="added"),
    "self attention": plain,
    "grouped": lambda: plain(kv_heads=6),
    "one kv head": lambda: plain(kv_heads=1),
    "value head dim": lambda: plain(v_dim=7),
    "grouped, value head dim": lambda: plain(kv_heads=6, v_dim=2),
    "scaled": lambda: plain(scale=1.5),
    "causal": lambda: plain(is_causal=1, refused=("ring",)),
    "causal, value head dim": lambda: plain(is_causal=1, v_dim=7, refused=("ring",)),
    "causal, grouped": lambda: plain(kv_heads=6, is_causal=1, refused=("ring",)),
    "cross": lambda: plain(cross=True),
    "cross, value head dim": lambda: plain(cross=True, v_dim=3),
    "cross, causal": lambda: plain(cross=True, is_causal=1, refused=("ring", "allgather")),
    "TensorRT's": lambda: plain(kind="TRT_Attention"),
    "TensorRT's, upper left": lambda: plain(
        kind="TRT_Attention", causal_kind="upper_left", refused=("ring",)
    ),
    "TensorRT's, lower right": lambda: plain(
        kind="TRT_Attention", causal_kind="lower_right", refused=("ring",)
    ),
    "TensorRT's, lower right, cross": lambda: plain(
        kind="TRT_Attention", causal_kind="lower_right", cross=True, refused=STRATEGIES
    ),
    "joined": joined,
    "joined, grouped": lambda: joined(kv_heads=6),
    "joined, cross": lambda: joined(cross=True),
    "joined, causal": lambda: joined(is_causal=1, refused=("ring",)),
    "joined, value head dim": lambda: joined(v_dim=5),
    "static": lambda: static(1, HEADS, TOKENS, DIM),
    "static, joined": lambda: static(1, TOKENS, HEADS * DIM, q_num_heads=HEADS, kv_num_heads=HEADS),
    "layers": layers,
    "layers, causal": lambda: layers(causal=True),
    "decoder": decoder,
    "context": context,
    "steps": steps,
    "steps, one kv head": lambda: steps(kv_heads=1),
    "shapes and rotation": reshaped,
    "linear": linear,
    "branches": branches,
    "function": function,
}


def compared(form: Form, strategy: str, ranks: int, folder: Path) -> Any:
    """Shard as the command does, or see the refusal; None then."""
    from mdattn_mpi.errors import RejectedError
    from mdattn_mpi.onnx.model import load_model
    from tests.support.sharded_model import Comparison

    path = folder / "whole.onnx"
    path.write_bytes(form.model.SerializeToString())
    model = load_model(path)
    if strategy in form.refused:
        with pytest.raises(RejectedError, match=r"causal|has a window"):
            Comparison(model, form.inputs, strategy, ranks)
        return None
    inputs = form.inputs
    if strategy == "ring":  # takes equal shards only
        inputs = equal(model, inputs, ranks)
    return Comparison(model, inputs, strategy, ranks)


def equal(model: Any, inputs: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Cut inputs so that ranks divide them."""
    lengths = (TOKENS, OTHERS)
    return {
        name: array[tuple(slice(n // ranks * ranks if n in lengths else n) for n in array.shape)]
        for name, array in inputs.items()
    }


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", FORMS)
def test_a_form(form: str, strategy: str, ranks: int, tmp_path: Path) -> None:
    made = FORMS[form]()
    comparison = compared(made, strategy, ranks, tmp_path)
    if comparison:
        comparison.check(made.keys)


@needs_tensorrt
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", [name for name, make in FORMS.items() if make().tensorrt])
def test_what_tensorrt_makes_of_a_form(form: str, strategy: str, tmp_path: Path) -> None:
    made = FORMS[form]()
    comparison = compared(made, strategy, 2, tmp_path)
    if comparison:
        comparison.check(made.keys, comparison.execute_network(library(), tmp_path))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", FORMS)
def test_onnx_runtime_on_a_form(form: str, strategy: str, tmp_path: Path) -> None:
    """The very file that TensorRT gets, on 3 ranks."""
    pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")
    made = FORMS[form]()
    comparison = compared(made, strategy, 3, tmp_path)
    if comparison:
        comparison.check(made.keys, comparison.execute_in_onnx_runtime)


@needs_tensorrt
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", [name for name, make in FORMS.items() if make().tensorrt])
def test_onnx_runtime_and_the_interpreter_agree(form: str, strategy: str, tmp_path: Path) -> None:
    """On all that comes out of 2 ranks, at every attention, filled up rows included."""
    pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")
    made = FORMS[form]()
    comparison = compared(made, strategy, 2, tmp_path)
    if not comparison:
        return
    interpreted = comparison.run(made.keys, comparison.execute_network(library(), tmp_path))
    executed = comparison.run(made.keys, comparison.execute_in_onnx_runtime)
    assert set(executed) == set(interpreted)
    for name, array in interpreted.items():
        size = max(1.0, np.abs(array).max(initial=0))
        assert np.abs(executed[name] - array).max(initial=0) < 1e-4 * size, name


def test_a_forgotten_exchange_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: so it does when ranks exchange nothing, and over even attention."""
    from tests.support import sharded_model

    form = plain()
    comparison = compared(form, "allgather", 2, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(sharded_model, "exchange", lambda ranks, x, kind: np.concatenate([x, x]))
        with pytest.raises(AssertionError, match="o: "):
            comparison.check()
    even = {name: array * (name == "v") for name, array in form.inputs.items()}
    even["v"] = np.ones_like(even["v"])
    with pytest.raises(AssertionError, match="alone"):
        sharded_model.Comparison(form.model, even, "allgather", 2).check()


@pytest.mark.parametrize("mask", ["none", "upper_left", "lower_right"])
@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
@pytest.mark.parametrize(("tokens", "ranks"), [(2, 3), (3, 4), (5, 4), (1, 2)])
def test_ranks_without_tokens(tokens: int, ranks: int, strategy: str, mask: str) -> None:
    """What fills up their shards must not count either."""
    from tests.support.sharded_model import Comparison

    form = plain(kind="TRT_Attention", causal_kind=mask)
    inputs = {name: array[:, :, :tokens] for name, array in form.inputs.items()}
    Comparison(form.model, inputs, strategy, ranks).check(control=False)


def test_a_softmax_over_weights_is_no_attention() -> None:
    """A mixture by a learned projection: every token for itself."""
    from tests.support.sharded_model import Comparison

    width = HEADS * DIM
    nodes = [
        node("MatMul", ["x", "w"], ["scores"]),
        node("Add", ["scores", "bias"], ["biased"]),
        node("Softmax", ["biased"], ["shares"], axis=-1),
        node("MatMul", ["shares", "experts"], ["y"]),
        node("Attention", "yyy", "o", q_num_heads=HEADS, kv_num_heads=HEADS),
    ]
    weights = {"w": normal(width, 5), "bias": normal(5), "experts": normal(5, width)}
    shape = [1, "S", width]
    whole = graph(nodes, {"x": shape}, {"o": shape}, weights)
    Comparison(whole, {"x": normal(1, TOKENS, width)}, "allgather", 3).check()
