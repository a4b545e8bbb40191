"""A whole transformer with random weights: P ranks against one, and PyTorch's context_parallel.

  mpirun -n 2 mdattn bench model -b cuda --lengths 16384,65536,131072,262144
  mpirun -n 2 mdattn bench model -b cuda --layers 32 --lengths 1048576 --rounds 0 --only auto

With --rounds 0 every side runs once, as in a job after its proof.

One rank runs the same model with PyTorch's SDPA, on GPUs by cuDNN, and all ranks do so at the same
time. Sides take turns, medians count, of several ranks the slowest. The proof before a job is made
first; hidden states are compared with those of the one rank. Model FLOP utilization (MFU) counts
matrix products of weights and of attention, of a causal mask half, against the data sheet's dense
BF16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from mdattn_mpi.bench.measure import alternate, report, table, versions
from mdattn_mpi.bench.options import add_backend, add_rounds, add_shapes, one_problem, problems
from mdattn_mpi.problem import FLAT_STRATEGIES, AttentionProblem
from mdattn_mpi.text import memory_size

if TYPE_CHECKING:
    from mdattn_mpi.backends import StrategyBackend
    from mdattn_mpi.lockstep import World
    from mdattn_mpi.models.network import Network

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # NVIDIA's data sheets
ONE, THEIRS = "one rank", "PyTorch context_parallel"
# Standard deviation of random scores: nearly uniform attention looks right when it is wrong, and
# a much sharper one makes of every rounding another answer.
SCORES = 2.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the model's sizes, lengths, and sides."""
    add_backend(parser)
    add_shapes(parser, lengths=(16384, 65536), q_heads=32, kv_heads=8, causal="upper_left")
    add_rounds(parser, default=3)
    add = parser.add_argument
    add("--layers", type=int, default=4, metavar="L", help="default: 4")
    add("--inner", type=int, default=14336, metavar="D", help="of the MLPs (default: 14336)")
    add("--vocabulary", type=int, default=32768, metavar="V", help="default: 32768")
    add("--kernel", default="auto", metavar="NAME", help="on GPUs: auto (default), cudnn, flash")
    add("--only", choices=("ours", "auto"), help="leave one rank and PyTorch out; auto: -s auto")
    add("--logprobs", action="store_true", help="embedding and log-probabilities too, once")


def measure(world: World, arguments: argparse.Namespace) -> None:
    """Collective. Measure every length; rank 0 prints."""
    from mdattn_mpi.backends import open_backend
    from mdattn_mpi.models.proof import prove

    arguments.lengths, lengths = arguments.lengths[:1], arguments.lengths
    shape = one_problem(arguments)
    backend = cast(
        "StrategyBackend", open_backend(arguments.backend, world, kernel=arguments.kernel)
    )
    bench = Bench(world, backend, random_network(world, shape, arguments), arguments)
    proof = prove(bench.network, backend.device, backend.name, world, "auto")
    proof.check()
    if world.rank == 0:
        print(*proof.describe(), sep="\n", flush=True)
    arguments.lengths = lengths
    results = [bench.measure(problem) for problem in problems(arguments)]
    facts = {**backend.describe(), **versions("torch", "transformers")}
    facts |= {"parameters": f"{bench.multiplied / 1e9:.3g} billion without embeddings"}
    backend.close()
    if world.rank == 0:
        report({"ranks": world.size, "results": results}, (), facts, as_json=arguments.json)


def random_network(world: World, shape: AttentionProblem, arguments: argparse.Namespace) -> Network:
    """Make a Llama of the wanted sizes on the rank's device, the same on all ranks."""
    import torch
    import transformers

    from mdattn_mpi.models.attention import NAME, register
    from mdattn_mpi.models.network import Network

    register()
    config = transformers.LlamaConfig(
        hidden_size=shape.q_heads * shape.head_dim,
        intermediate_size=arguments.inner,
        num_hidden_layers=arguments.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=1 << 24,
        rope_theta=5e5,
        attn_implementation=NAME,
    )
    device = "cpu" if arguments.backend == "cpu" else f"cuda:{world.local_rank}"
    if device != "cpu":
        torch.cuda.set_device(device)
    torch.manual_seed(11)
    kind: Any = transformers.LlamaForCausalLM if arguments.logprobs else transformers.LlamaModel
    with torch.device(device):
        model = kind._from_config(config, dtype=getattr(torch, shape.dtype))
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data.normal_(std=(SCORES**0.5) / config.hidden_size**0.5)
    return Network(model.eval().requires_grad_(False))


class Bench:
    """A network on all ranks, and what it is measured against."""

    def __init__(
        self,
        world: World,
        backend: StrategyBackend,
        network: Network,
        arguments: argparse.Namespace,
    ) -> None:
        self.world, self.backend, self.network = world, backend, network
        self.arguments = arguments
        layers = network.backbone.layers.parameters()
        self.multiplied = sum(weight.numel() for weight in layers if weight.ndim > 1)
        self.hidden: dict[str, Any] = {}

    def measure(self, problem: AttentionProblem) -> dict[str, Any]:
        """Collective. Time all sides at one length; print a table."""
        import torch

        tokens = problem.q_tokens
        self.hidden.clear()
        sides = self._sides(tokens)
        seconds = self._timed(sides)
        flops = 2 * self.multiplied * tokens + self.arguments.layers * problem.flops
        peak = self._peak()
        found: dict[str, Any] = {"tokens": tokens, "sides": {}}
        rows = [("", "seconds", "share of ideal", "MFU", "from one rank's")]
        for name, took in seconds.items():
            ranks = 1 if name == ONE else self.world.size
            share = seconds[ONE] / took / ranks if ONE in seconds else float("nan")
            used = flops / took / ranks / peak if peak else float("nan")
            apart = self._distance(name)
            found["sides"][name] = {"seconds": took, "share": share, "mfu": used, "error": apart}
            rows.append((name, f"{took:.4f}", f"{share:.3f}", f"{used:.3f}", f"{apart:.1e}"))
        if self.network.device.type == "cuda":
            free, whole = torch.cuda.mem_get_info()
            found["gpu_memory_in_use"] = memory_size(whole - free)  # what both allocators hold
        if self.arguments.logprobs:
            found |= self._given(tokens)
        if self.world.rank == 0 and not self.arguments.json:
            rest = {name: value for name, value in found.items() if name != "sides"}
            print("", *table(rows), rest, sep="\n", flush=True)
        return found

    def _timed(self, sides: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        """Collective. Take medians; with no rounds, time every side once, the first time."""
        if self.arguments.rounds:
            rounds = self.arguments.rounds
            return alternate(sides, rounds, before=self._pause, world=self.world)
        took = {}
        for name, run in sides.items():
            self._pause()
            began = perf_counter()
            run()
            took[name] = float(max(self.world.allgather(perf_counter() - began)))
        return took

    def _sides(self, tokens: int) -> dict[str, Callable[[], None]]:
        import numpy as np

        ids = np.random.default_rng(tokens).integers(0, self.network.vocabulary, tokens)
        names = ("auto",) if self.arguments.only == "auto" else FLAT_STRATEGIES
        sides = {name: self._ours(ids, name) for name in names}
        if not self.arguments.only:
            sides[ONE] = self._alone(ids)
            if self.world.size > 1 and self.backend.name == "cuda":
                sides[THEIRS] = self._theirs(ids)
        return sides

    def _ours(self, ids: Any, strategy: Any) -> Callable[[], None]:
        from mdattn_mpi.models.attention import SharedAttention
        from mdattn_mpi.models.sequence import ONE_DOCUMENT, TokenSequence, owners_of
        from mdattn_mpi.models.size import Shape

        owners = owners_of(len(ids), self.world.size, self.network.causal)
        sequence = TokenSequence(ids, ONE_DOCUMENT, owners[self.world.rank])
        reserved = Shape.of(self.network.config).activations(-(-len(ids) // self.world.size))
        shared = SharedAttention(
            self.backend.device, self.backend.name, owners, strategy, reserved=reserved
        )

        def run() -> None:
            self.hidden[strategy] = None
            self.hidden[strategy] = self.network.run(sequence, shared), sequence
            self._synchronize()

        return run

    def _alone(self, ids: Any) -> Callable[[], None]:
        """Every rank runs the whole sequence by itself, by PyTorch's attention."""
        pieces = self.network.pieces

        def run() -> None:
            self.hidden[ONE] = None
            before, pieces.tokens = pieces.tokens, 0
            self.hidden[ONE] = self.network.run_as_it_is(ids, Sdpa())
            pieces.tokens = before
            self._synchronize()

        return run

    def _theirs(self, ids: Any) -> Callable[[], None]:
        """PyTorch shares the same model, its queries, keys and values balanced by itself."""
        from mdattn_mpi.bench.model_rival import ContextParallel

        rival = ContextParallel(self.world, self.network, ids)

        def run() -> None:
            rival.run(Sdpa())
            self._synchronize()

        return run

    def _distance(self, name: str) -> float:
        """Relative L2 distance of this rank's hidden states from the one rank's; the largest."""
        if name not in self.hidden or ONE not in self.hidden or name == ONE:
            return float("nan")
        hidden, sequence = self.hidden[name]
        right = self.hidden[ONE][sequence.places]
        own = float((hidden.double() - right.double()).norm() / right.double().norm())
        return float(max(self.world.allgather(own)))

    def _given(self, tokens: int) -> dict[str, Any]:
        """Collective. Embedding and log-probabilities of the last run, timed."""
        from mdattn_mpi.models.outputs import GIVEN, SUM, outputs_of

        hidden, sequence = next(each for each in self.hidden.values() if isinstance(each, tuple))
        began = perf_counter()
        found = outputs_of(self.network, hidden, sequence, self.world, GIVEN, "mean")
        return {"logprobs": float(found[SUM][0]), "outputs_seconds": perf_counter() - began}

    def _peak(self) -> float:
        if self.network.device.type == "cpu":
            return 0.0
        import torch

        name = torch.cuda.get_device_name()
        return next((flops for kind, flops in PEAK.items() if kind in name), 0.0)

    def _pause(self) -> None:
        from mdattn_mpi.bench.attention_cuda import pause

        self._synchronize()
        self.world.barrier()
        pause()
        self.world.barrier()

    def _synchronize(self) -> None:
        if self.network.device.type == "cuda":
            import torch

            torch.cuda.synchronize()


class Sdpa:
    """PyTorch's attention, on GPUs by cuDNN, in the place of ours."""

    def mask(self, *args: Any, **options: Any) -> None:
        """Make none: it is told that it is causal."""

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> Any:
        """Attend by ``scaled_dot_product_attention``."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        on_gpu = query.device.type == "cuda"
        backend = SDPBackend.CUDNN_ATTENTION if on_gpu else SDPBackend.FLASH_ATTENTION
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=module.is_causal,
                scale=options["scaling"],
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return out.transpose(1, 2)
