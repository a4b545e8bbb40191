"""Compare an output with attention computed in float64 from the dataset, and every shard's bytes
with the checksum that its rank noted.

  mdattn verify out.h5
  mdattn verify out.h5 --data data.h5      (where the dataset was moved)

Of every item, every number is looked at: it must be finite, and lie between the smallest and the
largest value that its row sees, as any weighted mean does; rows that see no key must be 0. Compared
with float64 are the first and the last row, both sides of every border between shards, and some
rows at random. A number elsewhere that is wrong but could be a mean of its row's values, and whose
checksum fits, is seen by --all only.

How much error is allowed follows from how an engine has to round; "used" says how much of that an
item takes up at its worst row and head. Rows that see an input which isn't finite can't be judged;
an item of which none can is "not judged". One process does it, without MPI, on a file that may
still be written by others.

What a model gave is compared with the model itself, whole in one process and in float32:

  mdattn verify out.h5 --data tokens.h5 --model DIR

Items are drawn, and of long ones the first --tokens are compared where the model is causal; what
wasn't compared is said. Allowed is 3 times the error that the model makes in the output's dtype in
one process, 4 times at the worst token. Shards of all items are compared with their checksums.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING

from mdattn_mpi.cli.options import add_opening_options
from mdattn_mpi.errors import RejectedError, VerificationError
from mdattn_mpi.text import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mdattn_mpi.dataset import Output
    from mdattn_mpi.verifier.check import ItemReport
    from mdattn_mpi.verifier.transformer import ModelReport

    AnyReport = ItemReport | ModelReport


EPILOG = """\
Exit codes: 0 everything is right; 1 something is wrong, couldn't be judged, or isn't finished
(--partial lets that pass); 2 the files can't be used.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("output", metavar="OUT.h5", help="the output")
    add(
        "--data",
        metavar="DATA.h5",
        help="the dataset that it was made from (default: the path that it names)",
    )
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--rows", type=_count, metavar="N", help="random rows an item (default: 64)")
    rows.add_argument("--all", action="store_true", help="all rows; of a model, all items")
    add("--items", default="*", metavar="PATTERN", help="only these: names or globs, with commas")
    add("--seed", type=_count, default=0, metavar="N", help="of what is drawn (default: 0)")
    add("--partial", action="store_true", help="let it pass that items aren't finished")
    add("--other-data", action="store_true", help="compare even if dataset or model differ")
    add("-b", "--backend", metavar="NAME", help="what computed it, if not what the output names")
    add_opening_options(parser)
    add("--json", action="store_true", help="print what was found as JSON")
    add = parser.add_argument_group("what a model gave").add_argument
    add("--model", metavar="DIR", help="the model's folder")
    add("--sample", type=_count, metavar="N", help="items to compare (default: 16)")
    add("--tokens", type=_count, metavar="N", help="of an item at most (default: 2048)")
    add("--device", metavar="NAME", help="where the model runs: cpu (default), cuda:0, …")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def main(arguments: argparse.Namespace) -> int:
    """Verify; return 0.

    Raises
    ------
    VerificationError
        Something is wrong or isn't finished; everything has been looked at and printed.
    RejectedError
        The files can't be used.

    """
    _check_options(arguments)
    reports: list[AnyReport] = []
    table = _Table(arguments.json, "tokens" if arguments.model else "rows")
    for report in _model_reports(arguments) if arguments.model else _reports(arguments):
        table.add(report)
        reports.append(report)
    _conclude(arguments, reports)
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options of the other kind of output."""
    of_model = bool(arguments.model)
    others = ("rows", "backend") if of_model else ("sample", "tokens", "device")
    wrong = next((name for name in others if getattr(arguments, name) is not None), None)
    if wrong:
        raise RejectedError(
            f"--{wrong} with{'' if of_model else 'out'} --model", fix=f"leave --{wrong} out"
        )


def _model_reports(arguments: argparse.Namespace) -> list[ModelReport]:
    from mdattn_mpi.dataset import open_output
    from mdattn_mpi.verifier.transformer import Extent, verify

    given = {"items": arguments.sample, "tokens": arguments.tokens, "device": arguments.device}
    extent = Extent(seed=arguments.seed, **{n: v for n, v in given.items() if v is not None})
    with open_output(arguments.output) as output:
        arguments.data = arguments.data or _named_input(output)
        return verify(
            output,
            arguments.data,
            arguments.model,
            arguments.items,
            replace(extent, items=None) if arguments.all else extent,
            allow=arguments.allow or (),
            ignore=arguments.ignore or (),
            other=arguments.other_data,
        )


def _reports(arguments: argparse.Namespace) -> Iterator[ItemReport]:
    from mdattn_mpi.dataset import open_output
    from mdattn_mpi.verifier.check import Options, check, open_input, pair

    rows = 64 if arguments.rows is None else arguments.rows
    options = Options(None if arguments.all else rows, arguments.seed, arguments.backend)
    with open_output(arguments.output) as output:
        arguments.data = arguments.data or _named_input(output)
        with open_input(
            output,
            arguments.data,
            allow=arguments.allow or (),
            ignore=arguments.ignore or (),
            other=arguments.other_data,
        ) as dataset:
            for items in pair(output, dataset, arguments.items):
                yield check(output, dataset, items, options)


def _named_input(output: Output) -> str:
    """Find the dataset at the path that the output notes."""
    path = str(output.attributes.get("input_path", ""))
    if not os.path.isfile(path):
        raise RejectedError(
            f"was made from {path or 'a dataset that it does not name'}, which isn't there",
            fix="name the dataset: --data DATA.h5",
            file=output.path,
        )
    return path


class _Table:
    """Prints a line an item, as soon as it is known; what is wrong below it."""

    def __init__(self, quiet: bool, rows: str) -> None:
        self.quiet = quiet
        self._head = f"{'item':<28}{rows:>7}{'error':>10}{'allowed':>10}{'used':>6}  shards"

    def add(self, report: AnyReport) -> None:
        """Print one item."""
        if self.quiet or report.verdict == "by checksum":
            return
        if self._head:  # not before: what can't be verified has no table
            print(self._head)
            self._head = ""
        name, found = report.item.name, report.cells
        name = name if len(name) <= 27 else name[:26] + "…"
        line = f"{name:<28}"
        if found is not None:
            ranks = report.entry.ranks
            share = f"{found.used:.0%}" if found.used < 9.995 else "> 9×"
            good = ranks - len(report.bad_shards)
            line += f"{found.rows:>7}"
            measures = f"{found.error:>10.1e}{found.allowed:>10.1e}{share:>6}"
            line += measures if found.judged else " " * len(measures)
            line += f"  {good}/{ranks}"
        print(f"{line:<70} {report.verdict}", flush=True)
        for complaint in report.complaints():
            lines = textwrap.wrap(complaint, 78, initial_indent="  ", subsequent_indent="    ")
            print(*lines, sep="\n", flush=True)


def _conclude(arguments: argparse.Namespace, reports: list[AnyReport]) -> None:
    count = {
        verdict: sum(report.verdict == verdict for report in reports)
        for verdict in ("right", "wrong", "not judged", "by checksum", "unfinished")
    }
    bad = count["wrong"] or count["not judged"] or (count["unfinished"] and not arguments.partial)
    if arguments.json:
        _print_json(arguments, reports, count, exit_code=1 if bad else 0)
    else:
        summary = ", ".join(f"{number} {verdict}" for verdict, number in count.items() if number)
        print(f"{arguments.output}: {counted(len(reports), 'item')}, {summary}")
    if count["wrong"]:
        raise VerificationError(
            f"{count['wrong']} of {len(reports)} items are wrong",
            fix="look for a failing disk or device (`mdattn doctor`), then add --items NAME --redo "
            "to the `mdattn run` that made it",
            file=arguments.output,
        )
    if count["not judged"]:
        raise VerificationError(
            f"{count['not judged']} of {len(reports)} items could not be judged"
            + ("" if arguments.model else ": no row that was looked at has a finite input"),
            fix="compare more: --tokens, --sample; or look at the reasons above"
            if arguments.model
            else "correct the dataset, and run without --nonfinite pass",
            file=arguments.output,
        )
    if bad:
        raise VerificationError(
            f"{count['unfinished']} of {len(reports)} items aren't finished",
            fix="run the same `mdattn run` again, or verify with --partial",
            file=arguments.output,
        )


def _print_json(
    arguments: argparse.Namespace, reports: list[AnyReport], count: dict[str, int], exit_code: int
) -> None:
    import json

    facts = {
        "output": arguments.output,
        "data": arguments.data,
        "seed": arguments.seed,
        **{verdict.replace(" ", "_"): number for verdict, number in count.items()},
        "exit_code": exit_code,
        "items": [report.to_json() for report in reports],
    }
    print(json.dumps(facts, indent=1))
