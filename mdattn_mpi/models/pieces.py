"""What works token by token, done in pieces of tokens, for it is wide inside.

An MLP holds two or three arrays of its inner width at a time, several times the hidden states; a
norm some in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAMES = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "norm")  # ends of modules' names
METHOD = "feed_forward_chunk"  # of a layer, in the family of BERT
PIECE = 8192  # tokens


class Pieces:
    """The MLPs and norms of a model; they take `tokens` at a time, 0 stands for all."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens = PIECE
        for owner, name in _token_by_token(model):
            setattr(owner, name, self._in_pieces(getattr(owner, name)))

    def _in_pieces(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(whole)  # Transformers looks at its signature
        def in_pieces(hidden: torch.Tensor, *rest: Any, **more: Any) -> Any:
            tokens = hidden.shape[1] if hidden.ndim == 3 else 0
            if rest or more or not 0 < self.tokens < tokens:
                return whole(hidden, *rest, **more)
            return _joined([whole(piece) for piece in hidden.split(self.tokens, dim=1)])

        return in_pieces


def _token_by_token(model: torch.nn.Module) -> Iterator[tuple[Any, str]]:
    for name, module in model.named_modules():
        if name.endswith(NAMES):
            yield module, "forward"
        elif hasattr(module, METHOD):
            yield module, METHOD


def _joined(parts: list[Any]) -> Any:
    """Join outputs ``[1, tokens, …]``; a router's beside them are ``[tokens, …]``."""
    import torch

    if isinstance(parts[0], tuple):
        return tuple(map(_joined, map(list, zip(*parts, strict=True))))
    return torch.cat(parts, dim=1 if parts[0].ndim == 3 else 0)
