"""Loading a folder's model: its weights on a device, its attention ours or its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.models import check_installed
from mdattn_mpi.models.folder import ModelFolder

if TYPE_CHECKING:
    import torch

DTypeName = Literal["bfloat16", "float16", "float32"]


def load(
    folder: ModelFolder,
    dtype: DTypeName,
    device: str,
    attention: Literal["mdattn", "eager"] = "mdattn",
    *,
    head: bool = False,
    threads: int = 0,
) -> torch.nn.Module:
    """Load the model of `folder`, in eval mode, without code of the folder.

    Parameters
    ----------
    dtype
        Of weights and activations, whatever the folder's. Ours takes 16 bits only.
    device
        PyTorch's name, such as ``cpu`` or ``cuda:0``.
    attention
        ``mdattn``: ours, for use within `attention.attending`. ``eager``: the model's own, in one
        process, with the model's own masks.
    head
        Keep what makes logits of hidden states; a causal language model's.
    threads
        Of PyTorch on the CPU; 0 leaves them as they are.

    Returns
    -------
    torch.nn.Module
        Transformers' ``AutoModel``, or ``AutoModelForCausalLM`` with a `head`.

    Raises
    ------
    RejectedError
        PyTorch or Transformers isn't installed or too old, an architecture that Transformers
        doesn't know, weights that don't fit the config.

    """
    check_installed()
    import torch

    if threads:
        torch.set_num_threads(threads)
    if device != "cpu":
        torch.cuda.set_device(device)  # streams and pinned memory are those of the current one
    if attention == "mdattn":
        from mdattn_mpi.models.attention import register

        register()
    with _refusals(folder):
        kind, config = _architecture(folder, head)
        model, about = kind.from_pretrained(
            folder.path,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    _check_loaded(folder, about)
    loaded: torch.nn.Module = model.eval().requires_grad_(False).to(device)
    return loaded


def skeleton(folder: ModelFolder, dtype: DTypeName, *, head: bool = False) -> torch.nn.Module:
    """The same model without any weights, on PyTorch's meta device: what can be told before it.

    Raises
    ------
    RejectedError
        As `load`, but for the weights.

    """
    check_installed()
    import torch

    with _refusals(folder), torch.device("meta"):
        kind, config = _architecture(folder, head)
        model: torch.nn.Module = kind.from_config(config, dtype=getattr(torch, dtype))
    return model.eval()


def _architecture(folder: ModelFolder, head: bool) -> tuple[Any, Any]:
    """Transformers' class and config for a folder."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # a bar a rank
    config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    return transformers.AutoModelForCausalLM if head else transformers.AutoModel, config


@contextmanager
def _refusals(folder: ModelFolder) -> Iterator[None]:
    import transformers

    try:
        yield
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise RejectedError(
            f"Transformers {transformers.__version__} can't load it: {error}",
            fix="use an architecture that it knows, or update it",
            file=str(folder.path),
        ) from error


def _check_loaded(folder: ModelFolder, about: dict[str, Any]) -> None:
    """Refuse weights that were made up because the folder has none of that name."""
    missing = sorted(name for name in about["missing_keys"] if "pooler" not in name)
    if missing:
        raise RejectedError(
            f"has no weights for {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            fix="use the folder of the whole model; a head can only be had of a model that has one",
            file=str(folder.path),
        )
