"""What we rely on of FlashAttention 4 and its compiler, where they are installed; no GPU is needed.

    python -m pytest tests/unit/devices/cuda/test_flash_contract.py

Every kind of kernel that a problem of the tests needs is compiled for SM 9.0 and loaded again, and
some for SM 10.0 in a process of their own, for a process compiles for one architecture. A launch
gets as far as CUDA: what it was given was found right by the compiled function itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdattn_mpi.devices.cuda.attention import AttentionCall
from mdattn_mpi.devices.cuda.flash.engine import ARCHITECTURES, FlashEngine, why_not
from mdattn_mpi.devices.cuda.memory import contiguous_strides
from mdattn_mpi.devices.presence import gpu_count
from mdattn_mpi.errors import DeviceError
from mdattn_mpi.mask import FULL, LOWER_RIGHT, Band
from tests.support.no_triton import import_quack

pytestmark = pytest.mark.skipif(
    not find_spec("flash_attn") or bool(why_not((9, 0))), reason=why_not((9, 0)) or "not installed"
)

# Query heads, kv heads and head dims of tests/gpu/run.py and `mdattn bench attention`.
HEADS = (
    (8, 8, 128, 128), (32, 8, 128, 128), (8, 8, 64, 64), (4, 4, 256, 256), (4, 1, 64, 64),
    (4, 2, 192, 128), (6, 3, 72, 56), (2, 2, 8, 8), (6, 2, 64, 64),
    (4, 2, 96, 72),
)  # fmt: skip
WINDOW = Band(7, 3)
MASKS = (
    ("bfloat16", FULL, 0.0), ("float16", LOWER_RIGHT, 0.0), ("bfloat16", WINDOW, 0.0),
    ("float16", FULL, 30.0), ("bfloat16", LOWER_RIGHT, 50.0), ("float16", WINDOW, 50.0),
)  # fmt: skip
KINDS = [
    (*heads, dtype, out, band, softcap)
    for number, heads in enumerate(HEADS)
    for dtype, band, softcap in (MASKS[number % 2], MASKS[2 + number % 4])
    for out in (dtype, "float32")
]
SM = (int(os.environ.get("FLASH_CONTRACT_SM", "9")), 0)
if SM[0] == 10:  # they take longer
    KINDS = [
        (8, 8, 128, 128, "bfloat16", "bfloat16", FULL, 0.0),
        (32, 8, 128, 128, "float16", "float32", LOWER_RIGHT, 0.0),
        (6, 3, 72, 56, "bfloat16", "float32", WINDOW, 50.0),
    ]


def call_of(
    q_heads: int, kv_heads: int, dim: int, v_dim: int, dtype: str, out: str,
    band: Band, softcap: float,
) -> AttentionCall:  # fmt: skip
    shapes = (100, q_heads, dim), (201, kv_heads, dim), (201, kv_heads, v_dim)
    strides = map(contiguous_strides, (*shapes, (100, q_heads, v_dim), (100, q_heads)))
    about = 100, 201, q_heads, kv_heads, dim, v_dim, dtype, out
    return AttentionCall(*about, band, 0.1, softcap, *strides)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlashEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDATTN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("CUTE_DSL_ARCH", ARCHITECTURES[SM[0]])
        import_quack()
        yield FlashEngine(SM, 0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kernel_compiles_and_takes_our_calls(engine: FlashEngine, kind: Any) -> None:
    call = call_of(*kind)
    assert not engine.refusal(call)
    launch = engine.prepare(call)
    if gpu_count() < 1:
        with pytest.raises(DeviceError, match=r"(?i)cuda.*(driver|device)"):
            launch.run((1 << 20, 2 << 20, 3 << 20, 4 << 20, 5 << 20), 0, SimpleNamespace(handle=0))


@pytest.mark.skipif(SM[0] != 9, reason="documents are packed on SM 9.0 alone")
@pytest.mark.parametrize("kind", KINDS[::5], ids=str)
def test_packed_documents_compile_and_take_our_calls(engine: FlashEngine, kind: Any) -> None:
    call = call_of(*kind)._replace(documents=((0, 40, 100), (0, 101, 201)))
    assert not engine.refusal(call)
    launch = engine.prepare(call)
    addresses = tuple(number << 20 for number in range(1, 8))
    if gpu_count() < 1:
        with pytest.raises(DeviceError, match=r"(?i)cuda.*(driver|device)"):
            launch.run(addresses, 0, SimpleNamespace(handle=0))
    launch._tensors[6].bits = 64
    with pytest.raises(DeviceError, match=r"Mismatched.*#6.*dtype"):
        launch.run(addresses, 0, SimpleNamespace(handle=0))


def test_a_compiled_function_checks_what_it_is_given(engine: FlashEngine) -> None:
    launch = engine.prepare(call_of(*KINDS[0]))
    launch._tensors[3].bits = 32  # an output of another type
    with pytest.raises(DeviceError, match=r"Mismatched.*#3.*dtype"):
        launch.run((1 << 20, 2 << 20, 3 << 20, 4 << 20, 5 << 20), 0, SimpleNamespace(handle=0))


def test_another_process_loads_what_was_compiled(engine: FlashEngine, tmp_path: Path) -> None:
    call = call_of(*KINDS[0])
    engine.prepare(call)
    store = engine._store

    def never(key: Any) -> Any:
        raise AssertionError("compiled twice")

    compiled = store.compiled
    assert store.get(next(iter(engine._functions)), never, engine._load)
    assert store.compiled == compiled


@pytest.mark.skipif(SM[0] == 10, reason="it is what is tested")
@pytest.mark.timeout(400)
def test_kernels_of_sm_10_compile_too() -> None:
    """And take our calls, as far as that can be seen without such a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-k", "every_kernel", __file__]
    environment = {**os.environ, "FLASH_CONTRACT_SM": "10"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=380, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
