"""What the user asked for: one frozen description, from the command line or a job file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mdattn_mpi.errors import RejectedError

MAX_JOB_FILE = 1 << 20
MAX_COMMIT_EVERY = 1.0  # seconds of finished items that kill -9 may cost


@dataclass(frozen=True)
class JobSpec:
    """One batch job: ``mdattn run``'s arguments, under the same names as in a job file."""

    data: str
    output: str
    backend: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    strategy: Literal["auto", "ring", "allgather", "ulysses", "hierarchical"] = "auto"
    lse: bool = False
    items: str = "*"
    layout: Literal["auto", "token_major", "head_major"] = "auto"
    nonfinite: Literal["refuse", "pass"] = "refuse"
    overwrite: bool = False
    redo: str = ""
    allow_change: bool = False
    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    threads: int = 0
    deadline: float = 0.0
    max_time: float = 0.0
    commit_every: float = 0.0
    group_size: str = "all"
    transfer: Literal["auto", "copy", "nccl"] = "auto"
    kernel: Literal["auto", "cudnn", "flash"] = "auto"
    engine: str = ""
    bind: tuple[str, ...] = ()
    model: str = ""
    give: str = "last_hidden_state"
    pool: Literal["mean", "last", "first"] = "mean"
    dtype: Literal["bf16", "fp16"] = "bf16"
    beyond_positions: bool = False
    chaos: str = ""
    dry_run: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise RejectedError(f"{name} is {value!r}", fix=f"use one of {', '.join(choices)}")
        for name in ("threads", "deadline", "max_time", "commit_every"):
            if getattr(self, name) < 0:
                raise RejectedError(
                    f"{name} is {getattr(self, name)}", fix="use 0 (automatic) or more"
                )
        if not self.commit_every <= MAX_COMMIT_EVERY:
            raise RejectedError(
                f"commit_every is {self.commit_every:g} s: after kill -9 as much of finished items "
                "would be done again",
                fix=f"use {MAX_COMMIT_EVERY:g} (second) at most, or leave it out",
            )
        if self.group_size not in ("all", "auto") and not self.group_size.isdecimal():
            raise RejectedError(
                f"group_size is {self.group_size!r}", fix="use all, auto or a number of ranks"
            )
        if self.quiet and self.verbose:
            raise RejectedError("both quiet and verbose", fix="leave one of -q and -v out")
        if self.redo and self.overwrite:
            raise RejectedError(
                "both redo and overwrite", fix="leave --redo out to compute all items again"
            )
        if self.bind and not self.engine and not self.model.endswith(".onnx"):
            raise RejectedError(
                "--bind without --engine", fix="name the model's engine: --engine FILE"
            )
        if Path(self.data).resolve() == Path(self.output).resolve():
            raise RejectedError(
                "the output is the dataset itself", file=self.output, fix="name another output file"
            )


def load_job_file(path: str) -> dict[str, Any]:
    """Read a TOML job file: a flat table with the fields of `JobSpec`.

    ``data``, ``output`` and ``model`` are taken relative to the job file's folder.

    Raises
    ------
    RejectedError
        Not there, too large, not TOML, an unknown key, or a value of the wrong type.

    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        raw = Path(path).read_bytes()
        if len(raw) > MAX_JOB_FILE:
            raise RejectedError(
                f"{len(raw)} bytes are too many for a job file",
                file=path,
                fix=f"keep it under {MAX_JOB_FILE} bytes; was this meant as the dataset?",
            )
        table: dict[str, Any] = tomllib.loads(raw.decode())
    except OSError as error:
        raise RejectedError(
            f"cannot read the job file: {error.strerror}", file=path, fix="check the path"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RejectedError(
            f"not a TOML job file: {error}", file=path, fix="write lines like: strategy = 'ring'"
        ) from error
    _check(table, path)
    folder = Path(path).resolve().parent
    for name in ("data", "output", "model"):
        if name in table:
            table[name] = str(folder / table[name])
    return {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}


def _check(table: Mapping[str, Any], path: str) -> None:
    known = {field.name: field for field in fields(JobSpec)}
    for name, value in table.items():
        if name not in known:
            raise RejectedError(
                f"unknown key {name!r}", file=path, fix=f"use some of {', '.join(sorted(known))}"
            )
        default = known[name].default
        wanted = str if default is MISSING else type(default)
        fits = (
            isinstance(value, list) and all(isinstance(part, str) for part in value)
            if wanted is tuple
            else type(value) is wanted or (wanted is float and type(value) is int)
        )
        if not fits:
            raise RejectedError(
                f"{name} is {value!r}", file=path, fix=f"give it as {_TOML_NAMES[wanted]}"
            )


_TOML_NAMES: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number of seconds",
    tuple: "a list of strings",
}
