"""Does every node of a model treat tokens alike?

A model may be cut into token shards when each of its nodes, attention apart, does the same to every
token and nothing across tokens. Each node that reads tokens is held against what its operator does
along their dim (`rules`), and values computed from the number of tokens are followed to where they
go (`counts`). What isn't known to be the same on a shard is refused.
"""

from __future__ import annotations

from typing import Any

from mdattn_mpi.onnx import counts, rules
from mdattn_mpi.onnx.model import ATTENTION, operator, reads, subgraphs
from mdattn_mpi.onnx.tokens import Tokens

_RANDOM = "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
RANDOM = frozenset(_RANDOM.split())


def check(tokens: Tokens) -> None:
    """Make sure that all nodes of a graph treat tokens alike."""
    for number, node in enumerate(tokens.graph.node):
        if any(name in tokens.counts or tokens.place(name) for name in reads(node)):
            _check_node(node, number, tokens)
        elif operator(node) in RANDOM:
            raise tokens.refuse(node, "draws random numbers, every rank its own")
        for name in filter(None, node.output):
            shape = tokens.shape(name)
            if shape is None or -1 in shape:  # any dim could be the tokens
                raise tokens.refuse(node, f"makes {name!r}, whose shape isn't known")
    for value in tokens.graph.output:
        if value.name in tokens.counts:
            raise tokens.refuse(None, f"gives {value.name!r}, computed from the number of tokens")


def _check_node(node: Any, number: int, tokens: Tokens) -> None:
    """Check a node that reads tokens or what depends on their number."""
    kind = operator(node)
    if kind in ATTENTION:
        rules.check_attention(node, tokens)
    elif kind == "If":
        _check_branches(node, number, tokens)
    elif not counts.follow(node, tokens):
        rules.check(node, tokens)


def _check_branches(node: Any, number: int, tokens: Tokens) -> None:
    """All branches must treat tokens alike, and give tokens at the same place."""
    condition = node.input[0]
    if condition in tokens.counts or tokens.place(condition):
        raise tokens.refuse(node, "decides by tokens or their number, which differ on a shard")
    traced = [subgraphs(graph.node[number]) for graph in tokens.inferred]
    for (_, graph), *inferred in zip(subgraphs(node), *traced, strict=True):
        branch = tokens.branch(graph, [each for _, each in inferred], node)
        check(branch)
        for name, value in zip(node.output, graph.output, strict=True):
            if branch.place(value.name) != tokens.place(name):
                raise tokens.refuse(node, f"gives {name!r} with tokens from one branch only")
