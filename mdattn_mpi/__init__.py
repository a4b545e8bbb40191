"""Exact attention over very long sequences on many ranks, in batch, under MPI."""
