"""Write the worked example of docs/onnx.md: one attention block as an ONNX model.

    python docs/make_attention_block.py block.onnx

Hidden states ``[S, B, N·H]`` come in, ``hidden``; projections, RMSNorm of queries and keys,
attention, a last projection; the same shape comes out, ``output``. The shape of NVIDIA's
attention_mdtrt sample: 32 heads of 128, float16. The weights are random.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

EPSILON = 1e-6


def make_block(
    heads: int = 32,
    kv_heads: int = 32,
    head_dim: int = 128,
    *,
    steps: bool = False,
    causal: bool = False,
    joined: bool = False,
    seed: int = 0,
) -> onnx.ModelProto:
    """Make the model.

    Parameters
    ----------
    heads, kv_heads, head_dim
        Query heads, key and value heads, and their dim.
    steps
        Write the attention as MatMul–Softmax–MatMul, as opset 17 has to.
    causal
        No query sees a key behind it; not with `steps`.
    joined
        Hand ``[B, S, N·H]`` to the Attention operator instead of ``[B, N, S, H]``.
    seed
        Of the weights.

    """
    opset = 17 if steps else 23
    block = _Block(np.random.default_rng(seed), opset)
    width = heads * head_dim
    query = block.rms_norm(block.project("hidden", width, heads * head_dim, "q"), heads, head_dim)
    key = block.rms_norm(
        block.project("hidden", width, kv_heads * head_dim, "k"), kv_heads, head_dim
    )
    value = block.split(block.project("hidden", width, kv_heads * head_dim, "v"), kv_heads)
    order = (1, 0, 2, 3) if joined else (1, 2, 0, 3)  # from [S, B, N, H]
    query, key, value = (block.op("Transpose", [t], perm=order) for t in (query, key, value))
    if steps:
        attended = block.attention_in_steps(query, key, value, heads // kv_heads, head_dim)
    else:
        attended = block.attention(query, key, value, heads, kv_heads, causal, joined)
    back = (1, 0, 2) if joined else (2, 0, 1, 3)
    turned = block.op("Transpose", [attended], perm=back)
    if not joined:
        turned = block.reshape(turned, (0, 0, -1))
    block.project(turned, width, width, "o", output="output")
    shape = ["S", "B", width]
    graph = helper.make_graph(
        block.nodes,
        "attention_block",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT16, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT16, shape)],
        block.weights,
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="mdattn")


class _Block:
    def __init__(self, random: np.random.Generator, opset: int) -> None:
        self.random = random
        self.opset = opset
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def op(
        self, kind: str, inputs: list[str], *, output: str = "", name: str = "", **attributes: Any
    ) -> str:
        """Add a node; return its output."""
        made = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, inputs, [made], name=name or f"node_{made}", **attributes)
        )
        return made

    def constant(self, values: Any) -> str:
        """Add a weight; return its name."""
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def project(self, tensor: str, width: int, to: int, name: str, output: str = "") -> str:
        """``[S, B, width]`` to ``[S, B, to]``."""
        weight = self.random.standard_normal((width, to)) / np.sqrt(width)
        constant = self.constant(weight.astype(np.float16))
        return self.op("MatMul", [tensor, constant], name=f"{name}_projection", output=output)

    def reshape(self, tensor: str, shape: tuple[int, ...]) -> str:
        """Reshape; 0 keeps a dim, -1 is what is left."""
        return self.op("Reshape", [tensor, self.constant(np.array(shape, np.int64))])

    def split(self, tensor: str, heads: int) -> str:
        """``[S, B, N·H]`` to ``[S, B, N, H]``."""
        return self.reshape(tensor, (0, 0, heads, -1))

    def rms_norm(self, tensor: str, heads: int, head_dim: int) -> str:
        """Divide every head by its root mean square, in float32; then a learned scale."""
        wide = self.op("Cast", [self.split(tensor, heads)], to=TensorProto.FLOAT)
        square = self.op("Mul", [wide, wide])
        mean = self.mean(square)
        root = self.op("Sqrt", [self.op("Add", [mean, self.constant(np.float32(EPSILON))])])
        normal = self.op("Cast", [self.op("Div", [wide, root])], to=TensorProto.FLOAT16)
        gain = 1 + 0.1 * self.random.standard_normal(head_dim)
        return self.op("Mul", [normal, self.constant(gain.astype(np.float16))])

    def mean(self, tensor: str) -> str:
        """Take the mean over the last dim; the axes became an input with opset 18."""
        if self.opset < 18:
            return self.op("ReduceMean", [tensor], axes=[-1], keepdims=1)
        axes = self.constant(np.array([-1], np.int64))
        return self.op("ReduceMean", [tensor, axes], keepdims=1)

    def attention(
        self,
        query: str,
        key: str,
        value: str,
        heads: int,
        kv_heads: int,
        causal: bool,
        joined: bool,
    ) -> str:
        """Attend with the standard operator, ``[B, N, S, H]`` or ``[B, S, N·H]``."""
        attributes: dict[str, Any] = {"is_causal": 1} if causal else {}
        inputs = [query, key, value]
        if joined:
            inputs = [self.reshape(tensor, (0, 0, -1)) for tensor in inputs]
            attributes |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
        return self.op("Attention", inputs, name="attention", **attributes)

    def attention_in_steps(
        self, query: str, key: str, value: str, group: int, head_dim: int
    ) -> str:
        """Attend in single nodes, with the key and value heads repeated as exporters do."""
        if group > 1:
            key, value = (self.repeat(tensor, group, head_dim) for tensor in (key, value))
        turned = self.op("Transpose", [key], perm=[0, 1, 3, 2])
        scores = self.op("MatMul", [query, turned], name="scores")
        divisor = self.constant(np.float16(np.sqrt(head_dim)))
        weights = self.op("Softmax", [self.op("Div", [scores, divisor])], axis=-1, name="softmax")
        return self.op("MatMul", [weights, value], name="attend")

    def repeat(self, tensor: str, group: int, head_dim: int) -> str:
        """``[B, N, S, H]`` to ``[B, N·group, S, H]``, each head `group` times in a row."""
        wide = self.op("Unsqueeze", [tensor, self.constant(np.array([2], np.int64))])
        shape = self.constant(np.array([1, 1, group, 1, 1], np.int64))
        repeated = self.op("Expand", [wide, shape])
        heads = -1  # N · group
        return self.op(
            "Reshape",
            [repeated, self._merged(tensor, heads, head_dim)],
        )

    def _merged(self, tensor: str, heads: int, head_dim: int) -> str:
        """The shape ``[B, N·group, S, H]``, of which B and S are known at run time only."""
        size = self.op("Shape", [tensor])
        batch, tokens = (
            self.op("Gather", [size, self.constant(np.array([dim], np.int64))]) for dim in (0, 2)
        )
        rest = [self.constant(np.array([count], np.int64)) for count in (heads, head_dim)]
        return self.op("Concat", [batch, rest[0], tokens, rest[1]], axis=0)


def main() -> None:
    """Write the model that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", metavar="OUT.onnx")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--steps", action="store_true", help="MatMul–Softmax–MatMul")
    parser.add_argument("--causal", action="store_true")
    arguments = parser.parse_args()
    model = make_block(
        arguments.heads,
        arguments.kv_heads,
        arguments.head_dim,
        steps=arguments.steps,
        causal=arguments.causal,
    )
    onnx.save(model, arguments.output)


if __name__ == "__main__":
    main()
