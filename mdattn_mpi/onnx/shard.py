"""Share an ONNX model by tokens: mark its attentions, or put collectives around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.axes import TokenDim, token_dims
from mdattn_mpi.onnx.cast import cast_products, types_of
from mdattn_mpi.onnx.check import check
from mdattn_mpi.onnx.contrib.rewrite import write_out
from mdattn_mpi.onnx.faults import Faults
from mdattn_mpi.onnx.graph import prune
from mdattn_mpi.onnx.model import (
    ATTENTION,
    STANDARD,
    all_nodes,
    copied,
    graph_inputs,
    import_onnx,
    name_of,
    operator,
    reads,
)
from mdattn_mpi.onnx.patterns import fuse_patterns, unknown_attentions
from mdattn_mpi.onnx.positions import count_all_tokens
from mdattn_mpi.onnx.sharding import POSITIONS, Sharding, write_sharding
from mdattn_mpi.onnx.simplify import simplify
from mdattn_mpi.onnx.site import Site, mask_of
from mdattn_mpi.onnx.tokens import Tokens, trace_tokens
from mdattn_mpi.problem import DTypeName, StrategyName

OLDEST = 13  # the opset since which Softmax, Slice and Reshape are as they are used here
ALIKE = 17  # what opsets from there on up to this one share means the same in it

Places = Mapping[str, Sequence[TokenDim]]


def shard_model(
    model: Any,
    strategy: StrategyName,
    ranks: int,
    named_axes: Mapping[str, int],
    dtype: DTypeName | None = None,
) -> tuple[Any, list[str]]:
    """Make a model that `ranks` ranks run together, each on its own tokens.

    Parameters
    ----------
    model
        As `model.load_model` reads it; it is left as it is.
    strategy, ranks
        How to share.
    named_axes
        The dim that counts tokens, by input; empty to find it.
    dtype
        Of products, attentions and their weights that are in float32; None leaves them so.

    Returns
    -------
    The sharded model, and what was done, a line an attention.

    Raises
    ------
    RejectedError
        No attention, one that can't be shared this way, or a node that mixes tokens.

    """
    if ranks > 1:
        sharded, tokens, _, done, paddings = prepare(copied(model), named_axes, dtype)
        done += _share(sharded, tokens, strategy, ranks)
    else:
        _check_opset(model)
        sharded, paddings = copied(model), {}
        attentions = _attentions(sharded)
        tokens = _trace(sharded, token_dims(sharded, attentions, named_axes))
        done = ["one rank has all tokens; the model is left as it is"]
    places = outer_places(sharded, tokens)
    _free_token_dims(sharded, places)
    axes = {name: place.dim for name, place in places.items()}
    sharding = Sharding(strategy, ranks, axes, paddings)
    for value in graph_inputs(model):
        if sharding.given_by_rank(value.name):
            raise RejectedError(
                f"the input {value.name!r} would be taken for one that sharding adds",
                fix="rename it",
            )
    write_sharding(sharded, sharding)
    return sharded, done


def end_at(model: Any, names: Sequence[str]) -> None:
    """Make some tensors the outputs of a model, in place, and drop what only others needed.

    Raises
    ------
    RejectedError
        There is no such tensor.

    """
    known = {value.name: value for value in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name]
    if missing := next((name for name in names if name not in made), None):
        raise RejectedError(
            f"--until {missing!r}: no node of the model makes such a tensor",
            fix=f"name another, for example {made[-1]!r}",
        )
    types, make = types_of(model), import_onnx().helper.make_tensor_value_info
    outputs = [known.get(name) or make(name, types.get(name, 0), None) for name in names]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    prune(model.graph)


class Prepared(NamedTuple):
    """A model whose every node but attention treats tokens alike.

    Masks are attributes of the attentions, positions an input; nothing is shared yet.
    """

    model: Any
    tokens: Tokens
    places: Places  # of its inputs
    done: list[str]  # in words
    paddings: dict[str, int]  # the id that an input must not hold


def prepare(model: Any, named_axes: Mapping[str, int], dtype: DTypeName | None = None) -> Prepared:
    """Rewrite a model in place, so that it can be cut into token shards.

    See `shard_model` for the arguments.

    Raises
    ------
    RejectedError
        It can't be: with all reasons, a node each.

    """
    _raise_opset(model)
    done = write_out(model) + fuse_patterns(model)
    attentions, unknown = _attentions(model), unknown_attentions(model)
    faults = Faults()
    if not attentions:
        for each in unknown:
            faults.add(each.error)
        faults.end()
        raise RejectedError(
            "the model has no attention: no node Attention, TRT_Attention, MultiHeadAttention "
            "or GroupQueryAttention, and no MatMul–Softmax–MatMul",
            fix="export it with scaled dot-product attention (opset 23 has the operator); a model "
            "without any stays whole: -n 1",
        )
    places: Places = token_dims(model, attentions, named_axes)
    counted, paddings = count_all_tokens(model, places)
    done += counted
    told, added = simplify(model, places, faults)
    done += told
    places = {name: each for name, each in {**places, **added}.items() if each}
    if dtype:
        done.append(f"{cast_products(model, dtype)} nodes in {dtype}, the rest in float32")
    tokens = _trace(model, places)
    for each in unknown:
        if not all(map(tokens.follows, each.products)):
            faults.add(each.error, each.products)
    check(tokens, faults)
    faults.end(_end_before(tokens, faults))
    return Prepared(model, tokens, places, done, paddings)


def _end_before(tokens: Tokens, faults: Faults) -> str:
    """Say where to end a model whose faults all come after its last attention; else nothing."""
    attentions = [node for node in tokens.graph.node if operator(node) in ATTENTION]
    if any(faults.tensors.intersection((*node.input, *node.output)) for node in attentions):
        return ""
    after = {name for node in attentions for name in node.output}
    found = ""
    for node in tokens.graph.node:
        if after.intersection(reads(node)) and faults.tensors.isdisjoint(node.output):
            after.update(node.output)
            found = node.output[0] if tokens.place(node.output[0]) else found
    return f"end the model before it: mdattn shard … --until {found!r}" if found else ""


def outer_places(model: Any, tokens: Tokens) -> dict[str, TokenDim]:
    """Return where the tokens are in the inputs and outputs that are the model's own."""
    return {
        value.name: place
        for value in (*graph_inputs(model), *model.graph.output)
        if not value.name.startswith(POSITIONS) and (place := tokens.place(value.name))
    }


def _attentions(model: Any) -> list[Any]:
    """List the attentions of a model, each with a name of its own."""
    found = [node for node in model.graph.node if operator(node) in ATTENTION]
    _name_apart(model, found)
    return found


def _raise_opset(model: Any) -> None:
    """Let a model have the operators that are written into it: CastLike, LayerNormalization.

    ONNX Runtime's optimizer puts LayerNormalization into older opsets as well.
    """
    _check_opset(model)
    for each in model.opset_import:
        if each.domain in STANDARD:
            each.version = max(each.version, ALIKE)


def _check_opset(model: Any) -> None:
    opset = next((each.version for each in model.opset_import if each.domain in STANDARD), 0)
    if opset < OLDEST:
        raise RejectedError(
            f"the model uses opset {opset}; {OLDEST} is needed",
            fix=f"export it again, with opset {ALIKE} or later",
        )


def _name_apart(model: Any, attentions: Sequence[Any]) -> None:
    """Give attentions that share a name, or have none, that of their output."""
    names = [node.name for node in all_nodes(model.graph)]
    for node in attentions:
        if not node.name or names.count(node.name) > 1:
            node.name = node.output[0]


def _trace(model: Any, places: Places) -> Tokens:
    """Find the tokens; where sequences can only be of one length, they are one."""
    tokens = trace_tokens(model, places)
    several = len({place.sequence for each in places.values() for place in each}) > 1
    if several and any(tokens.failure(name) for node in model.graph.node for name in node.output):
        one = {name: [TokenDim("tokens", p.dim) for p in each] for name, each in places.items()}
        return trace_tokens(model, one)
    return tokens


def _share(model: Any, tokens: Tokens, strategy: StrategyName, ranks: int) -> list[str]:
    """Rewrite every attention whose keys are cut into shards; the others see all they need."""
    nodes: list[Any] = []
    done: list[str] = []
    numbers: dict[str, None] = {}
    attentions = [node for node in model.graph.node if operator(node) in ATTENTION]
    keys = {node.output[0]: tokens.place(node.input[1]) for node in attentions}
    # dim 0 is the batch: each token has keys of its own
    sequences = {output: place.sequence for output, place in keys.items() if place and place.dim}
    if not sequences:
        raise RejectedError(
            "no attention of this model has keys that are cut into token shards",
            fix="name the inputs that are: --shard INPUT:DIM",
        )
    several = len(set(sequences.values())) > 1
    for node in model.graph.node:
        sequence = sequences.get(node.output[0])
        if sequence is None:
            nodes.append(node)
            if node.output[0] in keys and tokens.place(node.input[0]):
                done.append(_left_alone(node, tokens))
            continue
        site = Site(node, tokens, ranks, f"_{sequence}" if several else "")
        done.append(site.share(strategy))
        nodes += [*site.before, node, *site.after]
        model.graph.initializer.extend(site.constants)
        numbers.update(dict.fromkeys(site.numbers))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _add_inputs(model, list(numbers))
    return done


def _left_alone(node: Any, tokens: Tokens) -> str:
    """Say why an attention is left as it is; refuse one that counts queries from the first."""
    if tokens.place(node.input[1]):
        return f"{name_of(node)}: the tokens are its batch; left as it is"
    mask = mask_of(node)
    if mask != "none":
        raise tokens.refuse(
            node,
            f"is causal ({mask}) over keys that no rank cuts, and every rank would count its "
            "queries from 0",
            fix=_cut_keys_too(node, tokens) if mask == "upper_left" else "use -n 1",
        )
    return f"{name_of(node)}: every rank has all of its keys; left as it is"


def _cut_keys_too(node: Any, tokens: Tokens) -> str:
    """Say how to cut the keys and values of an attention that are inputs of the model."""
    inputs = [value.name for value in tokens.graph.input]
    if not set(node.input[1:3]) <= set(inputs):
        return "use -n 1"
    places = {name: place.dim for name in inputs if (place := tokens.place(name))}
    places |= {name: len(tokens.shape(name) or ()) - 2 for name in node.input[1:3]}
    named = " ".join(f"--shard {name}:{dim}" for name, dim in places.items())
    return f"cut the keys too: -s ulysses {named}; or use -n 1"


def _add_inputs(model: Any, names: Sequence[str]) -> None:
    """Add inputs of one number each, and of positions."""
    onnx = import_onnx()
    inputs = {value.name for value in model.graph.input}
    for name in names:
        positions = name.startswith(POSITIONS)
        if name in inputs and not positions:
            raise RejectedError(f"the model has an input {name!r} already", fix="rename it")
        if name not in inputs:
            shape = ["tokens"] if positions else [1]
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, shape)
            model.graph.input.append(value)


def _free_token_dims(model: Any, places: Mapping[str, TokenDim]) -> None:
    """Let the token dims of inputs and outputs be any; shapes in between are TensorRT's job."""
    del model.graph.value_info[:]
    several = len({place.sequence for place in places.values()}) > 1
    for value in (*graph_inputs(model), *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        place = places.get(value.name)
        if place and place.dim < len(dims):
            dims[place.dim].dim_param = place.sequence if several else "tokens"
