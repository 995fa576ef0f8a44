"""Other ways to run the same network, each at its best for inference on a CPU."""

import io
import warnings

import torch
from torch import Tensor, nn

from fused_resnet.measure import PEER, Runner, Variant


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
