"""Which arrays of a caller are taken, and what they become; PyTorch's, and a double of it."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.library.arrays import shards_of, tokens_of

TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class Tensor:
    """What PyTorch's tensors are to us: bits, a dtype, and NumPy for all but BF16."""

    requires_grad = False
    layout = "strided"

    def __init__(self, bits: Any, dtype: str, place: str = "cpu") -> None:
        self.bits, self.dtype, self.device = bits, dtype, SimpleNamespace(type=place)
        self.shape = bits.shape

    def __len__(self) -> int:
        return len(self.bits)

    def detach(self) -> Tensor:
        return self

    def view(self, dtype: str) -> Tensor:
        return Tensor(self.bits, dtype)

    def numpy(self) -> Any:
        assert self.dtype == "torch.int16", "Got unsupported ScalarType BFloat16"
        return self.bits.view(np.int16)


DOUBLE = SimpleNamespace(
    Tensor=Tensor,
    strided="strided",
    int16="torch.int16",
    bfloat16="torch.bfloat16",
    float16="torch.float16",
    is_grad_enabled=lambda: True,
    from_numpy=lambda array: Tensor(array, f"torch.{array.dtype}"),
)


@pytest.fixture(params=["torch", "double"])
def torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "double":
        monkeypatch.setitem(sys.modules, "torch", DOUBLE)
        return DOUBLE
    if find_spec("torch") is None:
        pytest.skip("needs PyTorch")
    return import_module("torch")


def tensor_of(torch: Any, array: Any) -> Any:
    return torch.from_numpy(array.view(np.int16)).view(getattr(torch, str(array.dtype)))


def arrays(dtype: str, *, tokens: int = 5) -> list[Any]:
    random = np.random.default_rng(tokens)
    return [random.standard_normal((tokens, 2, 8)).astype(TYPES[dtype]) for _ in "qkv"]


@pytest.mark.parametrize("dtype", TYPES)
def test_tensors_on_the_cpu_are_seen_in_place_and_come_back_as_tensors(
    torch: Any, dtype: str
) -> None:
    given = arrays(dtype)
    shards = shards_of(*(tensor_of(torch, array) for array in given))
    assert (shards.backend, shards.dtype, shards.shapes) == ("cpu", dtype, ((5, 2, 8),) * 3)
    for seen, array in zip(shards[:3], given, strict=True):
        assert seen.dtype == TYPES[dtype]
        assert seen.tobytes() == array.tobytes()
        assert np.shares_memory(seen, array)
    back = shards.give(given[0])
    assert isinstance(back, torch.Tensor)
    assert str(back.dtype) == f"torch.{dtype}"
    assert back.view(torch.int16).numpy().tobytes() == given[0].tobytes()
    assert str(shards.give(np.zeros((5, 2), np.float32)).dtype) == "torch.float32"


def test_a_tensor_that_requires_a_gradient_is_refused(torch: Any) -> None:
    q, k, v = (tensor_of(torch, array) for array in arrays("float16"))
    v.requires_grad = True
    with pytest.raises(RejectedError, match=r"no backward pass.*Fix: call within torch.no_grad"):
        shards_of(q, k, v)


def test_what_is_neither_here_nor_on_a_gpu_is_refused(torch: Any) -> None:
    q, k, v = arrays("float16")
    elsewhere = Tensor(v, "torch.float16", "xpu")
    with pytest.raises(RejectedError, match=r"Tensor is neither.*Fix: "):
        shards_of(q, k, elsewhere)


def test_one_on_the_gpu_and_two_on_the_host_are_refused() -> None:
    q, k, v = arrays("float16")
    far = SimpleNamespace(dtype=v.dtype, shape=v.shape, __dlpack_device__=lambda: (2, 0))
    with pytest.raises(RejectedError, match=r"float16, on cpu and cuda. Fix: .*in one place"):
        shards_of(q, k, far)


def test_numpy_arrays_are_taken_as_they_are_without_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    q, k, v = arrays("bfloat16")
    shards = shards_of(q, k, v)
    assert shards.q is q
    assert shards.give(v) is v
    assert "torch" not in sys.modules


@pytest.mark.parametrize("tokens", [(0, 0), (3, 70), (70, 0), ((1 << 32) - 1, (1 << 32) - 1)])
def test_two_lengths_are_one_word(tokens: tuple[int, int]) -> None:
    q, kv = (np.broadcast_to(np.float16(0), (length, 1, 1)) for length in tokens)
    word = shards_of(q, kv, kv).tokens
    assert 0 <= word < 1 << 64
    assert tokens_of(word) == tokens
