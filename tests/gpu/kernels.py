"""Every kind of call that a kernel says it can do, against float64, on one real GPU.

    python tests/gpu/kernels.py [--kernel cudnn,flash]

Bounds of all kinds (some so that rows see nothing, some beyond all keys), soft caps, odd lengths,
groups of heads, results in 16 bits and in float32; all of the output and of the LSE is compared.
Negative controls: the same results against the reference of a bound that is one key further, and
of no soft cap, must be wrong. Exit code 1 where anything is.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from mdattn_mpi.devices.cuda.attention import AttentionCall
from mdattn_mpi.devices.cuda.flash.key import KernelKey
from mdattn_mpi.devices.cuda.memory import contiguous_strides
from mdattn_mpi.devices.cuda.open import Libraries
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.mask import Band

TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4}
LSE_TOLERANCE = 2e-3
SHAPES = (  # rows, keys, query heads, kv heads, head dims, dtype
    (333, 777, 8, 2, 128, 128, "bfloat16"),
    (513, 300, 8, 2, 128, 128, "bfloat16"),
    (1000, 1000, 4, 4, 64, 64, "float16"),
    (301, 301, 4, 4, 256, 256, "bfloat16"),
    (500, 501, 10, 2, 96, 72, "float16"),
)
COMPILERS = 8  # processes
BOUNDS = ((None, None), (None, 0), (63, 0), (0, 0), (40, 25), (None, 130), (200, None),
          (-7, 90), (150, -20))  # fmt: skip
CAPS = (0.0, 3.0)


@dataclass
class Case:
    """A call, its inputs and what came out."""

    call: AttentionCall
    q: Any
    k: Any
    v: Any
    output: Any
    lse: Any

    def errors(self, **change: Any) -> tuple[float, float]:
        """Relative error of the output, and the largest of the LSE, if the call were another."""
        call = self.call._replace(**change)
        output, lse = reference(call, self.q, self.k, self.v)
        found = self.output.double()
        empty = lse.isneginf()
        if bool((self.lse.isneginf() != empty).any()) or not bool(found.isfinite().all()):
            return float("inf"), float("inf")
        error = float((found - output).norm() / output.norm().clamp(min=1e-30))
        apart = (self.lse.double() - lse)[~empty].abs()
        return error, float(apart.max()) if apart.numel() else 0.0

    @property
    def is_right(self) -> bool:
        """Whether output and LSE are those of the call."""
        error, apart = self.errors()
        return error < TOLERANCE[self.call.dtype] and apart < LSE_TOLERANCE

    def controls(self) -> list[str]:
        """Changes of the call of which the results should have been wrong, and weren't."""
        call, changes = self.call, list[dict[str, Any]]()
        visible = reference_mask(call).sum()
        for name, bound in call.band._asdict().items():
            if bound is not None:
                wider = call._replace(band=call.band._replace(**{name: bound + 1}))
                if reference_mask(wider).sum() != visible:
                    changes.append({"band": wider.band})
        if call.softcap:
            changes.append({"softcap": 0.0})
        missed = []
        for change in changes:
            error, apart = self.errors(**change)
            if error < TOLERANCE[call.dtype] and apart < LSE_TOLERANCE:
                missed.append(str(change))
        return missed


def reference_mask(call: AttentionCall) -> Any:
    """Which rows see which keys."""
    keys = torch.arange(call.kv_tokens, device="cuda")
    rows = torch.arange(call.q_tokens, device="cuda") + call.kv_tokens - call.q_tokens
    after = keys[None] - rows[:, None]
    seen = torch.ones_like(after, dtype=torch.bool)
    if call.band.after is not None:
        seen &= after <= call.band.after
    if call.band.before is not None:
        seen &= after >= -call.band.before
    return seen


def reference(call: AttentionCall, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """Output and LSE in float64."""
    group = call.q_heads // call.kv_heads
    k, v = (array.double().repeat_interleave(group, 1) for array in (k, v))
    scores = torch.einsum("ind,jnd->nij", q.double(), k) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~reference_mask(call), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])
    return torch.einsum("nij,jnd->ind", weights, v), lse.T


def attend(engine: Any, call: AttentionCall, stream: Any) -> Case:
    """Run a call on fresh random inputs; weights that are far from uniform."""
    dtype = getattr(torch, call.dtype)
    q = 3 * torch.randn(call.q_tokens, call.q_heads, call.head_dim, device="cuda")
    k = torch.randn(call.kv_tokens, call.kv_heads, call.head_dim, device="cuda")
    v = torch.randn(call.kv_tokens, call.kv_heads, call.v_head_dim, device="cuda")
    q, k, v = (array.to(dtype) for array in (q, k, v))
    shape = call.q_tokens, call.q_heads, call.v_head_dim
    output = torch.full(shape, torch.nan, device="cuda", dtype=getattr(torch, call.out_dtype))
    lse = torch.full(shape[:2], torch.nan, device="cuda")
    launch = engine.prepare(call)
    workspace = torch.empty(max(1, launch.workspace), device="cuda", dtype=torch.uint8)
    torch.cuda.synchronize()
    addresses = tuple(array.data_ptr() for array in (q, k, v, output, lse))
    launch.run(addresses, workspace.data_ptr(), SimpleNamespace(handle=stream.cuda_stream))
    torch.cuda.synchronize()
    return Case(call, q, k, v, output, lse)


def calls() -> list[AttentionCall]:
    """Every combination."""
    found = []
    for shape, bounds, cap in itertools.product(SHAPES, BOUNDS, CAPS):
        rows, keys, q_heads, kv_heads, dim, v_dim, dtype = shape
        arrays = ((rows, q_heads, dim), (keys, kv_heads, dim), (keys, kv_heads, v_dim),
                  (rows, q_heads, v_dim), (rows, q_heads))  # fmt: skip
        strides = [contiguous_strides(each) for each in arrays]
        for out in (dtype, "float32"):
            about = (*shape, out, Band(*bounds), dim**-0.5, cap)
            found.append(AttentionCall(*about, *strides))  # type: ignore[arg-type]
    return found


def compile_some(sm: tuple[int, int], some: list[AttentionCall]) -> None:
    """Let FlashAttention's kernels for some calls be on the disk; needs no GPU."""
    from mdattn_mpi.devices.cuda.flash.engine import FlashEngine

    engine = FlashEngine(sm, 0)
    for call in some:
        engine.prepare(call)


def compile_all(sm: tuple[int, int]) -> None:
    """Compile all kernels, in several processes: one after the other they take minutes."""
    keys = {KernelKey.of(call, sm): call for call in calls()}
    parts = [list(keys.values())[number::COMPILERS] for number in range(COMPILERS)]
    with ProcessPoolExecutor(COMPILERS, get_context("spawn")) as pool:
        list(pool.map(partial(compile_some, sm), parts))


def main() -> int:
    """Try all calls by all engines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", default="cudnn,flash")
    arguments = parser.parse_args()
    libraries, wrong = Libraries(), 0
    gpu = libraries.gpu(0)
    torch.cuda.set_device(0)
    torch.manual_seed(7)
    stream = torch.cuda.Stream()
    for name in arguments.kernel.split(","):
        if name == "flash":
            compile_all(gpu.sm)
        engine: Any = getattr(libraries, name)(gpu)
        done, refused = 0, dict[str, int]()
        for call in calls():
            what = f"{name}: {call[:9]} scale {call.scale:.3f} softcap {call.softcap}"
            try:
                why = engine.refusal(call)
                if why:
                    refused[why[:90]] = refused.get(why[:90], 0) + 1
                    continue
                case = attend(engine, call, stream)
            except RejectedError as error:
                print(f"REFUSED LATE {what}: {error.what[:200]}")
                wrong += 1
                continue
            done += 1
            missed = case.controls()
            if not case.is_right or missed:
                wrong += 1
                print(f"WRONG {what}: {case.errors()}, controls that passed: {missed}", flush=True)
        print(f"{name} {engine.version}: {done} calls; refused: {refused}", flush=True)
        engine.close()
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
