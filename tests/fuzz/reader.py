"""What is fuzzed: opening and reading any bytes as a dataset, an output, or a foreign file.

``python -m tests.fuzz.reader FOLDER tests/fuzz/corpus [libFuzzer's options]`` runs atheris, which
looks for inputs that reach new code. Whatever happens must be an `MdattnError` or a result;
a crash, a hang or another exception is a finding, and found inputs go to FOLDER. ``python -m
tests.fuzz.reader --make-corpus`` writes the seeds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    """Fuzz, or make the corpus."""
    if sys.argv[1:] == ["--make-corpus"]:
        make_corpus()
        return
    import atheris

    with atheris.instrument_imports(include=["mdattn_mpi"]):
        import mdattn_mpi.dataset
        import mdattn_mpi.dataset.foreign.open  # noqa: F401
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as tmp:
        path = os.path.join(tmp, "input")
        atheris.Setup(sys.argv, lambda data: read_any(path, data))
        atheris.Fuzz()


def read_any(path: str, data: bytes) -> list[str]:
    """Write `data` to `path` and read it in every way; say what came of each."""
    from mdattn_mpi.errors import MdattnError

    with open(path, "wb") as file:
        file.write(data)
    outcomes = []
    for read in (read_dataset, read_output, read_foreign):
        try:
            read(path)
            outcomes.append("read")
        except MdattnError as error:
            if not str(error).replace("\n", " ").isprintable():
                raise RuntimeError(f"a message could drive a terminal: {str(error)!a}") from None
            outcomes.append(type(error).__name__)
    return outcomes


def read_dataset(path: str) -> None:
    """Open it, read what is small, compute checksums."""
    from mdattn_mpi.dataset import open_dataset
    from mdattn_mpi.dataset.layout import TENSORS
    from mdattn_mpi.problem import Span

    with open_dataset(path, keep_faults=True) as dataset:
        for item in dataset.items[:3]:
            for name in TENSORS:
                tokens = min(dataset.tensor(item, name).shape[0], 100)
                dataset.read(item, name, (Span(0, tokens),))
                dataset.checksum(item, name)
        assert dataset.digest


def read_output(path: str) -> None:
    """Open it, read the ledger and what is small."""
    from mdattn_mpi.dataset import open_output

    with open_output(path) as output:
        for item, entry in zip(output.items, output.ledger.entries(), strict=True):
            for spans in entry.shards[:3]:
                output.checksum(item, spans)


def read_foreign(path: str) -> None:
    """List the tensors, and read the beginning of each."""
    from mdattn_mpi.dataset.foreign.open import open_foreign
    from mdattn_mpi.errors import RejectedError

    with ExitStack() as stack:
        for tensor in list(open_foreign(path, stack).tensors.values())[:5]:
            if tensor.fault is None and tensor.shape and min(tensor.shape):
                try:
                    tensor.fetch(tuple(slice(0, min(n, 3)) for n in tensor.shape))
                except (ValueError, OSError) as error:
                    raise RejectedError(f"{type(error).__name__}", fix="-") from error


def make_corpus() -> None:
    """Write small files of every kind, sound and damaged."""
    import h5py
    import numpy as np

    from mdattn_mpi.cli import main as mdattn
    from mdattn_mpi.dataset import create_output, open_dataset, open_output
    from mdattn_mpi.problem import Span
    from tests.support.dataset_files import FLOAT16, How, random_tensors, write_dataset

    tensors = random_tensors((5, 4, 2, 1, 4, 4), dtype=FLOAT16, seed=0)
    ours = CORPUS / "ours.h5"
    shape = "--items 2 --length 6 --q-heads 2 --kv-heads 1 --head-dim 4 --overwrite"
    mdattn(["make-data", str(ours), *shape.split(), "--quiet"])
    mdattn(["make-data", str(CORPUS / "uint16.h5"), *shape.split(), "--encoding=uint16", "--quiet"])
    for name, storage in (
        ("plain", {}),
        ("gzip", {"chunks": (2, 1, 4), "compression": "gzip", "shuffle": True, "fletcher32": True}),
    ):
        attributes = {"x": {"causal": "upper_left", "scale": 0.5}}
        write_dataset(CORPUS / f"{name}.h5", {"x": tensors}, How(storage=storage), attributes)
    with h5py.File(CORPUS / "links.h5", "w") as file:
        file.attrs.update({"format": "mdattn-dataset", "version": 1})
        file["items/x/query"] = h5py.ExternalLink("ours.h5", "/items/item0/query")
        file["items/x/key"] = h5py.SoftLink("/items/x/query")
        file.create_dataset("items/x/value", (5, 2, 4), "f2", external=[("ours.h5", 0, 80)])
    with open_dataset(ours) as dataset:
        create_output(CORPUS / "output.h5", dataset.items, ranks=1, lse=True, overwrite=True)
    with open_output(CORPUS / "output.h5", writable=True) as output:
        item, whole = output.items[0], [Span(0, 6)]
        out, lse = (np.ones_like(output.read(item, name)) for name in ("output", "lse"))
        crc32 = output.write(item, whole, {"output": out, "lse": lse})
        output.ledger.commit(item, [crc32], "ring", [whole])
        output.ledger.fail(output.items[1], "no")
    np.savez_compressed(CORPUS / "a.npz", **tensors)
    from safetensors.numpy import save_file

    save_file(tensors, CORPUS / "a.safetensors")


if __name__ == "__main__":
    main()
