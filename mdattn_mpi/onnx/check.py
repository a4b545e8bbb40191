"""Does every node of a model treat tokens alike?

A model may be cut into token shards when each of its nodes, attention apart, does the same to every
token and nothing across tokens. Each node that reads tokens is held against what its operator does
along their dim (`rules`), and values computed from the number of tokens are followed to where they
go (`counts`). What isn't known to be the same on a shard is refused.
"""

from __future__ import annotations

from typing import Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx import counts, rules
from mdattn_mpi.onnx.faults import Faults
from mdattn_mpi.onnx.model import ATTENTION, RANDOM, operator, reads, subgraphs
from mdattn_mpi.onnx.tokens import Tokens


def check(tokens: Tokens, faults: Faults) -> None:
    """Note every node of a graph that doesn't treat tokens alike.

    What comes after a node at fault isn't looked at.
    """
    for node in tokens.graph.node:
        if faults.tensors.intersection((*reads(node), *node.output)):
            faults.tensors.update(node.output)
            continue
        try:
            _check_one(node, tokens)
        except RejectedError as error:
            faults.add(error, node.output)
    for value in tokens.graph.output:
        if value.name in tokens.counts:
            why = f"gives {value.name!r}, computed from the number of tokens"
            faults.add(tokens.refuse(None, why))


def _check_one(node: Any, tokens: Tokens) -> None:
    outputs = [name for name in node.output if name]
    for why in filter(None, map(tokens.failure, outputs)):
        raise tokens.refuse(
            node,
            f"doesn't take every number of tokens: {why}",
            "export the model with a dynamic number of tokens; or name the dim of every input that "
            "counts them: --shard INPUT:DIM",
        )
    if any(name in tokens.counts or tokens.place(name) for name in reads(node)):
        _check_node(node, tokens)
    elif operator(node) in RANDOM:
        raise tokens.refuse(node, "draws random numbers, every rank its own")
    for name in outputs:
        if tokens.shape(name) is None:  # any dim could be the tokens
            raise tokens.refuse(node, f"makes {name!r}, whose shape isn't known")


def _check_node(node: Any, tokens: Tokens) -> None:
    """Check a node that reads tokens or what depends on their number."""
    kind = operator(node)
    if kind in ATTENTION:
        rules.check_attention(node, tokens)
    elif kind == "If":
        _check_branches(node, tokens)
    elif not counts.follow(node, tokens):
        rules.check(node, tokens)


def _check_branches(node: Any, tokens: Tokens) -> None:
    """All branches must treat tokens alike, and give tokens at the same place."""
    condition = node.input[0]
    if condition in tokens.counts or tokens.place(condition):
        raise tokens.refuse(node, "decides by tokens or their number, which differ on a shard")
    for attribute, graph in subgraphs(node):
        branch = tokens.branch(graph, attribute, node)
        inner = Faults()
        check(branch, inner)
        inner.end()
        for name, value in zip(node.output, graph.output, strict=True):
            if branch.place(value.name) != tokens.place(name):
                raise tokens.refuse(node, f"gives {name!r} with tokens from one branch only")
