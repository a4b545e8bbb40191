"""A job that has nothing left to do is told so at once, whatever the number of its items.

A job that comes to its end with every item done leaves in the run folder what it knows: its input,
the files of its model and its output as they were seen, and a checksum of the ledger. The same
command again compares that with what is there now, and opens the files only where anything differs:
then whatever there is to say is said as ever. What is left there is never more than a reason not to
look.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mdattn_mpi import __version__
from mdattn_mpi.dataset.positioned import checksum
from mdattn_mpi.dataset.seen import Seen, look
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.files import write_whole
from mdattn_mpi.lockstep import World, together
from mdattn_mpi.runner.folder import run_folder
from mdattn_mpi.runner.job import Job
from mdattn_mpi.runner.jobspec import JobSpec

NAME = "finished.json"

# Options that change nothing of what a finished job has computed, or that never get here.
OF_THE_RUN = frozenset(
    (
        *("output", "overwrite", "redo", "allow_change", "dry_run", "chaos"),
        *("threads", "deadline", "max_time", "commit_every", "json", "quiet", "verbose"),
    )
)


def remember(job: Job, summary: dict[str, Any]) -> None:
    """Keep that all items of a job are done; on rank 0, once everything is on the disk."""
    if not _may_be_known(job.spec) or job.dataset.seen is None or job.sources is None:
        return
    assert job.output is not None
    if not all(job.output.ledger.done()):
        return
    ledger = sorted((each.offset, each.nbytes) for each in job.output.ledger.columns.values())
    with suppress(OSError, RejectedError):  # the next run looks for itself
        found = {
            "job": _facts(job.spec, job.world),
            "summary": summary,
            "input": job.dataset.seen,
            "sources": job.sources,
            "output": look(job.spec.output),
            "ledger": ledger,
            "crc32": _checksum(job.spec.output, ledger),
        }
        text = json.dumps({**found, "digest": _digest(found)})
        write_whole(run_folder(job.spec) / NAME, text)


def finished_before(spec: JobSpec, world: World) -> dict[str, Any] | None:
    """Collective. The summary of a job that is known to be finished; None where that isn't known.

    It is known where the same command, on as many ranks, ended with every item done, and none of
    the dataset, the model and the output has been touched since.
    """

    def known() -> bytes:
        if _may_be_known(spec):
            with suppress(OSError, RejectedError, ValueError, TypeError, LookupError):
                return json.dumps(_known(spec, world)).encode()
        return b"null"

    text = together(world, "finished", lambda: known() if world.rank == 0 else b"")
    summary: dict[str, Any] | None = json.loads(world.bcast_bytes(text))
    return summary


def _known(spec: JobSpec, world: World) -> dict[str, Any] | None:
    """The summary of the job that did all items; None, or an error, where that isn't known."""
    found = json.loads((run_folder(spec) / NAME).read_bytes())
    whole = found.pop("digest") == _digest(found)
    same = whole and (
        found["job"] == _facts(spec, world)
        and found["output"] == [*look(spec.output)]
        and found["input"] == [*look(spec.data)]
        and _untouched(spec, found["sources"])
        and found["crc32"] == _checksum(spec.output, found["ledger"])
    )
    summary: dict[str, Any] = found["summary"]
    return summary if same and os.access(run_folder(spec), os.W_OK) else None


def _may_be_known(spec: JobSpec) -> bool:
    """Whether nothing but the end of the job is wanted."""
    return not (spec.dry_run or spec.overwrite or spec.redo or spec.chaos)


def sources_of(spec: JobSpec) -> dict[str, Seen] | None:
    """Look at the files that go in beside the dataset; None where that can't be done.

    They are those of an engine, an ONNX model with the files of its weights, or all of a model's
    folder, whatever Transformers takes of it.
    """
    with suppress(OSError, RejectedError):  # whoever opens them says what is wrong
        paths = _named(spec)
        if spec.model.endswith(".onnx"):
            from mdattn_mpi.onnx.model import external_files, load_model

            path = Path(spec.model)
            paths += map(str, external_files(load_model(path), path))
        return {path: look(path) for path in paths}
    return None


def _named(spec: JobSpec) -> list[str]:
    """Files beside the dataset that the options tell, without opening one."""
    if spec.engine:
        from mdattn_mpi.trt.store import known_path, manifest_path

        engine = Path(os.path.abspath(spec.engine))
        beside = (manifest_path(engine), known_path(engine))
        return [str(path) for path in (engine, *beside) if path == engine or path.exists()]
    model = os.path.abspath(spec.model)
    if spec.model and os.path.isdir(model):
        return sorted(entry.path for entry in os.scandir(model) if entry.is_file())
    return [model] if spec.model else []


def _untouched(spec: JobSpec, sources: Mapping[str, Any]) -> bool:
    """Whether the files beside the dataset are those that were seen, and no others."""
    return {*_named(spec)} <= {*sources} and all(
        seen == [*look(path)] for path, seen in sources.items()
    )


def _facts(spec: JobSpec, world: World) -> dict[str, Any]:
    """What must be the same, as JSON has it."""
    fields = {name: value for name, value in asdict(spec).items() if name not in OF_THE_RUN}
    for name in ("data", "model", "engine"):
        fields[name] = fields[name] and os.path.realpath(fields[name])
    facts = {**fields, "ranks": world.size, "version": __version__}
    same: dict[str, Any] = json.loads(json.dumps(facts))
    return same


def _checksum(path: str, runs: list[tuple[int, int]]) -> int:
    """CRC-32 over the columns of a ledger."""
    fd, crc32 = os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0
    try:
        for offset, nbytes in runs:
            crc32 = checksum(fd, offset, nbytes, crc32)
    finally:
        os.close(fd)
    return crc32


def _digest(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
