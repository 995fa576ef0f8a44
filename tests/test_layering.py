"""What the layout promises: kernels know no framework, an op has one name in every column."""

import importlib.util
import re

import pytest
import torch
from cases import ENGINES, ROOT

from fused_resnet import engines, functional, native, whole_chain

SCHEMA = (ROOT / "csrc" / "torch" / "schema.h").read_text()
KERNELS = ROOT / "csrc" / "kernels"
#: Every op there is; the in-place form and the packing of weights belong to another op.
DECLARED = re.findall(r'^    "(\w+)\(', SCHEMA, re.MULTILINE)
AUXILIARY = {
    "batch_norm_act_": "bn_act",
    "bn_act_": "bn_act",
    "bn_act_backward_": "bn_act_backward",
    "conv_dgrad_": "conv_dgrad",
    "conv_int8_pack": "conv_int8",
    "conv_pack": "conv_bn_act",
    "conv_winograd_pack": "conv_bn_act_winograd",
}
#: Arguments that say how, not what: they are chosen, and not the user's.
INTERNAL = ("packed", "tf32", "wgmma")
#: What training.py is, op by op, in one: no kernel of its own, hence no engine's choice.
WHOLE = tuple(whole_chain.FAKES)
#: What not every engine has.
SOME_ENGINES = tuple(op for op in engines.ALL_OPS if op not in engines.OPS)
OPS = [op for op in DECLARED if op not in (*AUXILIARY, *SOME_ENGINES, *WHOLE)]


def rules():
    spec = importlib.util.spec_from_file_location("rules", ROOT / ".ci" / "rules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def specified(names):
    """But for what only some engines read."""
    return [name for name in names if name not in INTERNAL]


def signature(function):
    return specified(function.__code__.co_varnames[: function.__code__.co_argcount])


def declared(op):
    schema = getattr(torch.ops.fused_resnet, op).default._schema
    return specified(argument.name for argument in schema.arguments)


def test_schema_is_read_as_it_is_registered():
    for namespace in native.NAMESPACES:
        registered = dir(getattr(torch.ops, namespace))
        for op in DECLARED:
            assert hasattr(getattr(torch.ops, namespace), op), (namespace, op, registered)
    assert {*AUXILIARY, *WHOLE} < set(DECLARED)
    assert set(AUXILIARY.values()) <= {*OPS, *SOME_ENGINES}


def test_ops_are_those_that_engines_choose_for():
    assert sorted(OPS) == sorted(engines.OPS)
    assert {op for ops in ENGINES.values() for op in ops} == {*OPS, *SOME_ENGINES}


@pytest.mark.parametrize("op", OPS)
def test_op_stands_in_every_column(op):
    defined = "\n".join(path.read_text() for path in (KERNELS / "cpu").glob("*.cpp"))
    assert re.search(rf"^Status {op}\(", defined, re.MULTILINE), "no CPU kernel"
    specification = engines.implementation(op, "reference")
    assert (ROOT / "tests" / f"test_{op}.py").is_file(), "no tests"
    names = declared(op)
    assert signature(specification) == names
    if op in engines.INFERENCE_OPS:
        assert op in functional.__all__, "not in functional"
        assert set(signature(getattr(functional, op))) == set(names)


@pytest.mark.parametrize("op", SOME_ENGINES)
def test_op_of_some_engines_is_declared_as_specified(op):
    assert signature(engines.implementation(op, "reference")) == declared(op)


@pytest.mark.parametrize("op", [op for op in (*OPS, *engines.INT8_OPS) if op != "bn_scale_shift"])
def test_cpu_kernel_is_in_the_file_of_its_name(op):
    assert (KERNELS / "cpu" / f"{op}.cpp").is_file()


def test_cuda_and_triton_kernels_are_named_after_ops():
    shared = {"bn_gradient", "checks", "launch", "ops", "pooling", "reductions", "tiles"}
    shared |= {f"conv_{name}" for name in ("chain", "configs", "gemm", "launch", "shapes", "sums")}
    for path in [*(KERNELS / "cuda").glob("*.cu"), *(ROOT / "triton_kernels").glob("[a-z]*.py")]:
        others = shared if path.suffix == ".py" else {"conv_wgmma"}  # conv_bn_act's second body
        assert path.stem in DECLARED or path.stem in others, path


def test_kernels_include_no_framework():
    for path in KERNELS.rglob("*.*"):
        included = re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", path.read_text(), re.MULTILINE)
        foreign = re.compile(r"(torch|ATen|c10|pybind11|Python)\b")
        assert not [name for name in included if foreign.match(name)], path


def test_rules_hold(capsys):
    """No framework in the kernels, files of a readable length, no assert in the package."""
    assert rules().main() == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("csrc/kernels/cpu/x.cpp", "#include <ATen/ATen.h>\n"),
        ("csrc/x.cpp", "\n" * 500),
        ("fused_resnet/x.py", "assert True\n"),
    ],
)
def test_rules_can_be_broken(name, text):
    assert len(list(rules().breaches(name, text))) == 1
