"""One rank's engine against PyTorch's, or P GPUs against one and PyTorch's.

Time our attention against PyTorch's: same hardware, same 16-bit inputs and outputs, random data,
alternating runs, medians. Results are compared before anything is timed.

  mdattn bench attention                                  one rank, all cores of this machine
  mpirun -n 2 mdattn bench attention -b cuda --lengths 8192,32768

On the CPU, a ratio above 1 means that ours is faster than scaled_dot_product_attention; what exp
gains is our time with NumPy's over that with the one in use, if another is installed. With a
window, our time is also given as a share of that without any mask; on GPUs, PyTorch's side is then
flex_attention on one of them.
"""

from __future__ import annotations

import argparse

from mdattn_mpi.bench.measure import on_all_ranks
from mdattn_mpi.bench.options import add_backend, add_rounds, add_shapes, add_window, problems


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare backend, shapes and rounds."""
    add_backend(parser)
    add_shapes(
        parser, lengths=(2048, 8192, 16384), head_dims=(64, 128), causal="both", dtype="both"
    )
    add_window(parser)
    add_rounds(parser)
    add = parser.add_argument
    add(
        "--transfer", default="auto", metavar="HOW", help="between GPUs: auto (default), copy, nccl"
    )
    add("--kernel", default="auto", metavar="NAME", help="on GPUs: auto (default), cudnn, flash")
    add("--no-rivals", dest="rivals", action="store_false", help="GPUs: leave PyTorch out")
    add(
        "--no-replays",
        dest="replays",
        action="store_false",
        help="GPUs: ask for every copy and kernel of every call",
    )


def main(arguments: argparse.Namespace) -> int:
    """Measure every combination; print each as it is there, and a summary."""
    todo = list(problems(arguments))
    if arguments.backend == "cpu":
        from mdattn_mpi.bench import attention_cpu

        attention_cpu.main(todo, arguments.rounds, as_json=arguments.json)
        return 0
    from mdattn_mpi.bench import attention_cuda

    return on_all_ranks(lambda world: attention_cuda.main(world, todo, arguments))
