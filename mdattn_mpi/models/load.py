"""Loading a folder's model: its weights on a device, its attention ours or its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.models import check_installed
from mdattn_mpi.models.folder import CONFIG, ModelFolder
from mdattn_mpi.text import printable

if TYPE_CHECKING:
    import torch

DTypeName = Literal["bfloat16", "float16", "float32"]
MOST = 200  # characters of what Transformers says


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
        doesn't have, a config that makes no model, weights that don't fit it.

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
            ignore_mismatched_sizes=True,  # `_check_loaded` says which
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
    """Transformers' class and config for a folder, if it has the architecture."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # a bar a rank
    whose, file = f"Transformers {transformers.__version__}", str(folder.path / CONFIG)
    if folder.kind not in transformers.CONFIG_MAPPING:
        raise RejectedError(
            f"{whose}, which is installed here, has no architecture {printable(folder.kind)!r} "
            "(model_type)",
            fix="update it (pip install -U transformers), or use a model that it has",
            file=file,
        )
    config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    if head and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RejectedError(
            f"{whose} has no language model of architecture {folder.kind!r}",
            fix="leave logprobs out, or use a causal language model",
            file=file,
        )
    return transformers.AutoModelForCausalLM if head else transformers.AutoModel, config


@contextmanager
def _refusals(folder: ModelFolder) -> Iterator[None]:
    """Refuse a config that Transformers can't make a model of: any kind of error is its fault."""
    import transformers

    try:
        yield
    except (MemoryError, RejectedError):
        raise
    except Exception as error:
        if "out of memory" in str(error):
            raise
        words = " ".join(printable(error).split())
        words = words if len(words) <= MOST else words[:MOST].rpartition(" ")[0] + " …"
        if isinstance(error, KeyError):
            words = f"it has no {words}"
        raise RejectedError(
            f"Transformers {transformers.__version__} can't make a model of it: {words}",
            fix="correct the config, or save the model anew with save_pretrained(FOLDER)",
            file=str(folder.path / CONFIG),
        ) from error


def _check_loaded(folder: ModelFolder, about: dict[str, Any]) -> None:
    """Refuse weights that were made up because the folder has none of that name or shape."""
    missing = sorted(name for name in about["missing_keys"] if "pooler" not in name)
    wrong = [
        f"{name} is {list(found)}, where the config wants {list(wanted)}"
        for name, found, wanted in sorted(about["mismatched_keys"])
    ]
    if missing or wrong:
        listed = ", ".join((wrong or missing)[:3])
        more = len(wrong or missing) - 3
        raise RejectedError(
            ("" if wrong else "has no weights for ")
            + listed
            + (f", and {more} more" if more > 0 else ""),
            fix="take config and weights of one model; a head can only be had of a model that has "
            "one",
            file=str(folder.path),
        )
