"""Who computes a linear layer with 4-bit weights on a CPU: one row of PROVIDERS each, as in int8_matmul_providers.py.

Whoever takes plain integers and scales gets those that pycompress quantised. dtype: of the weight; where a provider
also rounds the activations to int8 it ends in "-a8".
"""

from functools import partial

import torch
from torch import Tensor

from pycompress import ops
from pycompress.bench.int8_matmul_providers import (
    TOLERANCE,
    Bind,
    Bound,
    Layer,
    Provider,
    dense,
    of_module,
    onnx_bind,
    openvino_bind,
)
from pycompress.nn import Int4Linear, Int8Linear
from pycompress.ops.int4_matmul_weight import unpack_nibbles

GROUP, NF4_GROUP = 128, 64  # what these formats are usually kept in
# Bytes of one element of (the weight with its scales, x and y).
ELEMENT_BYTES = {
    "fp32": (4, 4), "bf16": (2, 2), "int8-weight": (1, 4),
    "int4": (0.5 + 4 / GROUP, 4), "int4-bf16": (0.5 + 4 / GROUP, 2), "int4-a8": (0.5 + 4 / GROUP, 4),
    "nf4": (0.5 + 4 / NF4_GROUP, 4),
}  # fmt: skip
# Bounds on Row.error. int4 changes normally distributed weights by 0.111 of their norm and nf4 by 0.092; a bias as
# large as the product makes that 0.078 and 0.065 of the layer.
INT4_TOLERANCE = TOLERANCE | {"int4": 0.1, "int4-bf16": 0.1, "int4-a8": 0.1, "nf4": 0.085}


def _int4(layer: Layer, threads: int) -> Bind:
    return of_module(Int4Linear.from_float(layer.linear(), group_size=GROUP, backend="native"))


def _nf4(layer: Layer, threads: int) -> Bind:
    return of_module(Int4Linear.from_float(layer.linear(), "nf4", group_size=NF4_GROUP, backend="native"))


def _int8(layer: Layer, threads: int) -> Bind:
    return of_module(Int8Linear.from_float(layer.linear(), "weight_only", backend="native"))


def _plain(layer: Layer) -> tuple[Tensor, Tensor]:
    """Packed nibbles (N, K / 2) and scales (N, G); the zero point is 8."""
    if layer.weight.shape[1] % GROUP:
        raise ValueError(f"K={layer.weight.shape[1]} is no multiple of {GROUP}, which this provider wants")
    packed, scale, _ = ops.quantize_weight_int4(layer.weight, group_size=GROUP)
    return packed, scale


def _int4pack(dtype: torch.dtype, layer: Layer, threads: int) -> Bind:
    """The kernel that torch itself has; torchao 0.18 has none for 4-bit weights on the CPU."""
    packed, scale = _plain(layer)
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        unpack_nibbles(packed, layer.weight.shape[1]).to(torch.int32), 1
    )
    scales = torch.stack((scale.t(), torch.zeros_like(scale.t())), -1).to(dtype).contiguous()
    bias = layer.bias.to(dtype)

    def bind(x: Tensor) -> Bound:
        rows = x.to(dtype)

        def run() -> Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, GROUP, scales).add_(bias)

        return Bound(run, run)

    return bind


def _onnxruntime(accuracy: int, layer: Layer, threads: int) -> Bind:
    """MatMulNBits. accuracy: 1 keeps x in fp32, 4 rounds it to int8."""
    from onnx import TensorProto, helper, numpy_helper

    packed, scale = _plain(layer)
    n, k = layer.weight.shape
    constants = {"w": packed.reshape(n, k // GROUP, GROUP // 2), "scale": scale.reshape(-1), "bias": layer.bias}
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scale", "", "", "bias"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=4, block_size=GROUP, accuracy_level=accuracy,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "int4_linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])],
        [numpy_helper.from_array(t.numpy(), name) for name, t in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnx_bind(bytes(model.SerializeToString()), threads, n)


def _openvino(activation_group: int, layer: Layer, threads: int) -> Bind:
    """A weight as its compression (NNCF) writes it: u4 in groups, less 8, times the scale."""
    import numpy
    import openvino as ov
    from openvino import opset13

    packed, scale = _plain(layer)
    n, k = layer.weight.shape
    of_zero = numpy.full(1, 8, numpy.uint8)  # an ov.Tensor of 4 bits an element does not keep its array alive
    q = ov.op.Constant(ov.Tensor(packed.numpy(), ov.Shape([n, k // GROUP, GROUP]), ov.Type.u4), shared_memory=False)
    eight = ov.op.Constant(ov.Tensor(of_zero, ov.Shape([1, 1, 1]), ov.Type.u4), shared_memory=False)
    grouped = opset13.subtract(opset13.convert(q, "f32"), opset13.convert(eight, "f32"))
    weight = opset13.reshape(opset13.multiply(grouped, scale[:, :, None].numpy()), numpy.array([n, k]), False)
    x_in = opset13.parameter([-1, k], ov.Type.f32)
    y_out = opset13.add(opset13.matmul(x_in, weight, False, True), layer.bias[None].numpy())
    return openvino_bind(ov.Model([y_out], [x_in], "int4_linear"), threads, activation_group)


_FP32 = "fp32_gflops"
_OURS, _ONNX = ("pycompress",), ("onnxruntime", "onnx")

PROVIDERS: tuple[Provider, ...] = (
    Provider("pycompress-int4", "native", _int4, "int4", _FP32, requires=_OURS),
    Provider("pycompress-nf4", "native", _nf4, "nf4", _FP32, requires=_OURS),
    Provider("pycompress-int8", "native", _int8, "int8-weight", _FP32, requires=_OURS),
    Provider("torch-fp32", "eager", partial(dense, torch.float32), "fp32", _FP32),
    Provider("torch-bf16", "eager", partial(dense, torch.bfloat16), "bf16", "bf16_gflops"),
    Provider("torch-int4pack-fp32", "eager", partial(_int4pack, torch.float32), "int4", _FP32),
    Provider("torch-int4pack-bf16", "eager", partial(_int4pack, torch.bfloat16), "int4-bf16", "bf16_gflops"),
    Provider("onnxruntime-fp32", "cpu", partial(_onnxruntime, 1), "int4", _FP32, requires=_ONNX, pool="onnxruntime"),
    Provider("onnxruntime-a8", "cpu", partial(_onnxruntime, 4), "int4-a8", requires=_ONNX, pool="onnxruntime"),
    Provider("openvino-fp32", "cpu", partial(_openvino, 0), "int4", _FP32, requires=("openvino",), pool="openvino"),
    Provider("openvino-a8", "cpu", partial(_openvino, 128), "int4-a8", requires=("openvino",), pool="openvino"),
)
