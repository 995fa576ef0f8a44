"""Other ways to run the same network, each at its best, where its package is installed."""

import importlib
import io
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet import variants
from fused_resnet.measure import PEER, Runner, Variant

#: Those for GPUs that are no part of torch, and the packages they are in.
TENSORRT, ATTORCH, INPLACE_ABN, APEX = "TensorRT", "attorch", "inplace-ABN", "apex"
PACKAGES = {
    TENSORRT: "torch_tensorrt",
    ATTORCH: "attorch",
    INPLACE_ABN: "inplace_abn",
    APEX: "apex",
}


def absent(device: str) -> dict[str, str]:
    """Why peers that are no part of torch are not measured."""
    found = {}
    for name, package in PACKAGES.items():
        if find_spec(package) is None:
            found[name] = f"{package} is not installed"
        elif device != "cuda":
            found[name] = "it is for GPUs"
    return found


def _numpy(x: Tensor):
    return x.float().contiguous().numpy()


def onnx_runtime(model: nn.Module, dtype: torch.dtype, example: Tensor, threads: int) -> Variant:
    def prepare() -> Runner:
        import onnxruntime

        if dtype != torch.float32:
            raise NotImplementedError(f"its CPU provider has no convolution in {dtype}")
        exported = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # this exporter is deprecated, and needs one package less
            torch.onnx.export(
                model, (example,), exported, dynamo=False, input_names=["x"], output_names=["y"]
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            exported.getvalue(), options, providers=["CPUExecutionProvider"]
        )
        return Runner(lambda x: session.run(None, {"x": x})[0], _numpy, torch.from_numpy)

    return Variant("ONNX Runtime", PEER, prepare)


def openvino(model: nn.Module, dtype: torch.dtype, example: Tensor, threads: int) -> Variant:
    def prepare() -> Runner:
        import openvino as ov

        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype)
        if precision is None:
            raise NotImplementedError(f"on a CPU it does not compute in {dtype}")
        core = ov.Core()
        if precision == "bf16" and "BF16" not in core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise NotImplementedError("it computes in bfloat16 on other processors only")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its conversion traces with a deprecated function
            graph = ov.convert_model(model, example_input=example, input=[*example.shape])
        compiled = core.compile_model(
            graph,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        request = compiled.create_infer_request()

        def run(x):
            return request.infer(x, share_inputs=True, share_outputs=True)[0]

        return Runner(run, _numpy, lambda y: torch.from_numpy(y.copy()))

    return Variant("OpenVINO", PEER, prepare)


def torchscript(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Variant:
    """What torch had for inference before torch.compile."""

    def prepare() -> Runner:
        runner = variants.eager(model, dtype, "NHWC").prepare()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            traced = torch.jit.freeze(torch.jit.trace(runner.run, runner.feed(example)))
            return runner._replace(run=torch.jit.optimize_for_inference(traced))

    return Variant("jit.optimize_for_inference", PEER, prepare)


def tensorrt(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Variant:
    def prepare() -> Runner:
        import torch_tensorrt

        runner = variants.eager(model, dtype, "NCHW").prepare()
        inputs = [runner.feed(example)]
        compiled = torch_tensorrt.compile(
            runner.run, ir="dynamo", inputs=inputs, enabled_precisions={dtype}
        )
        return runner._replace(run=compiled)

    return Variant(TENSORRT, PEER, prepare)


class _NHWC(nn.Module):
    """apex's BatchNorm, which takes images whose channels are the last dimension."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def _apex(channels: int, eps: float, momentum: float) -> nn.Module:
    norm = importlib.import_module("apex.contrib.groupbn.batch_norm").BatchNorm2d_NHWC(channels)
    norm.eps, norm.momentum = eps, momentum
    return norm


#: BatchNorms to train with, given channels, eps and momentum.
NORMS: dict[str, Callable[[int, float, float], Any]] = {
    ATTORCH: lambda *given: importlib.import_module("attorch").BatchNorm2d(*given),
    INPLACE_ABN: lambda *given: importlib.import_module("inplace_abn").InPlaceABN(
        *given, activation="identity"
    ),
    APEX: _apex,
}


def swap_norms(model: nn.Module, name: str) -> None:
    """Put a peer's BatchNorm, with the same parameters, where torch's is, everywhere."""
    for module in list(model.modules()):
        for key, bn in module.named_children():
            if type(bn) is nn.BatchNorm2d:
                norm = NORMS[name](bn.num_features, bn.eps, bn.momentum).to(bn.weight)
                norm.train(bn.training).load_state_dict(bn.state_dict())
                setattr(module, key, _NHWC(norm) if name == APEX else norm)
