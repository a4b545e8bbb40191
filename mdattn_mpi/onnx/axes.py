"""Which dims of a model's inputs count tokens, and of which sequence.

The attentions say it: the last dim but one of what they take counts tokens. Symbols are carried
there by shape inference; a symbol that arrives is one that counts tokens. A model without symbols
is given some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isqrt
from typing import Any, NamedTuple

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.lengths import Lengths
from mdattn_mpi.onnx.model import Labels, graph_inputs, labels_of

PRIMES = [n for n in range(11, 300) if all(n % d for d in range(2, isqrt(n) + 1))]


class TokenDim(NamedTuple):
    """The dim of a tensor that counts tokens, and the sequence whose tokens they are."""

    sequence: str
    dim: int


def token_dims(
    model: Any, attentions: Sequence[Any], named: Mapping[str, int]
) -> dict[str, list[TokenDim]]:
    """Find the dims that count tokens in each input: as named, or as the attentions tell.

    Where dims are named, other inputs with the same symbol go with them.

    Raises
    ------
    RejectedError
        A name that is no input, a dim that it hasn't, or nothing to tell tokens by.

    """
    labels = {value.name: labels_of(value) for value in graph_inputs(model)}
    if named:
        found = _named(labels, named)
        arriving = _sequences(labels, _attention_dims(model, labels, attentions))
        found = {symbol: found.get(arriving.get(symbol, ""), to) for symbol, to in found.items()}
    else:
        labels, found = _found(model, labels, attentions)
    if not found:
        _refuse_inner_tokens(model, labels, attentions)
        raise RejectedError(
            "which dim counts tokens? "
            + "; ".join(f"{n} has {_show(d)}" for n, d in labels.items()),
            fix="name it for every input that has one: --shard INPUT:DIM",
        )
    return {
        name: [TokenDim(found[label], dim) for dim, label in enumerate(dims) if label in found]
        for name, dims in labels.items()
    }


def _refuse_inner_tokens(model: Any, labels: Labels, attentions: Sequence[Any]) -> None:
    """Refuse a model whose tokens are made inside, such as patches of an image."""
    lengths = {three[1] for three in _attention_dims(model, labels, attentions)}
    outside = {dim for dims in labels.values() for dim in dims}
    if lengths and outside.isdisjoint(lengths) and all(isinstance(n, int) for n in lengths):
        given = ", ".join(f"{name} {_show(dims)}" for name, dims in labels.items())
        counts = ", ".join(map(str, sorted(n for n in lengths if isinstance(n, int))))
        raise RejectedError(
            f"its attentions are over {counts} tokens, which "
            f"the model makes itself of {given}: no dim of an input counts them",
            fix="export what follows them, with the tokens as an input of dynamic length",
        )


def _show(dims: Sequence[str | int]) -> str:
    return f"[{', '.join(map(str, dims))}]"


def _named(labels: Labels, named: Mapping[str, int]) -> dict[str | int, str]:
    """Give every named dim a symbol; return the sequences of the symbols that are named."""
    found: dict[str | int, str] = {}
    for name, axis in named.items():
        dims = labels.get(name, [])
        if not -len(dims) <= axis < len(dims):
            known = ", ".join(f"{known} with {len(dims)} dims" for known, dims in labels.items())
            raise RejectedError(f"no dim {axis} of an input {name!r}", fix=f"there are {known}")
        if isinstance(dims[axis], int):
            dims[axis] = f"{dims[axis]}_tokens"
        nameless = dims[axis] == f"{name}_dim{axis % len(dims)}"
        found[dims[axis]] = "tokens" if nameless else str(dims[axis])
    return found


def _found(
    model: Any, labels: Labels, attentions: Sequence[Any]
) -> tuple[Labels, dict[str | int, str]]:
    """Follow symbols to the attentions: the model's own; else lengths; else a symbol a dim."""
    arriving = _attention_dims(model, labels, attentions)
    if found := _sequences(labels, arriving):
        return labels, found
    by_length = _with_symbols(labels, lambda name, dim, length: f"{length}_tokens")
    counts = [[dim if dim == 1 else f"{dim}_tokens" for dim in three] for three in arriving]
    found = _sequences(by_length, counts)  # where one token arrives, a batch of 1 isn't meant
    if not found or any(sum(dim in found for dim in dims) > 1 for dims in by_length.values()):
        by_dim = _with_symbols(labels, lambda name, dim, length: f"{name}_dim{dim}")
        if apart := _sequences(by_dim, _attention_dims(model, by_dim, attentions)):
            fixed = {  # dims of one length count the same tokens
                by_dim[name][dim]: f"{length}_tokens"
                for name, dims in labels.items()
                for dim, length in enumerate(dims)
                if isinstance(length, int)
            }
            return by_dim, {symbol: fixed.get(symbol, name) for symbol, name in apart.items()}
    if found:
        return by_length, found
    symbols = {label for dims in labels.values() for label in dims if isinstance(label, str)}
    return labels, {symbol: symbol for symbol in symbols if len(symbols) == 1}


def _with_symbols(labels: Labels, symbol: Callable[[str, int, int], str]) -> Labels:
    """Give dims of a fixed length a symbol."""
    return {
        name: [symbol(name, n, dim) if isinstance(dim, int) else dim for n, dim in enumerate(dims)]
        for name, dims in labels.items()
    }


def _attention_dims(
    model: Any, labels: Labels, attentions: Sequence[Any]
) -> list[list[str | int | None]]:
    """Return what counts the tokens of queries, keys and values of each attention.

    The label of an input's dim, a length, or None where inference doesn't carry it so far.
    """
    fixed = {dim for dims in labels.values() for dim in dims if isinstance(dim, int)}
    symbols = dict.fromkeys(dim for dims in labels.values() for dim in dims if isinstance(dim, str))
    spare = (prime for prime in PRIMES if prime not in fixed)
    numbers = dict(zip(symbols, spare, strict=False))
    back: dict[int, str | int | None] = {number: symbol for symbol, number in numbers.items()}
    dims = {
        name: [numbers[dim] if isinstance(dim, str) else dim for dim in each]
        for name, each in labels.items()
    }
    shapes = Lengths(model, dims).shapes
    found = [[shapes.get(tensor, ()) for tensor in node.input[:3]] for node in attentions]
    return [
        [back.get(dims[-2], dims[-2]) if len(dims) > 2 else None for dims in three]
        for three in found
    ]


def at_lengths(
    model: Any,
    places: Mapping[str, Sequence[TokenDim]],
    lengths: Mapping[str, int],
    others: Sequence[int] = (1,),
) -> dict[str, list[int]]:
    """Return the dims of all inputs at some lengths of the sequences.

    Other symbols count 1, as in an engine that is built of the model; or each one of `others`.
    """
    symbols: dict[str, int] = {}
    found = {}
    for value in graph_inputs(model):
        tokens = {place.dim: lengths[place.sequence] for place in places.get(value.name, ())}
        found[value.name] = [
            tokens[number]
            if number in tokens
            else symbols.setdefault(dim, others[len(symbols) % len(others)])
            if isinstance(dim, str)
            else dim
            for number, dim in enumerate(labels_of(value))
        ]
    return found


def _sequences(
    labels: Labels, token_dims: Iterable[Sequence[str | int | None]]
) -> dict[str | int, str]:
    """Return the sequence of each symbol that counts tokens; keys and values are of one."""
    known = {label for dims in labels.values() for label in dims if isinstance(label, str)}
    found: dict[str | int, str] = {}
    for three in token_dims:
        query, key, value = (dim if dim in known else None for dim in three)
        for symbol, like in ((query, query), (key, key), (value, key or value)):
            if symbol is not None:
                found.setdefault(symbol, found.get(like or symbol, str(like)))
    return found
