"""FlashAttention's engine without FlashAttention: versions, refusals, launches, the store."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdattn_mpi.devices.cuda.attention import AttentionCall
from mdattn_mpi.devices.cuda.dlpack import Tensor
from mdattn_mpi.devices.cuda.flash import engine
from mdattn_mpi.devices.cuda.flash.key import KernelKey
from mdattn_mpi.devices.cuda.flash.store import Store
from mdattn_mpi.devices.cuda.flash.tvm import UNBOUNDED, FunctionLaunch
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.mask import FULL, LOWER_RIGHT, Band

CALL = AttentionCall(
    q_tokens=6, kv_tokens=10, q_heads=4, kv_heads=2, head_dim=16, v_head_dim=8,
    dtype="bfloat16", out_dtype="float32", band=LOWER_RIGHT, scale=0.25, softcap=0.0,
    q=(64, 16, 1), k=(32, 16, 1), v=(16, 8, 1), output=(32, 8, 1), lse=(4, 1),
)  # fmt: skip
KEY = KernelKey.of(CALL, (9, 0))
FUNCTION = SimpleNamespace(__chandle__=lambda: 77)
VERSIONS = {"flash-attn-4": "1", "nvidia-cutlass-dsl": "2"}


def test_setup_cfg_pins_what_the_engine_wants() -> None:
    setup = (Path(engine.__file__).parents[4] / "setup.cfg").read_text()
    for package, version in engine.PINNED.items():
        assert f"{package}=={version}" in setup.replace("[cu13]", "")


@pytest.mark.parametrize(
    ("installed", "sm", "why"),
    [
        (engine.PINNED, (9, 0), ""),
        (engine.PINNED, (10, 0), ""),
        (engine.PINNED, (8, 0), "not built for SM 8.0"),
        (dict(list(engine.PINNED.items())[:1]), (9, 0), r"cutlass-dsl isn't installed.*\[flash\]"),
        ({**engine.PINNED, "flash-attn-4": "9"}, (9, 0), "flash-attn-4 is 9, and 4.*checked"),
    ],
)
def test_why_it_can_not_be_used(
    installed: dict[str, str], sm: tuple[int, int], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(engine, "version", version)
    assert bool(engine.why_not(sm)) == bool(why)
    assert re.search(why, engine.why_not(sm))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"head_dim": 12}, "multiples of 8 up to 256"),
        ({"v_head_dim": 264}, "multiples of 8 up to 256"),
        ({"dtype": "float8"}, "bfloat16 and float16"),
        ({"head_dim": 40, "v_head_dim": 256}, "can't be larger than the queries'"),
        ({"head_dim": 64, "v_head_dim": 72}, "can't be larger than the queries'"),
        ({"head_dim": 40, "v_head_dim": 48}, ""),  # the same tile
    ],
)
def test_what_its_kernel_can_not_do(change: dict[str, Any], why: str) -> None:
    found = engine.refusal(CALL._replace(**change), (9, 0))
    assert why in found
    assert bool(found) == bool(why)


def test_other_architectures_have_other_limits() -> None:
    large = CALL._replace(head_dim=256)
    assert "multiples of 8 up to 128" in engine.refusal(large, (10, 0))
    assert not engine.refusal(large, (9, 0))
    wide, plain = (
        KernelKey.of(CALL._replace(out_dtype=t), (10, 0)) for t in ("float32", "bfloat16")
    )
    assert (wide.ones, plain.ones, KEY.ones) == (2, 1, 1)  # one split of the keys comes first


def test_a_kernel_is_for_all_lengths_and_strides() -> None:
    longer = CALL._replace(q_tokens=7, kv_tokens=99, q=(640, 16, 1), scale=0.5)
    assert KernelKey.of(longer, (9, 0)) == KEY
    band, other = (
        CALL._replace(band=Band(*bounds), softcap=cap)
        for *bounds, cap in ((3, 0, 20.0), (0, 7, 50.0))
    )
    assert KernelKey.of(band, (9, 0)) == KernelKey.of(other, (9, 0))
    more_heads = CALL._replace(q_heads=8, kv_heads=4)
    assert KernelKey.of(more_heads, (9, 0)) == KEY
    for change in (
        {"band": FULL}, {"band": Band(3, 0)}, {"softcap": 30.0}, {"out_dtype": "bfloat16"},
        {"dtype": "float16"}, {"q_heads": 2}, {"head_dim": 24}, {"v_head_dim": 24},
    ):  # fmt: skip
        assert KernelKey.of(CALL._replace(**change), (9, 0)) != KEY  # type: ignore[arg-type]


class Library:
    """What TVM FFI's C interface is: notes what a call was given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.error = ctypes.create_string_buffer(b"out of\nluck")
        self.fails = False

    def TVMFFIFunctionCall(self, handle: Any, arguments: Any, count: int, result: Any) -> int:
        found: list[Any] = [handle.value]
        for argument in arguments[:count]:
            value = argument.value
            if argument.type == 7:
                tensor = Tensor.from_address(value.pointer)
                shape, strides = (
                    tuple(numbers[: tensor.ndim]) for numbers in (tensor.shape, tensor.strides)
                )
                device = tensor.device_type, tensor.device_id
                found.append((tensor.data, shape, strides, tensor.code, tensor.bits, device))
            elif argument.type == 0:
                found.append(None)
            else:
                kind = {1: "integer", 3: "number", 4: "pointer"}[argument.type]
                found.append(getattr(value, kind))
        self.seen.append(found)
        return -1 if self.fails else 0

    def TVMFFIErrorMoveFromRaised(self, handle: Any) -> None:
        kind = ctypes.create_string_buffer(b"Kind")
        words = (ctypes.c_uint64 * 7)()
        words[3:] = [ctypes.addressof(kind), 4, ctypes.addressof(self.error), 11]
        self.kept = kind, words
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = ctypes.addressof(words)

    def TVMFFIObjectDecRef(self, handle: Any) -> None:
        self.released = handle.value


def test_a_launch_gives_addresses_strides_scale_and_stream() -> None:
    library = Library()
    launch = FunctionLaunch(library, FUNCTION, CALL, 3, KEY)
    launch.run((16, 32, 48, 64, 80), 0, SimpleNamespace(handle=1234))
    launch.run((17, 33, 49, 65, 81), 0, SimpleNamespace(handle=5678))
    on_gpu = (2, 3)
    assert library.seen[0] == [
        77,
        (16, (1, 6, 4, 16), (384, 64, 16, 1), 4, 16, on_gpu),
        (32, (1, 10, 2, 16), (320, 32, 16, 1), 4, 16, on_gpu),
        (48, (1, 10, 2, 8), (160, 16, 8, 1), 4, 16, on_gpu),
        (64, (1, 6, 4, 8), (192, 32, 8, 1), 2, 32, on_gpu),
        (80, (1, 4, 6), (24, 1, 4), 2, 32, on_gpu),
        *(None, None),
        *(0.25, 0.0, UNBOUNDED, 0),
        1234,
    ]
    launch = FunctionLaunch(library, FUNCTION, CALL, 3, KEY._replace(sm=(10, 0)))
    launch.run((17, 33, 49, 65, 81), 0, SimpleNamespace(handle=5678))
    assert [found[1] for found in library.seen.pop()[3:6]] == [
        (1, 10, 2, 8), (1, 1, 6, 4, 8), (1, 1, 4, 6)
    ]  # fmt: skip
    band = CALL._replace(band=Band(3, None), softcap=30.0)
    launch = FunctionLaunch(library, FUNCTION, band, 3, KEY)
    launch.run((17, 33, 49, 65, 81), 0, SimpleNamespace(handle=5678))
    assert library.seen[2][8:12] == [0.25, 30.0, 3, UNBOUNDED]
    assert [tensor[0] for tensor in library.seen[1][1:6]] == [17, 33, 49, 65, 81]
    assert library.seen[1][-1] == 5678


def test_packed_documents_have_no_batch_and_say_where_they_begin() -> None:
    library, packed = Library(), CALL._replace(documents=((0, 2, 6), (0, 4, 10)))
    key = KernelKey.of(packed, (9, 0))
    assert key == KEY._replace(packed=True)
    launch = FunctionLaunch(library, FUNCTION, packed, 0, key)
    launch.run((16, 32, 48, 64, 80, 96, 112), 0, SimpleNamespace(handle=1))
    on_gpu = (2, 0)
    assert library.seen[0][1] == (16, (6, 4, 16), (64, 16, 1), 4, 16, on_gpu)
    assert library.seen[0][5:8] == [
        (80, (4, 6), (1, 4), 2, 32, on_gpu),
        (96, (3,), (1,), 0, 32, on_gpu),
        (112, (3,), (1,), 0, 32, on_gpu),
    ]
    assert library.seen[0][8:] == [0.25, 0.0, UNBOUNDED, 0, 1]
    assert not engine.refusal(packed, (9, 0))
    assert "packed documents on SM 10.0" in engine.refusal(packed, (10, 0))


def test_a_launch_that_fails_says_why() -> None:
    library = Library()
    library.fails = True
    launch = FunctionLaunch(library, FUNCTION, CALL, 0, KEY)
    with pytest.raises(DeviceError, match="FlashAttention: out of luck"):
        launch.run((16, 32, 48, 64, 80), 0, SimpleNamespace(handle=1))
    assert library.released


class Compiled:
    """What a compiled kernel is: can be written to a file."""

    def __init__(self, text: str = "code") -> None:
        self.text = text

    def export_to_c(self, object_file_path: str, function_name: str) -> None:
        Path(object_file_path).write_text(f"{function_name} {self.text}")


def load(path: str) -> str:
    text = Path(path).read_text()
    if not text.startswith("attend"):
        raise RuntimeError("not an object file")
    return text


def test_a_kernel_is_compiled_once_for_each_key_and_version(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "flash"
    store = Store(folder, VERSIONS)
    assert folder.stat().st_mode & 0o777 == 0o700
    for key in (KEY, KEY, KEY._replace(mask="none")):
        assert store.get(key, lambda key: Compiled(key.mask), load) == f"attend {key.mask}"
    assert store.compiled == 2
    again = Store(folder, VERSIONS)
    assert again.get(KEY, lambda key: Compiled("other"), load) == "attend causal"
    assert again.compiled == 0
    other = Store(folder, {**VERSIONS, "flash-attn-4": "1.1"})
    assert other.get(KEY, lambda key: Compiled("other"), load) == "attend other"


def test_a_file_cut_short_is_made_anew(tmp_path: Path) -> None:
    store = Store(tmp_path, VERSIONS)
    store.path(KEY).write_text("att")
    assert store.get(KEY, lambda key: Compiled(), load) == "attend code"
    assert load(str(store.path(KEY))) == "attend code"


def test_what_can_not_be_compiled_leaves_nothing(tmp_path: Path) -> None:
    def fail(key: KernelKey) -> Any:
        raise ValueError("no registers")

    store = Store(tmp_path, VERSIONS)
    with pytest.raises(ValueError, match="no registers"):
        store.get(KEY, fail, load)
    assert not list(tmp_path.glob("*.o"))
    assert store.get(KEY, lambda key: Compiled(), load) == "attend code"


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(RejectedError, match=r"others may write.*chmod 700.*MDATTN_CACHE"):
        Store(tmp_path, VERSIONS)


def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(RejectedError, match="others may write"):
        Store(tmp_path, VERSIONS)


def test_without_a_place_to_keep_them_kernels_are_compiled_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "flash", VERSIONS)
    assert store.get(KEY, lambda key: Compiled(), load) == "attend code"


def slowly(key: KernelKey) -> Compiled:
    time.sleep(0.3)
    return Compiled()


def compile_in_a_process(folder: Path, queue: Any) -> None:
    store = Store(folder, VERSIONS)
    queue.put((store.get(KEY, slowly, load), store.compiled))


def test_of_all_ranks_of_a_node_one_compiles(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=compile_in_a_process, args=(tmp_path, queue)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [queue.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert {text for text, _ in found} == {"attend code"}
    assert sum(compiled for _, compiled in found) == 1
