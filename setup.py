"""Builds fused_resnet's libraries with ninja: incremental, offline, nothing assumed.

_ops_cpu.so and _ops_cuda.so hold the ops (LibTorch stable ABI: one binary for torch 2.11 and
later, whatever the Python), _C is the pybind11 module. The environment may set CXX, CUDA_HOME,
MAX_JOBS, TORCH_CUDA_ARCH_LIST and FUSED_RESNET_CUDA: auto (CUDA where nvcc fits torch), 1, 0.
"""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolkit  # noqa: E402

X86 = os.uname().machine == "x86_64"


def ninja_lines(variables, module, cuda):
    """What is compiled and linked into what; csrc/rules.ninja says how."""
    lines = [f"{name} = {text.replace('$', '$$')}" for name, text in variables.items()]
    lines.append("include csrc/rules.ninja")

    def edge(out, rule, inputs, flags):
        lines.extend([f"build $builddir/{out}: {rule} {' '.join(inputs)}", f"  flags = {flags}"])
        return f"$builddir/{out}"

    def objects(pattern, flags="", rule="cxx", tag="", but=""):
        names = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
        return [edge(f"{name}{tag}.o", rule, [name], flags) for name in names if name != but]

    dispatch = "csrc/kernels/cpu/dispatch.cpp"
    kernels = objects(dispatch, "-DFUSED_RESNET_HAVE_X86" if X86 else "")
    for isa in ("generic", "avx2", "avx512", "avx512bf16") if X86 else ("generic",):
        flags = f"${isa} -DFUSED_RESNET_ISA={isa}"
        kernels += objects("csrc/kernels/cpu/*.cpp", flags, tag=f".{isa}", but=dispatch)
    if X86:  # what multiplies bytes has an instruction set of its own
        flags, name = "$avx512vnni -DFUSED_RESNET_ISA=avx512vnni", "csrc/kernels/cpu/conv_int8.cpp"
        kernels += objects(name, flags, tag=".avx512vnni")
    ops = objects("csrc/torch/schema.cpp", "$glue") + objects("csrc/torch/ops_cpu.cpp", "$glue")
    edge("_ops_cpu.so", "link", ops + kernels, "$cpu_libs")
    edge(module, "link", objects("csrc/python/*.cpp", "$python $facts") + kernels, "")
    if cuda:
        ops = objects("csrc/torch/ops_cuda.cpp", "$cuda_glue")
        hopper = "csrc/kernels/cuda/conv_wgmma.cu"
        ops += objects("csrc/kernels/cuda/*.cu", "$gencode", "nvcc", but=hopper)
        ops += objects(hopper, "$sm_90a", "nvcc")
        edge("_ops_cuda.so", "link", ops, "$cuda_libs")
    return lines


class Build(build):
    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)  # a wheel holds what the tree holds now
        super().run()


class BuildExt(build_ext):
    def run(self):
        try:
            self.make()
        except toolkit.BuildError as error:
            raise PlatformError(str(error)) from None

    def make(self):
        cxx = toolkit.find_compiler(os.environ)
        import pybind11
        import torch

        cuda, why = toolkit.plan_cuda(os.environ, torch.version.cuda)
        gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        archs = toolkit.arch_list(os.environ, gpus) if cuda else ""
        what = f"CUDA {cuda.version} for {archs}" if cuda else f"without CUDA: {why}"
        print(f"fused_resnet for torch {torch.__version__}, {what}", flush=True)

        facts = {
            "TORCH": torch.__version__,
            "CUDA": cuda.version if cuda else "",
            "ARCHS": archs,
            "CUDA_WHY": why,
            "COMPILER": toolkit.output_of(*cxx, "--version").splitlines()[0],
        }
        folder = f"build/{sys.implementation.cache_tag}-torch{torch.__version__}"
        words = {
            "builddir": [folder],
            "cxx": cxx,
            "torch": torch.__path__,
            "python": [f"-isystem{path}" for path in [*self.include_dirs, pybind11.get_include()]],
            "facts": [f"-DFUSED_RESNET_BUILD_{k}={json.dumps(v)}" for k, v in facts.items()],
        }
        if cuda:
            words["nvcc"] = [cuda.nvcc, "-ccbin", cxx[-1]]
            words["toolkit"] = [str(cuda.home)]
            words["gencode"] = toolkit.gencode(archs)
        variables = {name: shlex.join(value) for name, value in words.items()}
        module = self.get_ext_filename("_C")
        toolkit.run_ninja(ROOT, folder, ninja_lines(variables, module, bool(cuda)))

        package = ROOT / "fused_resnet" if self.inplace else Path(self.build_lib, "fused_resnet")
        for name in ("_ops_cpu.so", "_ops_cuda.so", module):
            (package / name).unlink(missing_ok=True)  # a process may have it mapped
            if cuda or name != "_ops_cuda.so":
                shutil.copy(ROOT / folder / name, package / name)


setup(
    cmdclass={"build": Build, "build_ext": BuildExt},
    ext_modules=[Extension("fused_resnet._C", ["csrc/python/module.cpp"])],
)
