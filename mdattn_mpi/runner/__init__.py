"""The batch loop: read, agree, enqueue, write, commit."""
