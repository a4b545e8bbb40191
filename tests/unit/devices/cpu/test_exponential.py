"""Whoever computes exp, attention needs the same of it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mdattn_mpi.devices.cpu import exponential
from mdattn_mpi.devices.cpu.exponential import Exponential, fastest_exp, numpy_exp


@pytest.fixture(params=["numpy", "onnxruntime"])
def exp(request: pytest.FixtureRequest) -> Exponential:
    if request.param == "numpy":
        return numpy_exp()
    pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")
    return exponential._onnxruntime_exp()


def test_accurate_in_place(exp: Exponential) -> None:
    numbers = np.random.default_rng().uniform(-80, 30, (37, 1001)).astype(np.float32)
    right = np.exp(numbers.astype(float))
    exp.apply(numbers)
    np.testing.assert_allclose(numbers, right, rtol=5e-7)


def test_at_the_ends(exp: Exponential) -> None:
    numbers = np.array([-np.inf, -1e30, -200, 0, np.nan, np.inf] * 8000, np.float32)
    with np.errstate(all="ignore"):
        exp.apply(numbers)
    np.testing.assert_array_equal(numbers, [0, 0, 0, 1, np.nan, np.inf] * 8000)


def test_many_threads_and_sizes(exp: Exponential) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            numbers = random.standard_normal(random.integers(1, 2 * exponential.FEW)).astype(
                np.float32
            )
            right = np.exp(numbers.astype(float))
            exp.apply(numbers)
            if not np.allclose(numbers, right, rtol=5e-7):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_is_chosen_and_named() -> None:
    assert fastest_exp() is fastest_exp()
    assert fastest_exp().library.split()[0] in ("numpy", "onnxruntime")
