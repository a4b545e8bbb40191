"""Whole transformers over sequences that a group of ranks holds together.

The only room that imports PyTorch and Transformers for work, and only when a model is wanted::

    folder       a model's folder: config and safetensors, refused or described, without PyTorch
    load         the folder's model on a device, its attention ours or its own
    attention    what stands in for the attention of every layer
    sequence     which tokens a rank holds, and at which positions the model sees them
    outputs      hidden states, pooled embeddings, log-probabilities
    proof        a short sequence on all ranks against the whole on one, before the job
    executor     a model as what the batch loop begins, enqueues and collects
"""

from importlib.util import find_spec

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.text import install

EXTRA = install("transformers")
PACKAGES = ("torch", "transformers", "safetensors")


def check_installed() -> None:
    """Refuse to go on without the extra.

    Raises
    ------
    RejectedError
        A package isn't installed; says how to install it.

    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise RejectedError(f"--model needs {', '.join(missing)}", fix=EXTRA)
