"""The files: what they look like, reading by shard, writing, and the ledger."""
