"""Make a dataset of a .npz, .npy, .safetensors, .pt or HDF5 file; rewrite a dataset of ours as
contiguous, token-major data of 16 bits; or make token ids of texts.

  mdattn convert qkv.safetensors data.h5 --query 'l.*.q' --key 'l.*.k' \\
      --value 'l.*.v'
  mdattn convert theirs.h5 data.h5 --query '/runs/*/Q' \\
      --key '/runs/*/K' --value '/runs/*/V' --layout head_major --dtype bf16
  mdattn convert q.npy k.npy v.npy data.h5
  mdattn convert packed.pt data.h5 --qkv 'layers.*.qkv' --heads 32/8

A * stands for any text without a slash, and names the item. Without patterns, names like query,
*/query, *.q, *.qkv are tried; the tensor of a .npy file is called like the file. Tensors are
[S, N, H] or [B, S, N, H]; [N, S, H] or [B, N, S, H] with --layout head_major. What the file states
beside them is kept (causal, window, scale, softcap, layout, sinks, segments); options overrule it.

A .pt file is read by PyTorch's own reader for weights, which runs nothing of it.

With --tokenizer, IN are texts for a model, and OUT.h5 gets their token ids:

  mdattn convert texts.jsonl tokens.h5 --tokenizer DIR --field body --id url
  mdattn convert proteins.fasta tokens.h5 --tokenizer DIR --pack 8192

A .jsonl file has an object on each line, a .parquet file columns, a .txt file a text on each line
(--cut), a .fasta, .fa, .faa or .fna file sequences. Special tokens are those that the tokenizer
adds. Nothing is cut off.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from mdattn_mpi.cli.options import DTYPES, add_opening_options, add_writing_options
from mdattn_mpi.text import counted, quantity, wrapped

if TYPE_CHECKING:
    import numpy as np

    from mdattn_mpi.corpus.convert import Report
    from mdattn_mpi.dataset import Tensor
    from mdattn_mpi.dataset.foreign.items import Reading, Source

BLOCK_BYTES = 16 << 20
OF_TEXTS = ("field", "id", "cut", "number", "pack")  # options that mean nothing for the others
OF_TENSORS = (
    *("query", "key", "value", "qkv", "kv", "heads", "packed_dim", "layout", "dtype", "bits"),
    *("causal", "scale", "allow", "ignore"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("source", nargs="+", metavar="IN", help="what to convert; several count as one")
    add("path", metavar="OUT.h5", help="the dataset to write")
    for name in ("query", "key", "value"):
        add(f"--{name}", metavar="NAME", help=f"of the {name} in IN, with * for the item")
    add("--qkv", metavar="NAME", help="instead, of a tensor that holds all three")
    add("--kv", metavar="NAME", help="instead of key and value, of a tensor that holds both")
    add("--heads", type=_heads, metavar="N[/NKV]", help="the last dim is heads × head dim")
    add("--packed-dim", type=int, metavar="DIM", help="of --qkv, --kv: stacked (from 0), or -1")
    add(
        "--layout",
        choices=("token_major", "head_major"),
        help="order of tokens and heads in IN; asked for where shapes leave it open",
    )
    add("--dtype", choices=DTYPES, help="round to this; needed when IN isn't 16-bit")
    add("--bits", choices=DTYPES, help="16-bit integers in IN are the bits of this")
    add_opening_options(parser)
    add_writing_options(parser)
    add = parser.add_argument_group("texts").add_argument
    add("--tokenizer", metavar="DIR", help="a model's folder with its tokenizer: IN are texts")
    add("--field", metavar="NAME", help="field or column of the text (default: text)")
    add("--id", metavar="NAME", help="field or column of the items' names (default: numbered)")
    add("--cut", choices=("line", "paragraph", "document"), help="what of a .txt is a text")
    add("--number", action="store_true", default=None, help="number FASTA records")
    add("--pack", type=_tokens, metavar="N", help="short texts share sequences of N tokens")


def _tokens(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens")
    return int(text)


def _heads(text: str) -> tuple[int, int]:
    query, _, kv = text.partition("/")
    kv = kv or query
    if not (query.isdecimal() and kv.isdecimal() and int(query) and int(kv)):
        raise argparse.ArgumentTypeError(f"{text!r} isn't N, or NQ/NKV")
    return int(query), int(kv)


def main(arguments: argparse.Namespace) -> int:
    """Write the dataset."""
    texts, tensors = (
        [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]
        for names in (OF_TEXTS, OF_TENSORS)
    )
    wrong = tensors if arguments.tokenizer else texts
    if wrong:
        from mdattn_mpi.errors import RejectedError

        raise RejectedError(
            f"{wrong[0]} with{'' if arguments.tokenizer else 'out'} --tokenizer",
            fix=f"leave {wrong[0]} out" + ("" if arguments.tokenizer else ", or name a tokenizer"),
        )
    return _convert_texts(arguments) if arguments.tokenizer else _convert_tensors(arguments)


def _convert_texts(arguments: argparse.Namespace) -> int:
    import os

    from tqdm import tqdm

    from mdattn_mpi.corpus.convert import convert_texts
    from mdattn_mpi.corpus.texts import Reading

    given = {name: getattr(arguments, name) for name in ("field", "id", "cut", "number")}
    how = Reading(**{name: value for name, value in given.items() if value is not None})
    total = sum(os.path.getsize(path) for path in arguments.source if os.path.isfile(path))
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        report = convert_texts(
            arguments.source,
            arguments.path,
            arguments.tokenizer,
            how,
            pack=arguments.pack,
            overwrite=arguments.overwrite,
            progress=bar.update,
        )
    print("\n".join(wrapped(line) for line in _told(arguments, report)))
    return 0


def _told(arguments: argparse.Namespace, report: Report) -> Iterator[str]:
    """Say what was written, and what may be a mistake."""
    yield (
        f"{arguments.path}: {counted(report.texts, 'text')}, "
        f"{counted(report.tokens, 'token')} in {counted(report.items, 'item')}, "
        f"the longest of {report.longest}"
    )
    if report.beyond:
        yield (
            f"warning: {counted(report.beyond, 'text')} of more than {arguments.pack} tokens, "
            "each in an item of its own"
        )
    if report.unknown:
        yield (
            f"warning: {counted(report.unknown, 'token')} the tokenizer doesn't know, the first in "
            f"{report.first_unknown}: is it the model's own tokenizer, and the text as that wants "
            "it (upper case)?"
        )


def _convert_tensors(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mdattn_mpi.dataset import DatasetWriter
    from mdattn_mpi.dataset.making import shapes

    with ExitStack() as stack:
        sources = _sources(arguments, stack)
        tensors = [
            (source, tensor, shape)
            for source in sources
            for tensor, shape in shapes(source.item.problem).items()
        ]
        total = sum(2 * shape[0] * shape[1] * shape[2] for *_, shape in tensors)
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)
        )
        items = [source.item for source in sources]
        dataset = stack.enter_context(
            DatasetWriter(arguments.path, items, overwrite=arguments.overwrite)
        )
        for source, tensor, shape in tensors:
            for block in rounded_blocks(source, tensor, shape, arguments.source[0]):
                dataset.append(source.item, tensor, block)
                bar.update(block.nbytes)
        for source in sources:
            if source.sinks is not None:
                dataset.append(source.item, "sinks", source.sinks)
    print(f"{arguments.path}: {counted(len(sources), 'item')}, {quantity(total, 'B')}")
    for source in sources[:10]:
        print(f"  {source}")
    if len(sources) > 10:
        print(f"  … and {len(sources) - 10} more: mdattn inspect {arguments.path}")
    return 0


def _sources(arguments: argparse.Namespace, stack: ExitStack) -> list[Source]:
    """Find the items in the files."""
    from mdattn_mpi.dataset.foreign.items import find_sources
    from mdattn_mpi.dataset.foreign.names import OURS
    from mdattn_mpi.dataset.foreign.open import open_files
    from mdattn_mpi.dataset.hdf5 import format_of
    from mdattn_mpi.dataset.layout import DATASET_FORMAT

    patterns = _patterns(arguments)
    path = arguments.source[0]
    if patterns is None and format_of(path) == DATASET_FORMAT:
        patterns = OURS
    file = open_files(arguments.source, stack, arguments.allow or ())
    return find_sources(file, path, patterns, _reading(arguments))


def _patterns(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """The names that were given; None when there are none.

    Raises
    ------
    RejectedError
        They don't make a whole.

    """
    from mdattn_mpi.errors import RejectedError

    names = ("query", "key", "value", "kv", "qkv")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    for whole in (("query", "key", "value"), ("query", "kv"), ("qkv",)):
        if set(given) == set(whole):
            return tuple(given[name] for name in whole)
    if not given:
        return None
    raise RejectedError(
        f"these patterns make no whole: {', '.join(f'--{name}' for name in given)}",
        fix="give --query, --key and --value; or --query and --kv; or --qkv",
    )


def _reading(arguments: argparse.Namespace) -> Reading:
    from mdattn_mpi.dataset.foreign.items import Reading
    from mdattn_mpi.dataset.foreign.packing import Packing
    from mdattn_mpi.problem import scale_of

    return Reading(
        layout=arguments.layout,
        dtype=DTYPES.get(arguments.dtype),
        bits=DTYPES.get(arguments.bits),
        packing=Packing(arguments.heads, arguments.packed_dim),
        causal=arguments.causal,
        scale=None if arguments.scale is None else scale_of(arguments.scale),
        masks=_masks(arguments),
        ignore=tuple(arguments.ignore or ()),
    )


def _masks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Say what the user says of windows and soft caps."""
    given = {"window": arguments.window, "softcap": arguments.softcap}
    return {name: value for name, value in given.items() if value is not None}


def rounded_blocks(
    source: Source, tensor: Tensor, shape: tuple[int, int, int], file: str
) -> Iterator[np.ndarray[Any, Any]]:
    """Read a tensor by blocks of tokens and round it to the item's dtype.

    Raises
    ------
    RejectedError
        A finite number is too large for FP16.

    """
    import numpy as np

    from mdattn_mpi.dataset.dtypes import NUMPY, round_once
    from mdattn_mpi.errors import RejectedError
    from mdattn_mpi.problem import Span

    tokens, heads, dim = shape
    dtype = NUMPY[source.item.problem.dtype]
    step = max(1, BLOCK_BYTES // (2 * heads * dim))
    for start in range(0, tokens, step):
        block = source.read(tensor, Span(start, min(start + step, tokens)))
        rounded = round_once(block, dtype)
        if block.dtype != dtype and np.any(np.isinf(rounded) & np.isfinite(block)):
            raise RejectedError(
                f"{tensor} holds {np.max(np.abs(block)):.6g}, too large for {dtype.name}",
                fix="use --dtype bf16" if dtype.name == "float16" else "scale the numbers down",
                file=file,
                item=source.item.name,
            )
        yield rounded
