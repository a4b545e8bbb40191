"""TensorRT networks, one module a strategy.

All take ``query [L, Nq, H]``, ``key`` and ``value [L, Nkv, H]``, a rank's own tokens, and give
``output [L, Nq, H]``; some take ``keys [1]`` (int64, on the host), the number of keys that count.
"""

from __future__ import annotations

from typing import Any, Protocol

from mdattn_mpi.problem import AttentionProblem, Causal
from mdattn_mpi.trt.library import Library
from mdattn_mpi.trt.networks import allgather, ring, ulysses
from mdattn_mpi.trt.networks.draft import Draft
from mdattn_mpi.trt.spec import EngineSpec, Shapes
from mdattn_mpi.trt.versions import Form, form_for


class NetworkModule(Protocol):
    """What the module of a strategy has."""

    def refuse(self, problem: AttentionProblem, ranks: int) -> None:
        """Raise RejectedError for what can't be expressed, naming what can."""

    def mask(self, problem: AttentionProblem) -> Causal:
        """Choose the mask of the attention layer."""

    def shapes(self, problem: AttentionProblem, ranks: int, rank: int) -> Shapes:
        """Tell what `rank` hands to the engine."""

    def define(self, draft: Draft) -> None:
        """Write the network."""


NETWORKS: dict[str, NetworkModule] = {
    "ring": ring,
    "allgather": allgather,
    "ulysses": ulysses,
}


def form_of(library: Library, spec: EngineSpec) -> Form:
    """Choose the form of a network that `library` is known to do right."""
    return form_for(library.flavour, library.version, spec.strategy, spec.dtype, spec.ranks)


def define(library: Library, builder: Any, spec: EngineSpec, form: Form | None = None) -> Any:
    """Make the strongly typed ``INetworkDefinition`` of `spec`; by default in `form_of` it."""
    api = library.api
    flag = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    network.name = f"{spec.strategy}-{spec.ranks}"
    draft = Draft(api, network, spec, form or form_of(library, spec))
    NETWORKS[spec.strategy].define(draft)
    return network
