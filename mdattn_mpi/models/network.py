"""A loaded model, ready to run on some of a sequence's tokens: whichever ranks it is shared by."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.models.attention import Attending, attending
from mdattn_mpi.models.head import Head
from mdattn_mpi.models.pieces import Pieces
from mdattn_mpi.models.sequence import Ids, TokenSequence, numbering_of

if TYPE_CHECKING:
    import torch

# Positions whose meaning depends on the longest sequence that the model has seen before.
HISTORY = ("dynamic", "longrope")


class Network:
    """A model of Transformers, its attention left to whoever is `attending`.

    Parameters
    ----------
    model
        As `load.load` gives it: with a head, if log-probabilities are wanted.

    Attributes
    ----------
    backbone
        What makes hidden states of ids.
    head
        What makes logits of hidden states; None without one.
    causal
        Whether no layer sees later tokens.
    width, vocabulary
        ``D`` of the hidden states; how many ids there are.
    longest
        Tokens that it has positions for; ``table`` says whether there are no more, whatever one
        would like: they are looked up in a table.
    pieces
        How many tokens its MLPs take at a time.

    Raises
    ------
    RejectedError
        It can't be told its positions, has an encoder and a decoder, or numbers positions by what
        it has seen before.

    """

    def __init__(self, model: torch.nn.Module) -> None:
        anything: Any = model
        config = anything.config.get_text_config()
        self.name = type(model).__name__
        self._check(config)
        config.use_cache = False
        has_head = anything.get_output_embeddings() is not None
        self.head = Head(anything) if has_head else None
        self.backbone: Any = anything.base_model
        self._check_positions()
        self.config: Mapping[str, Any] = config.to_dict()
        self.pieces = Pieces(self.backbone)
        dropping = any(getattr(m, "token_dropout", False) for m in self.backbone.modules())  # ESM
        self._counted = self.config.get("mask_token_id") if dropping else None
        self.numbering = numbering_of(self.backbone)
        flags = [m.is_causal for m in self.backbone.modules() if hasattr(m, "is_causal")]
        self.causal = bool(flags) and all(flags)
        self.width = int(config.hidden_size)
        self.vocabulary = int(anything.get_input_embeddings().num_embeddings)
        self.table = _positions_table(self.backbone)
        self.longest = int(getattr(config, "max_position_embeddings", 0) or 0)
        if self.table:
            held = self.table - self.numbering.first
            self.longest = min(held, self.longest or held)

    def check_length(self, tokens: int, beyond: bool) -> None:
        """Refuse a sequence that is longer than the model's positions.

        Positions that are computed have no end: `beyond` takes them on purpose.

        Raises
        ------
        RejectedError
            It is too long.

        """
        if not self.longest or tokens <= self.longest or (beyond and not self.table):
            return
        raise RejectedError(
            f"{tokens} tokens; {self.name} has positions for {self.longest}",
            fix="split it into shorter items"
            if self.table
            else "cut it, or go beyond what the model was trained for: --beyond-positions",
        )

    def fault_of(self, ids: NDArray[Any]) -> tuple[str, str] | None:
        """Look for ids that can't be: beyond the vocabulary, or counted over the whole sequence.

        Returns what is wrong with the first one, and the fix.
        """
        wrong = (ids < 0) | (ids >= self.vocabulary)
        why = f"the model's vocabulary has ids from 0 to {self.vocabulary - 1}"
        fix = "use the tokenizer of this model: mdattn convert … --tokenizer DIR"
        if not wrong.any() and self._counted is not None:
            wrong = ids == self._counted
            why = "the mask, by whose share in the whole sequence the model scales all tokens"
            fix = "leave masks out, or set token_dropout to false in the model's config"
        if not wrong.any():
            return None
        at = int(np.argmax(wrong))
        return f"input_ids[{at}] is {ids[at]}: {why}", fix

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        found: torch.device = next(self.backbone.parameters()).device
        return found

    @property
    def dtype(self) -> str:
        """Of its hidden states, by NumPy's name."""
        return str(next(self.backbone.parameters()).dtype).rpartition(".")[2]

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        tensors = {t.data_ptr(): t.nbytes for t in self.backbone.parameters()}
        return sum(tensors.values())

    def run(self, sequence: TokenSequence, by: Attending) -> torch.Tensor:
        """Collective, if `by` is. Return hidden states ``[own, D]`` of the rank's own tokens.

        A rank without tokens takes part with one of no meaning.
        """
        own = len(sequence.places)
        ids = sequence.ids[sequence.places] if own else sequence.ids[:1]
        positions = sequence.positions(self.numbering) if own else np.zeros(1, np.int64)
        return self._forward(by, input_ids=ids, position_ids=positions)[:own]

    def run_as_it_is(self, ids: Ids, by: Attending) -> torch.Tensor:
        """Return hidden states ``[S, D]`` of a whole sequence, at positions of the model's own."""
        return self._forward(by, input_ids=ids)

    def release(self) -> None:
        """Give back what PyTorch keeps of the GPU's memory for itself."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _forward(self, by: Attending, **inputs: Ids) -> torch.Tensor:
        import torch

        given = {
            name: torch.from_numpy(np.ascontiguousarray(array)).to(self.device)[None]
            for name, array in inputs.items()
        }
        with attending(by), torch.no_grad():
            hidden: torch.Tensor = self.backbone(**given)[0][0]
        return hidden

    def _check(self, config: Any) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise RejectedError(
                f"{self.name} has an encoder and a decoder",
                fix="use a model of one stack of layers",
            )
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        kinds = _rope_kinds(rope or {})
        history = next((kind for kind in kinds if kind in HISTORY), None)
        if history:
            raise RejectedError(
                f"{self.name} has {history} rotary positions: what a token's position means "
                "depends on the longest sequence before it",
                fix="set rope_type to yarn, linear or default in its config, as it was trained",
            )

    def _check_positions(self) -> None:
        if "position_ids" not in inspect.signature(self.backbone.forward).parameters:
            raise RejectedError(
                f"{type(self.backbone).__name__} takes no position_ids: it numbers tokens by "
                "itself, and a rank's tokens don't begin at 0",
                fix="use a model that takes position_ids",
            )


def _rope_kinds(rope: Mapping[str, Any]) -> list[str]:
    """Name the kinds of rotary positions: of all layers, or of each kind of layer."""
    nested = [_rope_kinds(value) for value in rope.values() if isinstance(value, Mapping)]
    own = rope.get("rope_type", rope.get("type"))
    return [*([str(own)] if own else []), *(kind for kinds in nested for kind in kinds)]


def _positions_table(backbone: Any) -> int:
    """How many positions a model looks up in a table; 0 where it computes them."""
    for name, module in backbone.named_modules():
        rows = getattr(module, "num_embeddings", 0)
        if rows and name.rpartition(".")[2] in ("position_embeddings", "wpe", "embed_positions"):
            return int(rows)
    return 0
