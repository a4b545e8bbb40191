"""How large a model is: what a sequence of so many tokens takes of each rank, seconds and bytes.

Known before anything is loaded, from config and weights' shapes, so that ranks can be cut into
groups; rough, as `mdattn_mpi.estimate` is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from mdattn_mpi.costs import Costs
from mdattn_mpi.estimate import Estimate, beside_files, contenders, estimate
from mdattn_mpi.models.folder import ModelFolder, Weight
from mdattn_mpi.models.outputs import LOGIT_BYTES, given_tensors
from mdattn_mpi.models.pieces import PIECE
from mdattn_mpi.problem import AttentionProblem, DTypeName, ModelProblem
from mdattn_mpi.text import memory_size

if TYPE_CHECKING:
    from mdattn_mpi.models.network import Network

EMBEDDINGS = ("embed", "wte", "wpe", "lm_head", "decoder")  # in names of weights that are looked up
ID_BYTES = 4  # of a token id in a file, mostly
INNER = 6  # bytes a number of an MLP's inner width takes: gate, up and their product


class Shape(NamedTuple):
    """What all layers have in common, as far as a config says it, whose names differ by family."""

    layers: int
    width: int
    inner: int
    q_heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> Shape:
        """Read a config."""
        nested = config.get("text_config")
        config = nested if isinstance(nested, Mapping) else config
        width = _number(config, "hidden_size", "n_embd", "d_model", "dim")
        heads = _number(config, "num_attention_heads", "n_head", "n_heads") or 1
        return Shape(
            layers=_number(config, "num_hidden_layers", "n_layer", "n_layers") or 1,
            width=width,
            inner=_number(config, "intermediate_size", "n_inner", "d_ff") or 4 * width,
            q_heads=heads,
            kv_heads=_number(config, "num_key_value_heads") or heads,
            head_dim=_number(config, "head_dim") or max(1, width // heads),
        )

    @property
    def row(self) -> int:
        """Numbers of one token's query, key and value."""
        return self.head_dim * (self.q_heads + 2 * self.kv_heads)

    def activations(self, own: int) -> int:
        """Estimate bytes beside weights and attention, of a rank with so many tokens.

        Most are held where queries are rotated: the layer's input and what its norm made of it, the
        queries, and some 3.5 times as much on the way; keys and values are fewer.
        """
        rotating = 2 * self.width + self.head_dim * int(4.5 * self.q_heads + 2 * self.kv_heads)
        return 2 * own * rotating + min(own, PIECE) * self.inner * INNER


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model that is run in 16 bits.

    ``logits`` says whether log-probabilities are wanted.
    """

    folder: ModelFolder
    dtype: DTypeName
    causal: bool
    logits: bool

    @cached_property
    def shape(self) -> Shape:
        """Read the folder's config."""
        return Shape.of(self.folder.config)

    @cached_property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with: of a mixture's experts those used."""
        config = self.folder.config
        experts = _number(config, "num_local_experts", "num_experts")
        used = _number(config, "num_experts_per_tok") or 1
        share = used / experts if experts else 1.0
        return int(
            sum(
                weight.count * (share if len(weight.shape) > 2 or ".experts." in weight.name else 1)
                for weight in self.folder.weights
                if len(weight.shape) > 1 and (self.logits or not _looked_up(weight))
            )
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return 2 * self.folder.parameters

    def attention(self, tokens: int) -> AttentionProblem:
        """Say what one layer's attention computes, its window left out."""
        shape = self.shape
        return AttentionProblem(
            tokens,
            tokens,
            shape.q_heads,
            shape.kv_heads,
            shape.head_dim,
            shape.head_dim,
            self.dtype,
            "upper_left" if self.causal else "none",
        )

    def flops(self, tokens: int) -> int:
        """Floating-point operations over a sequence; a multiply-add is two."""
        return 2 * self.multiplied * tokens + self.shape.layers * self.attention(tokens).flops

    def seconds(self, problem: ModelProblem, ranks: int, costs: Costs) -> float:
        """Estimate how long a group takes for a sequence."""
        tokens = problem.tokens
        dense = 2 * self.multiplied * tokens / ranks / (costs.dense or costs.flops)
        attention = min(each.seconds for each in self._attentions(tokens, ranks, costs))
        computing = dense + self.shape.layers * attention
        return costs.item + beside_files(computing, *self.files(problem), ranks, costs)

    def memory(self, problem: ModelProblem, ranks: int, costs: Costs) -> int:
        """Estimate the bytes that a sequence takes of each rank, weights and all."""
        tokens = problem.tokens
        attention = min(each.memory for each in self._attentions(tokens, ranks, costs))
        shards = 2 * -(-tokens // ranks) * self.shape.row  # counted in both
        return self.nbytes + self.activations(tokens, ranks) + attention - shards

    def activations(self, tokens: int, ranks: int) -> int:
        """Estimate bytes beside weights and attention, of each rank."""
        return self.shape.activations(-(-tokens // ranks)) + 2 * LOGIT_BYTES * self.logits

    def files(self, problem: ModelProblem) -> tuple[int, int]:
        """Bytes that a sequence is read from, and that are written of it."""
        return ID_BYTES * problem.tokens, sum(tensor.nbytes for tensor in problem.outputs)

    def problem_of(
        self, network: Network, give: Sequence[str], beyond: bool
    ) -> Callable[[int, int], ModelProblem]:
        """Return what makes a problem of so many tokens and documents.

        It raises `RejectedError` where the model has no positions for them; see `check_length`.
        """

        def problem(tokens: int, documents: int) -> ModelProblem:
            network.check_length(tokens, beyond)
            outputs = given_tensors(give, tokens, documents, network.width, network.dtype)
            return ModelProblem(tokens, outputs, self.flops(tokens))

        return problem

    def _attentions(self, tokens: int, ranks: int, costs: Costs) -> list[Estimate]:
        problem = self.attention(tokens)
        return [
            estimate(problem, ranks, name, costs, batch=False)
            for name in contenders(problem, ranks, costs)
        ]

    def describe(self, problem: ModelProblem, ranks: int, costs: Costs) -> str:
        """Say what the memory of a rank is taken by."""
        total = self.memory(problem, ranks, costs)
        activations = self.activations(problem.tokens, ranks)
        rest = total - self.nbytes - activations
        whole, weights, inside, attention = map(
            memory_size, (total, self.nbytes, activations, rest)
        )
        return (
            f"memory: {whole} a rank (weights {weights}, activations {inside}, attention "
            f"{attention})"
        )


def _number(config: Mapping[str, Any], *names: str) -> int:
    """Return the first of `names` that is a number; 0 if none is."""
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)


def _looked_up(weight: Weight) -> bool:
    return any(part in weight.name for part in EMBEDDINGS)
