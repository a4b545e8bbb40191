"""Engines on disk. A serialized engine is native code: only what a manifest vouches for is run.

Beside ``X.engine`` lies ``X.engine.json``: the SHA-256 of the engine, what it was made for, and by
which library. The cache is a folder of such pairs, one a key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.files import cache_folder, is_private, write_whole
from mdattn_mpi.onnx.sharding import Sharding
from mdattn_mpi.trt.library import SM, Library, show_sm
from mdattn_mpi.trt.spec import EngineSpec

FORMAT = "mdattn-engine"
VERSION = 1
MAX_MANIFEST = 1 << 20
ATTENTION_TENSORS = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Manifest:
    """What is known of a serialized engine."""

    sha256: str  # of the serialized engine, as is `size`
    size: int
    flavour: str
    version: str
    sm: SM
    strategy: str
    ranks: int
    axes: dict[str, int]  # see `Sharding`
    spec: dict[str, Any]  # the attention that it computes, as `EngineSpec.facts`; {} for a model
    model: str = ""  # SHA-256 of the sharded ONNX model that it was built from
    collectives: dict[str, int] = field(default_factory=dict)  # of the network, by operation
    known: str = ""  # SHA-256 of what a model gives for known inputs, in a file beside; see `known`
    unproven: str = ""  # why there is no such file
    paddings: dict[str, int] = field(default_factory=dict)  # see `Sharding`

    def to_json(self) -> bytes:
        """Encode, readably."""
        return json.dumps(
            {"format": FORMAT, "format_version": VERSION, **asdict(self)}, indent=1
        ).encode()

    @staticmethod
    def from_json(data: bytes, path: Path) -> Manifest:
        """Decode; `path` is for the message."""
        try:
            fields = json.loads(data)
            found = (fields.pop("format"), fields.pop("format_version"))
            if found != (FORMAT, VERSION):
                raise ValueError(f"format {found[0]!r}, version {found[1]!r}")
            fields["sha256"] = f"{int(fields['sha256'], 16):064x}"
            fields["sm"] = (int(fields["sm"][0]), int(fields["sm"][1]))
            manifest = Manifest(**fields)
            if manifest.spec:
                manifest.attention()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise RejectedError(
                f"not an engine manifest ({error})", file=str(path), fix="build the engine again"
            ) from error
        return manifest

    @property
    def sharding(self) -> Sharding:
        """How it is shared."""
        return Sharding(self.strategy, self.ranks, self.axes, self.paddings)

    def attention(self) -> EngineSpec:
        """Make the `EngineSpec` of an attention engine."""
        return EngineSpec.from_facts(self.spec)


def sha256_of(engine: bytes | memoryview) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(engine).hexdigest()


def describe(
    engine: bytes | memoryview,
    library: Library,
    sm: SM,
    network: EngineSpec | Sharding,
    model: str = "",
    collectives: Mapping[str, int] | None = None,
) -> Manifest:
    """Make the manifest of an engine just built of `network`.

    Of a model, `model` is its SHA-256, and `collectives` counts what `EngineSpec` knows by itself.
    """
    spec, axes, paddings = {}, dict.fromkeys(ATTENTION_TENSORS, 0), {}
    if isinstance(network, EngineSpec):
        spec, collectives = network.facts(), network.collectives
    else:
        axes, paddings = network.axes, network.paddings
    return Manifest(
        sha256=sha256_of(engine),
        size=len(engine),
        flavour=library.flavour,
        version=library.version,
        sm=sm,
        strategy=network.strategy,
        ranks=network.ranks,
        axes=axes,
        spec=spec,
        model=model,
        collectives=dict(collectives or {}),
        paddings=paddings,
    )


def write_engine(
    path: Path, engine: bytes | memoryview, manifest: Manifest, known: bytes | memoryview = b""
) -> None:
    """Write `path`, its manifest and a known run of it; each appears whole or not at all.

    Raises
    ------
    RejectedError
        The folder can't be written.

    """
    try:
        write_whole(path, engine)
        if manifest.known:
            write_whole(known_path(path), known)
        write_whole(manifest_path(path), manifest.to_json())
    except OSError as error:
        raise RejectedError(
            f"cannot write the engine: {error.strerror}",
            file=str(path),
            fix="name a folder that is there, may be written and has room",
        ) from error


def manifest_path(engine: Path) -> Path:
    """``X.engine.json`` for ``X.engine``."""
    return engine.with_name(engine.name + ".json")


def known_path(engine: Path) -> Path:
    """``X.engine.known.npz`` for ``X.engine``."""
    return engine.with_name(engine.name + ".known.npz")


def read_known(path: Path, manifest: Manifest) -> bytes:
    """Read the known run of an engine; empty where it has none.

    Raises
    ------
    RejectedError
        Not there, or not what the manifest vouches for.

    """
    if not manifest.known:
        return b""
    known = _read(known_path(path), "what the engine gives for known inputs", "build it again")
    if sha256_of(known) != manifest.known:
        raise RejectedError(
            "this isn't what the engine was to give for known inputs",
            file=str(known_path(path)),
            fix="build the engine again",
        )
    return known


def read_engine(path: Path) -> tuple[bytes, Manifest]:
    """Read an engine and check it against its manifest; the bytes checked are those returned.

    Raises
    ------
    RejectedError
        Not there, no manifest, or not what the manifest vouches for.

    """
    engine = _read(path, "the engine", "check the path")
    listed = _read(
        manifest_path(path),
        "the manifest of an engine, and an engine is native code",
        "build it with `mdattn build`; or, if you trust where it comes from, vouch for it with "
        "`mdattn build --adopt`",
        MAX_MANIFEST,
    )
    manifest = Manifest.from_json(listed, manifest_path(path))
    found = sha256_of(engine)
    if found != manifest.sha256:
        raise RejectedError(
            f"SHA-256 is {found[:16]}…, the manifest says {manifest.sha256[:16]}…: the engine "
            "was changed or is incomplete",
            file=str(path),
            fix="build it again; don't run it",
        )
    return engine, manifest


def _read(path: Path, what: str, fix: str, most: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise RejectedError(
            f"cannot read {what}: {error.strerror}", file=str(path), fix=fix
        ) from error


def check_fits(manifest: Manifest, library: Library, sm: SM | None, ranks: int, file: str) -> None:
    """Refuse an engine of another library, another number of ranks or another GPU."""
    built_by = f"{manifest.flavour} {manifest.version}"
    if built_by != str(library):
        raise RejectedError(
            f"the engine was built by {built_by}, here is {library}",
            file=file,
            fix=f"build it again with {library}",
        )
    if manifest.ranks != ranks:
        raise RejectedError(
            f"the engine is for {manifest.ranks} ranks, this group has {ranks}",
            file=file,
            fix=f"use --group-size {manifest.ranks}, or build it with -n {ranks}",
        )
    if sm is not None and manifest.sm != sm:
        raise DeviceError(
            f"the engine is for SM {show_sm(manifest.sm)}, this GPU has SM {show_sm(sm)}",
            file=file,
            fix=f"build it for this GPU (mdattn build --sm {show_sm(sm)}), or use -b cuda",
        )


class Cache:
    """Built engines, by key, in a folder that only its owner may write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def default() -> Cache:
        """``$MDATTN_CACHE``, else ``mdattn`` in the user's cache folder."""
        return Cache(cache_folder("engines"))

    def get(self, key: str) -> tuple[bytes, Manifest] | None:
        """Return the engine of `key`; None where there is none, or one that isn't whole or ours."""
        try:
            return read_engine(self._path(key)) if is_private(self.folder) else None
        except (OSError, RejectedError):
            return None

    def get_known(self, key: str, manifest: Manifest) -> bytes:
        """Return the known run of an engine that is here; empty where it can't be read."""
        try:
            return read_known(self._path(key), manifest)
        except RejectedError:
            return b""

    def put(
        self, key: str, engine: bytes | memoryview, manifest: Manifest, known: bytes = b""
    ) -> None:
        """Keep an engine. A cache that can't be written is no cache: nothing is raised."""
        with suppress(OSError, RejectedError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_engine(self._path(key), engine, manifest, known)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.engine"
