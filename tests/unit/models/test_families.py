"""Ten families on several ranks, as in one process: hidden states, and the proof before the job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.tiny_models import CAUSAL, FAMILIES, hidden_state, random_ids, tiny_model

pytest.importorskip("transformers", reason="needs the extra transformers")

import numpy as np
import torch

from mdattn_mpi.models.attention import SharedAttention, StrategyWish
from mdattn_mpi.models.folder import open_folder
from mdattn_mpi.models.load import load, skeleton
from mdattn_mpi.models.network import Network
from mdattn_mpi.models.proof import Proof, prove
from mdattn_mpi.models.sequence import TokenSequence, owners_of
from mdattn_mpi.problem import FLAT_STRATEGIES
from tests.support.model_ranks import on_ranks

TOKENS = 53
IDS = random_ids(TOKENS).numpy()


def shared_run(
    family: str,
    ranks: int,
    strategy: StrategyWish,
    tokens: int = TOKENS,
    starts: Sequence[int] = (0,),
) -> tuple[Any, list[Proof]]:
    """Hidden states of all ranks put together, and the proofs that the ranks made."""

    def body(network: Network, device: Any, group: Any) -> Any:
        proof = prove(network, device, "cpu", group, strategy)
        owners = owners_of(tokens, ranks, network.causal)
        sequence = TokenSequence(IDS[:tokens], np.array(starts), owners[device.rank])
        shared = SharedAttention(device, "cpu", owners, strategy, tuple(starts))
        hidden = network.run(sequence, shared)
        return sequence.places, hidden.float(), proof

    found = on_ranks(ranks, tiny_model(family), body)
    places = np.concatenate([places for places, _, _ in found])
    assert sorted(places) == list(range(tokens))
    hidden = torch.cat([hidden for _, hidden, _ in found])[np.argsort(places)]
    return hidden, [proof for _, _, proof in found]


def distance(found: Any, right: Any) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_tells_what_the_model_does(family: str) -> None:
    folder = open_folder(tiny_model(family))
    bare, whole = (
        Network(make(folder))
        for make in (
            lambda folder: skeleton(folder, "bfloat16"),
            lambda folder: load(folder, "bfloat16", "cpu"),
        )
    )
    facts = [(one.name, one.causal, one.width, one.longest, one.dtype) for one in (bare, whole)]
    assert facts[0] == facts[1]
    assert bare.causal == (family in CAUSAL)
    assert all(parameter.is_meta for parameter in bare.backbone.parameters())


@pytest.mark.parametrize("strategy", FLAT_STRATEGIES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_together_are_as_exact_as_one_process(
    family: str, ranks: int, strategy: StrategyWish
) -> None:
    folder = tiny_model(family)
    right = hidden_state(folder, IDS)
    alone = distance(hidden_state(folder, IDS, "bfloat16").float(), right)
    hidden, proofs = shared_run(family, ranks, strategy)
    assert 0 < distance(hidden, right) <= 2 * alone
    for proof in proofs:
        proof.check()
        assert not any(place.inconclusive for place in proof.places)
        assert len(proof.places) == 2 * 3 + 1  # every attention twice, and the end
        controls = [place.control for place in proof.places]
        assert controls == [None] * 7 if ranks == 1 else min(filter(None, controls)) > 0.1


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_rank_may_have_no_token(family: str) -> None:
    hidden, _ = shared_run(family, 3, "ring", tokens=2)
    right = hidden_state(tiny_model(family), IDS[:2])
    assert distance(hidden, right) < 0.03


@pytest.mark.parametrize("strategy", FLAT_STRATEGIES)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("family", ["llama", "roberta", "gpt2", "gpt-oss", "modernbert"])
def test_packed_documents_are_as_each_alone(
    family: str, ranks: int, strategy: StrategyWish
) -> None:
    starts = (0, 1, 20, 41)
    hidden, _ = shared_run(family, ranks, strategy, starts=starts)
    folder = tiny_model(family)
    documents = np.split(IDS, starts[1:])
    right = torch.cat([hidden_state(folder, ids) for ids in documents])
    apart = [hidden_state(folder, ids, "bfloat16").float() for ids in documents]
    assert distance(hidden, right) <= 2 * distance(torch.cat(apart), right)
    assert distance(hidden_state(folder, IDS), right) > 0.1  # packed or not makes a difference
