"""The engine of a model, one sequence at a time: each rank brings its tokens of every input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.onnx.sharding import CAUSAL_KEYS, KEYS
from mdattn_mpi.partition import equal_shards, shard_length
from mdattn_mpi.problem import DTypeName, Span
from mdattn_mpi.trt.engine import Engine
from mdattn_mpi.trt.engine_room import EngineRoom
from mdattn_mpi.trt.gpu import Buffer, HostArray
from mdattn_mpi.trt.store import Manifest


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model: its shape for a whole sequence, -1 for the tokens."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axis: int

    @property
    def dtype_name(self) -> DTypeName:
        """Its dtype, as a problem names it."""
        return "float16" if self.dtype == np.float16 else "bfloat16"

    def with_tokens(self, tokens: int) -> tuple[int, ...]:
        """Put a number of tokens into the shape."""
        return (*self.shape[: self.axis], tokens, *self.shape[self.axis + 1 :])


class Model:
    """A loaded model engine of one group.

    Parameters
    ----------
    room
        Where it is loaded.
    path
        The engine's file.

    Attributes
    ----------
    manifest
        How it is sharded, and what for.
    inputs, outputs
        The tensors that are bound; `keys` and its like are filled in here.

    Raises
    ------
    RejectedError, DeviceError
        It is an engine of plain attention, doesn't fit, or can't be loaded.

    """

    def __init__(self, room: EngineRoom, path: Path) -> None:
        made = room.share_file(path)
        if made.manifest.spec:
            raise RejectedError(
                "this is an engine of plain attention, not of a model",
                file=str(path),
                fix="leave --bind out",
            )
        self.manifest: Manifest = made.manifest
        self._room = room
        self._engine: Engine = room.load(made)
        names = self._engine.inputs
        counts = {name: self.manifest.sharding.counts_keys(name) for name in names}
        self._numbers = {name: kind for name, kind in counts.items() if kind}
        self.inputs = self._tensors(name for name in names if name not in self._numbers)
        self.outputs = self._tensors(self._engine.outputs)

    def _tensors(self, names: Any) -> tuple[Tensor, ...]:
        return tuple(self._tensor(name) for name in names)

    def _tensor(self, name: str) -> Tensor:
        axis = self.manifest.axes.get(name)
        if axis is None:
            raise RejectedError(
                f"{name!r} has no dim that counts tokens; only such tensors can be bound",
                fix="make it a constant of the model",
            )
        shape = tuple(
            -1 if position == axis else max(1, dim)  # other dynamic dims were built as 1
            for position, dim in enumerate(self._engine.declared_shape(name))
        )
        return Tensor(name, shape, self._engine.dtype(name), axis)

    def shards(self, tokens: int) -> tuple[Span, ...]:
        """Tell which tokens of a sequence each rank brings and gets.

        Raises
        ------
        RejectedError
            ``ring`` takes equal shards only.

        """
        ranks = self.manifest.ranks
        if self.manifest.strategy == "ring" and tokens % ranks:
            raise RejectedError(
                f"{tokens} tokens on {ranks} ranks: TensorRT's multi-device attention takes equal "
                "shards",
                fix="shard the model with -s allgather or -s ulysses",
            )
        return equal_shards(tokens, ranks)

    def run(self, tokens: int, given: Mapping[str, HostArray]) -> dict[str, HostArray]:
        """Collective. Run one sequence; waits for the result.

        Parameters
        ----------
        tokens
            Of the whole sequence.
        given
            This rank's shard of every input.

        Returns
        -------
        This rank's shard of every output.

        """
        engine, gpu, rank = self._engine, self._room.gpu, self._room.group.rank
        own = len(self.shards(tokens)[rank])
        length = shard_length(tokens, self.manifest.ranks)
        buffers: dict[str, Buffer] = {}
        for tensor in self.inputs:
            shape = tensor.with_tokens(length)
            buffers[tensor.name] = gpu.buffer(_size(shape, tensor.dtype))
            gpu.upload(_filled(given[tensor.name], shape), buffers[tensor.name])
            engine.set_input(tensor.name, buffers[tensor.name].address, shape)
        numbers = self._bind_numbers(tokens, length)
        for tensor in self.outputs:
            shape = engine.output_shape(tensor.name)
            if shape != tensor.with_tokens(length):
                raise DeviceError(
                    f"{tensor.name!r} comes as {list(shape)}, for {length} tokens a rank",
                    fix="the number of tokens must go through the model unchanged",
                )
            buffers[tensor.name] = gpu.buffer(_size(shape, tensor.dtype))
            engine.set_output(tensor.name, buffers[tensor.name].address)
        gpu.uploads_before_compute()
        engine.enqueue(gpu.stream)
        outputs = {
            tensor.name: self._fetch(tensor, buffers, length, own) for tensor in self.outputs
        }
        for buffer in buffers.values():
            gpu.give_back(buffer)
        del numbers  # until here the engine may read them
        return outputs

    def _bind_numbers(self, tokens: int, length: int) -> dict[str, npt.NDArray[np.int64]]:
        values = {KEYS: tokens, CAUSAL_KEYS: (self._room.group.rank + 1) * length}
        numbers = {name: np.array([values[kind]], np.int64) for name, kind in self._numbers.items()}
        for name, number in numbers.items():
            self._engine.set_host_input(name, number)
        return numbers

    def _fetch(
        self, tensor: Tensor, buffers: Mapping[str, Buffer], length: int, own: int
    ) -> HostArray:
        gpu = self._room.gpu
        shape = tensor.with_tokens(length)
        array, arrived = gpu.download(buffers[tensor.name], shape, tensor.dtype, gpu.mark())
        arrived.sync()
        index = (slice(None),) * tensor.axis + (slice(own),)
        return array[index]


def _size(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def _filled(array: HostArray, shape: tuple[int, ...]) -> HostArray:
    """Put zeros behind the tokens of a shard that is shorter than the others."""
    if array.shape == shape:
        return array
    filled = np.zeros(shape, array.dtype)
    filled[tuple(slice(count) for count in array.shape)] = array
    return filled
