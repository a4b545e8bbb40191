"""`mdattn_mpi.transformers.parallelize` in a program of its own, on real ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.support.ranks import on_ranks
from tests.support.tiny_models import hidden_state, make_model, random_ids, tiny_model

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.world import World

pytest.importorskip("transformers", reason="needs the extra transformers")

IDS = random_ids(37)


def distance(found: Any, right: Any) -> float:
    found, right = np.asarray(found, np.float64), np.asarray(right, np.float64)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


@on_ranks(2)
def test_a_program_of_its_own(world: World) -> None:
    from mdattn_mpi.transformers import parallelize

    together = parallelize(make_model("llama").bfloat16(), world.comm)
    assert "7 places of 57 random tokens on 2 ranks" in together.proof[0]
    out = together(IDS)
    right = hidden_state(tiny_model("llama"), IDS).numpy()
    assert out.places.tolist() == together.places(37).tolist()
    assert len(out.places) < 20
    assert distance(out.last_hidden_state.float().numpy(), right[out.places]) < 0.03
    assert distance(out.embedding(), right.mean(0)) < 0.03
    assert distance(out.embedding("last"), right[-1]) < 0.03
    own, total, perplexity = out.logprobs()
    sums = world.allgather(float(own.sum(dtype=float)))
    assert total == pytest.approx(sum(sums), rel=1e-6)
    assert perplexity == pytest.approx(np.exp(-total / 36))
    shorter = together(IDS[:11].numpy())
    assert distance(shorter.embedding(), hidden_state(tiny_model("llama"), IDS[:11]).mean(0)) < 0.03


@on_ranks(2)
def test_ranks_must_bring_the_same(world: World) -> None:
    from mdattn_mpi import DisagreementError, RejectedError
    from mdattn_mpi.transformers import parallelize

    with pytest.raises(DisagreementError, match="weights"):
        parallelize(make_model("bert", seed=world.rank).bfloat16(), world.comm)
    with pytest.raises(RejectedError, match="the model is in float32"):
        parallelize(make_model("bert"), world.comm)
    together = parallelize(make_model("bert").bfloat16(), world.comm)
    with pytest.raises(DisagreementError, match="ids"):
        together(IDS if world.rank else IDS.flip(0))
    with pytest.raises(RejectedError, match="give the integers of one sequence"):
        together(IDS[None])
    with pytest.raises(RejectedError, match="vocabulary"):
        together(IDS + world.rank * 90)
    with pytest.raises(RejectedError, match="gives no log-probabilities"):
        together(IDS).logprobs()
    assert distance(together(IDS).embedding(), hidden_state(tiny_model("bert"), IDS).mean(0)) < 0.03
