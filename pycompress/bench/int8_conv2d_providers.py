"""Who computes an int8 convolution on a CPU: one row of PROVIDERS each, all built from the same fp32 layer.

build(layer, threads) -> bind        quantises and packs the weight, once per layer and thread count
bind(x) -> Bound                     prepares the call for one fp32 input (N, C, H, W), contiguous
Bound.run()                          the timed call, from fp32 to fp32;  Bound.output() -> y, for the check
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.bench.int8_matmul_providers import Bind, Bound
from pycompress.bench.provider import BaseProvider
from pycompress.nn import Int8Conv2d


@dataclass(frozen=True)
class Layer:
    """conv: fp32, in eval mode. input_range: of the inputs to come, for static quantisation."""

    conv: nn.Conv2d
    input_range: tuple[float, float]


@dataclass(frozen=True)
class Provider(BaseProvider):
    """One way to compute the layer. pool: its thread pool; peak: the field of peaks.Peaks that limits it."""

    name: str
    backend: str
    build: Callable[[Layer, int], Bind]
    dtype: str = "int8"
    peak: str = "int8_gops"
    requires: tuple[str, ...] = ("torch",)
    pool: str = "openmp"


def _module(module: nn.Module, memory_format: torch.memory_format) -> Bind:
    def bind(x: Tensor) -> Bound:
        run = partial(module, x.to(memory_format=memory_format))
        return Bound(run, run)

    return bind


def _pycompress(mode: str, memory_format: torch.memory_format, layer: Layer, threads: int) -> Bind:
    input_range = layer.input_range if mode == "static" else None
    module = Int8Conv2d.from_float(layer.conv, mode, input_range=input_range, backend="native")
    return _module(module, memory_format)


def _fp32(memory_format: torch.memory_format, layer: Layer, threads: int) -> Bind:
    conv = copy.deepcopy(layer.conv).to(memory_format=memory_format)  # type: ignore[call-overload]
    return _module(conv, memory_format)


def _torch_static(engine: str, layer: Layer, threads: int) -> Bind:
    """torch's own post-training static quantisation: quantize, conv, dequantize."""
    previous = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its own removal at every call
        from torch.ao import quantization as aq

        torch.backends.quantized.engine = engine
        try:
            model = nn.Sequential(aq.QuantStub(), copy.deepcopy(layer.conv), aq.DeQuantStub()).eval()
            model.qconfig = aq.get_default_qconfig(engine)
            prepared = aq.prepare(model)
            shape = (1, layer.conv.in_channels, 32, 32)
            with torch.no_grad():
                prepared(torch.empty(shape).uniform_(*layer.input_range))
                prepared(torch.randn(shape))
            converted = aq.convert(prepared)
        finally:
            torch.backends.quantized.engine = previous
    return _module(converted, torch.channels_last)


def _onnx_model(layer: Layer) -> bytes:
    """QuantizeLinear and DequantizeLinear around a Conv, which ONNX Runtime fuses to one QLinearConv."""
    from onnx import TensorProto, helper, numpy_helper

    conv = layer.conv
    q, scale = ops.quantize_conv_weight(conv.weight)
    x_scale, x_zero = ops.affine_qparams(*layer.input_range)
    assert conv.bias is not None
    constants = {
        "w": q.numpy(),
        "w_scale": scale.numpy(),
        "w_zero": torch.zeros(len(q), dtype=torch.int8).numpy(),
        "x_scale": torch.tensor(x_scale).numpy(),
        "x_zero": torch.tensor(x_zero, dtype=torch.uint8).numpy(),
        "bias": conv.bias.detach().numpy(),
    }
    (sh, sw), half = conv.stride, conv.kernel_size[0] // 2
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["qx"]),
        helper.make_node("DequantizeLinear", ["qx", "x_scale", "x_zero"], ["fx"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["fw"], axis=0),
        helper.make_node("Conv", ["fx", "fw", "bias"], ["y"], pads=[half] * 4, strides=[sh, sw]),
    ]
    graph = helper.make_graph(
        nodes,
        "int8_conv2d",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", conv.in_channels, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", conv.out_channels, "OH", "OW"])],
        [numpy_helper.from_array(t, name) for name, t in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _onnxruntime(layer: Layer, threads: int) -> Bind:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(_onnx_model(layer), options, providers=["CPUExecutionProvider"])

    def bind(x: Tensor) -> Bound:
        feed = {"x": x.numpy()}
        run = partial(session.run, None, feed)
        return Bound(run, lambda: torch.from_numpy(run()[0]))

    return bind


def _openvino(layer: Layer, threads: int) -> Bind:
    import openvino as ov

    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = ov.Core()
    model = core.read_model(_onnx_model(layer))

    def bind(x: Tensor) -> Bound:
        model.reshape(list(x.shape))
        request: Any = core.compile_model(model, "CPU", config).create_infer_request()
        request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

        def output() -> Tensor:
            request.infer()
            return torch.from_numpy(request.get_output_tensor().data.copy())

        return Bound(request.infer, output)

    return bind


_FORMATS = {"": torch.contiguous_format, "-channels_last": torch.channels_last}

PROVIDERS: tuple[Provider, ...] = (
    *(
        Provider(f"pycompress-{mode}{last}", "native", partial(_pycompress, mode, fmt), requires=("pycompress",))
        for mode in ("dynamic", "static")
        for last, fmt in _FORMATS.items()
    ),
    *(
        Provider(f"torch-fp32{last}", "eager", partial(_fp32, fmt), "fp32", "fp32_gflops")
        for last, fmt in _FORMATS.items()
    ),
    *(
        Provider(f"torch-static-{engine}", engine, partial(_torch_static, engine))
        for engine in ("fbgemm", "x86", "onednn")
        if engine in torch.backends.quantized.supported_engines
    ),
    Provider("onnxruntime", "cpu", _onnxruntime, requires=("onnxruntime", "onnx"), pool="onnxruntime"),
    Provider("openvino", "cpu", _openvino, requires=("openvino", "onnx"), pool="openvino"),
)
