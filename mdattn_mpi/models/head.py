"""A causal language model taken apart: what makes hidden states, and what makes logits of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from mdattn_mpi.errors import RejectedError

if TYPE_CHECKING:
    import torch


class _Given:
    """Stands where a model's backbone stood, and returns hidden states that are there already."""

    def __init__(self) -> None:
        self.hidden: Any = None

    def __call__(self, *args: Any, **options: Any) -> _Output:
        return _Output(self.hidden)


class _Output:
    """What a backbone returns; of all that can be asked for beside hidden states there is none."""

    def __init__(self, hidden: Any) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Any:
        if index:
            raise IndexError(index)
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class Head:
    """The model's own way from hidden states to logits: scales, caps and all.

    A copy of the model runs whose backbone is a stand-in; weights are shared.
    """

    def __init__(self, model: Any) -> None:
        prefix = model.base_model_prefix
        if prefix not in model._modules:
            raise RejectedError(
                f"{type(model).__name__} isn't a backbone and a head on it",
                fix="use another model, or ask for no logprobs",
            )
        self._given = _Given()
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, prefix: self._given}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Make logits ``[T, V]`` of hidden states ``[T, D]``."""
        import torch

        self._given.hidden = hidden[None]
        ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        with torch.no_grad():
            logits: torch.Tensor = self._model(input_ids=ids).logits[0]
        self._given.hidden = None
        return logits
