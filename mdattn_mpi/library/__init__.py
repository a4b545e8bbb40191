"""Attention for other MPI programs, on the shards that their ranks already hold."""

from mdattn_mpi.library.attention import Attention, attention
from mdattn_mpi.library.call import Call
from mdattn_mpi.library.spans import Order, shard_spans

__all__ = ["Attention", "Call", "Order", "attention", "shard_spans"]
