"""Who computes an int8 linear layer on a CPU: one row of PROVIDERS each, all built from the same fp32 layer.

build(layer, threads) -> bind        quantises and packs the weight, once per layer and thread count
bind(x) -> Bound                     prepares the call for one fp32 input (M, K)
Bound.run()                          the timed call;  Bound.output() -> (M, N), for the check against float64
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.bench.provider import BaseProvider
from pycompress.nn import Int8Linear


@dataclass(frozen=True)
class Layer:
    """weight: (N, K) fp32. bias: (N,) fp32. input_range: of the inputs to come, for static quantisation."""

    weight: Tensor
    bias: Tensor
    input_range: tuple[float, float]

    def linear(self) -> nn.Linear:
        n, k = self.weight.shape
        linear = nn.Linear(k, n, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear.eval()


@dataclass(frozen=True)
class Bound:
    run: Callable[[], object]
    output: Callable[[], Tensor]


Bind = Callable[[Tensor], Bound]


@dataclass(frozen=True)
class Provider(BaseProvider):
    """One way to compute the layer.

    peak names the field of peaks.Peaks that limits it; pool its thread pool.
    """

    name: str
    backend: str
    build: Callable[[Layer, int], Bind]
    dtype: str = "int8"
    peak: str = "int8_gops"
    covers: str = "layer"
    requires: tuple[str, ...] = ("torch",)
    pool: str = "openmp"


# Bounds on Row.error. int8: 7-bit activations and one scale for all (torch quantize_dynamic) give 0.015.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "int8-weight": 1.5e-2, "int8": 4e-2}


def of_module(module: nn.Module, dtype: torch.dtype = torch.float32) -> Bind:
    def bind(x: Tensor) -> Bound:
        run = partial(module, x.to(dtype))
        return Bound(run, run)

    return bind


def _pycompress(mode: str, layer: Layer, threads: int) -> Bind:
    input_range = layer.input_range if mode == "static" else None
    return of_module(Int8Linear.from_float(layer.linear(), mode=mode, input_range=input_range, backend="native"))


def dense(dtype: torch.dtype, layer: Layer, threads: int) -> Bind:
    return of_module(layer.linear().to(dtype), dtype)


def _quantize_dynamic(engine: str, layer: Layer, threads: int) -> Bind:
    previous = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its own removal at every call
        from torch.ao.quantization import quantize_dynamic

        torch.backends.quantized.engine = engine
        try:
            swapped = quantize_dynamic(nn.Sequential(layer.linear()), {nn.Linear}, dtype=torch.qint8)
        finally:
            torch.backends.quantized.engine = previous
    return of_module(swapped[0])


def _int_mm(layer: Layer, threads: int) -> Bind:
    q, scale = ops.quantize_weight(layer.weight)

    def bind(x: Tensor) -> Bound:
        # Quantised beforehand, scaled afterwards: only the integer product is timed.
        qx, x_scale = ops.quantize_weight(x)
        run = partial(torch._int_mm, qx, q.t())
        return Bound(run, lambda: run() * x_scale[:, None] * scale + layer.bias)

    return bind


def _torchao(layer: Layer, threads: int) -> Bind:
    logging.disable(logging.WARNING)  # its import announces every CUDA library that it cannot load
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    finally:
        logging.disable(logging.NOTSET)
    linear = layer.linear()
    quantize_(linear, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return of_module(linear)


def _onnx_model(layer: Layer) -> bytes:
    """The graph that onnxruntime.quantization writes; ONNX Runtime fuses it to one DynamicQuantizeMatMul."""
    from onnx import TensorProto, helper, numpy_helper

    q, scale = ops.quantize_weight(layer.weight)
    n, k = q.shape
    constants = {
        "w": q.t().contiguous(),
        "w_scale": scale,
        "w_zero": torch.zeros(n, dtype=torch.int8),
        "bias": layer.bias,
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["qx", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["qx", "w", "x_zero", "w_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["sums_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "w_scale"], ["scale"]),
        helper.make_node("Mul", ["sums_f", "scale"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "int8_linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])],
        [numpy_helper.from_array(t.numpy(), name) for name, t in constants.items()],
    )
    # Old enough for every ONNX Runtime of the last years.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def onnx_bind(model: bytes, threads: int, outputs: int) -> Bind:
    """A model with one input x (M, K) and one output y (M, outputs), both fp32, in ONNX Runtime."""
    import numpy
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def bind(x: Tensor) -> Bound:
        y = torch.empty(x.shape[0], outputs)
        binding = session.io_binding()
        for attach, name, t in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
            attach(name, "cpu", 0, numpy.float32, tuple(t.shape), t.data_ptr())

        def run(keep: Tensor = x) -> Tensor:  # the binding holds a bare pointer to x
            session.run_with_iobinding(binding)
            return y

        return Bound(run, lambda: run().clone())

    return bind


def _onnxruntime(layer: Layer, threads: int) -> Bind:
    return onnx_bind(_onnx_model(layer), threads, layer.bias.shape[0])


def _openvino(layer: Layer, threads: int) -> Bind:
    import openvino as ov
    from openvino import opset13

    q, scale = ops.quantize_weight(layer.weight)
    k = q.shape[1]
    x_in = opset13.parameter([-1, k], ov.Type.f32)
    weight = opset13.multiply(opset13.convert(q.numpy(), "f32"), scale[:, None].numpy())
    y_out = opset13.add(opset13.matmul(x_in, weight, False, True), layer.bias[None].numpy())
    # Groups of 128 beat 32, the default, and whole rows.
    return openvino_bind(ov.Model([y_out], [x_in], "int8_linear"), threads, 128)


def openvino_bind(model: Any, threads: int, activation_group: int) -> Bind:
    """A model with one input (M, K) and one output, both fp32, in OpenVINO.

    activation_group: elements of x that are quantised together to int8; 0 leaves x float.
    """
    import openvino as ov

    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",  # without it OpenVINO multiplies in bf16, slower
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": activation_group,
    }
    compiled = ov.Core().compile_model(model, "CPU", config)

    def bind(x: Tensor) -> Bound:
        request: Any = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

        def output() -> Tensor:
            request.infer()
            return torch.from_numpy(request.get_output_tensor().data.copy())

        return Bound(request.infer, output)

    return bind


def _ours(mode: str, dtype: str, peak: str) -> Provider:
    build = partial(_pycompress, mode)
    return Provider(f"pycompress-{mode}", "native", build, dtype, peak, requires=("pycompress",))


PROVIDERS: tuple[Provider, ...] = (
    _ours("dynamic", "int8", "int8_gops"),
    _ours("static", "int8", "int8_gops"),
    _ours("weight_only", "int8-weight", "fp32_gflops"),
    Provider("torch-fp32", "eager", partial(dense, torch.float32), "fp32", "fp32_gflops"),
    Provider("torch-bf16", "eager", partial(dense, torch.bfloat16), "bf16", "bf16_gflops"),
    *(
        Provider(f"torch-quantize_dynamic-{engine}", engine, partial(_quantize_dynamic, engine))
        for engine in ("fbgemm", "x86", "onednn")  # qnnpack is for phones: a tenth of these on a server
        if engine in torch.backends.quantized.supported_engines
    ),
    Provider("torch-int_mm", "eager", _int_mm, covers="product"),
    Provider("torchao", "eager", _torchao, requires=("torchao",)),
    Provider("onnxruntime", "cpu", _onnxruntime, requires=("onnxruntime", "onnx"), pool="onnxruntime"),
    Provider("openvino", "cpu", _openvino, requires=("openvino",), pool="openvino"),
)
