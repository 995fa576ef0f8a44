"""What is installed: every module, from any folder, editable and as a wheel."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOW_PLACES = (
    "import fused_resnet, fused_resnet._C, fused_resnet.triton_kernels as kernels;"
    "print(fused_resnet.__file__, fused_resnet._C.__file__, kernels.__file__, sep='\\n')"
)


def python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )


def modules(folder: str) -> set[str]:
    return {path.name for path in (ROOT / folder).glob("*.py")}


def test_import_from_another_folder(tmp_path):
    done = python("-c", SHOW_PLACES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.split()][::2] == ["__init__.py", "__init__.py"]


@pytest.mark.parametrize("folder", [ROOT, ROOT / "fused_resnet"], ids=["root", "package"])
def test_import_from_within_the_repository(folder):
    done = python("-c", SHOW_PLACES, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_triton_kernels_is_not_a_package_of_its_own():
    done = python("-c", "import triton_kernels", cwd=ROOT)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "import fused_resnet.triton_kernels" in done.stderr


def test_version_is_one():
    import fused_resnet

    assert fused_resnet.__version__ == version("fused_resnet")


@pytest.mark.slow
def test_source_distribution_makes_a_wheel_that_works_alone(tmp_path):
    """One test, so that parallel workers do not build it twice."""
    code = "import setuptools.build_meta, sys; setuptools.build_meta.build_sdist(sys.argv[1])"
    done = python("-c", code, str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (source,) = tmp_path.glob("*.tar.gz")
    pip = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", ".", source.name]
    done = python(*pip, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")

    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    kernels = {path.name for path in names if path.parent == Path("fused_resnet/triton_kernels")}
    package = {path.name for path in names if path.parent == Path("fused_resnet")}
    assert len(kernels) + len(package) == len(names)
    assert kernels == modules("triton_kernels")
    assert modules("fused_resnet") <= package
    libraries = {name.split(".")[0] for name in package - modules("fused_resnet")}
    assert libraries - {"_ops_cuda"} == {"_C", "_ops_cpu"}

    site = tmp_path / "site"
    pip = ["-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), wheel.name]
    done = python(*pip, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = python("-c", SHOW_PLACES, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(site) for line in done.stdout.split())
    done = python("-m", "fused_resnet", "info", cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert (site / "bin" / "fused-resnet").is_file()
