"""Exported models where the model is not: in an AOTInductor package, in ONNX Runtime."""

import copy
import subprocess
import sys

import pytest
import torch
from models import basic, double, images, small
from tolerances import judge

import fused_resnet

PACKAGE = """
import sys, fused_resnet
import torch
folder = sys.argv[1]
x = torch.load(f"{folder}/x.pt", weights_only=True)
outputs = [torch._inductor.aoti_load_package(path)(x) for path in sys.argv[2:]]
torch.save(outputs, f"{folder}/outputs.pt")
"""


def test_aot_inductor(tmp_path, request):
    """Packages of a fused and a frozen model run where only the op library is imported."""
    source, x = basic(), images(0, 2, 9, channels=24)
    fused = fused_resnet.fuse(copy.deepcopy(source))
    frozen = fused_resnet.freeze(source, example=x)
    paths = []
    with torch.no_grad():
        for name, model in (("fused", fused), ("frozen", frozen)):
            program = torch.export.export(model, (x,))
            assert any("fused_resnet" in str(node.target) for node in ops(program))
            path = str(tmp_path / f"{name}.pt2")
            paths.append(torch._inductor.aoti_compile_and_package(program, package_path=path))
        torch.save(x, tmp_path / "x.pt")
        command = [sys.executable, "-c", PACKAGE, tmp_path, *paths]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, cwd=request.config.rootpath
        )
        assert done.returncode == 0, done.stderr[-2000:]
        for y in torch.load(tmp_path / "outputs.pt", weights_only=True):
            judge([y], [source(x)], [double(source, x)])


def in_onnx_runtime(program, path, *inputs):
    """What ONNX Runtime makes of several inputs, and the operator domains it was given."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    outputs = [session.run(None, {wanted.name: x.numpy()})[0] for x in inputs]
    domains = {node.domain for node in exported.model.graph}
    return [torch.from_numpy(y) for y in outputs], domains


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_onnx(tmp_path, dtype):
    """A frozen model, for any batch, in ONNX's own operators."""
    source, x = small(), [images(seed, 1 + seed, 33).to(dtype) for seed in range(3)]
    frozen = fused_resnet.freeze(source, example=x[0], dtype=dtype)
    with torch.no_grad():
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(frozen, (x[1],), dynamic_shapes=((batch,),))
        program = program.run_decompositions(fused_resnet.decompositions())
        ours, domains = in_onnx_runtime(program, tmp_path / "model.onnx", *x)
        plain = copy.deepcopy(source).to(dtype)
        judge(ours, [plain(t) for t in x], [double(source, t) for t in x])
    assert domains == {""}


def test_decompositions_leave_no_op_of_ours():
    """Also where a layer is not folded."""
    source, x = small(), images(0, 2, 33)
    with torch.no_grad():
        source.layer1[0].conv1.weight *= 1e20
        source.layer1[0].bn1.weight *= 1e20
        frozen = fused_resnet.freeze(source, example=x)
        program = torch.export.export(frozen, (x,))
        assert any("fused_resnet" in str(node.target) for node in ops(program))
        program = program.run_decompositions(fused_resnet.decompositions())
    assert not any("fused_resnet" in str(node.target) for node in ops(program))


def ops(program):
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    return [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
