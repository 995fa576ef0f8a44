"""The CPU kernels without torch, under AddressSanitizer and UndefinedBehaviorSanitizer, with the
flags of the real build: the least and the best instruction set this processor has, with --full all.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cases import ROOT, TILE, isas

SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FOLDERS = {"csrc/kernels/cpu": SANITIZE, "tests/native": ["-O1"]}  # only the kernels are watched
SOURCES = {
    path: flags
    for folder, flags in FOLDERS.items()
    for path in sorted((ROOT / folder).glob("*.cpp"))
    if path.name != "dispatch.cpp"  # it wants every instruction set
}
SIZES = {
    "FR_SUM_STEPS": TILE["kSumSteps"][0],
    "FR_GRAIN": TILE["kGrain"][0],
    "FR_SHORT_DEPTH": TILE["kShortDepth"][0],
    "FR_SET_BYTES": TILE["kSetBytes"][0],
    "FR_PACK_IN_PASS": TILE["kPackInPassBytes"][0],
    "FR_BLOCK_ROWS": TILE["kMostBlockRows"][0],
    "FR_BLOCK_PIXELS": TILE["kBlockPixels"][0],
    "FR_GRAM_ROWS": TILE["kMostGramRows"][0],
    "FR_WINOGRAD_BLOCK": TILE["kWinogradBlockBytes"][0],
    "FR_FLAT_ROW": TILE["kFlatRow"][0],
    "FR_CHUNK_STEPS": TILE["kChunkSteps"][0],
    "FR_MOST_OUT_CHANNELS": TILE["kMostOutChannels"][0],
    "FR_QUANTIZE_GRAIN": TILE["kQuantizeGrain"][0],
}


def isa_flags(isa: str) -> list[str]:
    """What csrc/rules.ninja compiles an instruction set with."""
    text = (ROOT / "csrc/rules.ninja").read_text().replace("$\n", " ")
    variables = dict(re.findall(r"^(\w+) =(.*)$", text, re.MULTILINE))
    flags = f"${isa}"
    while "$" in flags:
        flags = re.sub(r"\$(\w+)", lambda found: variables[found[1]], flags)
    return [*flags.split(), f"-DFUSED_RESNET_ISA={isa}"]


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def build(compiler: str, isa: str, folder: Path) -> Path:
    common = [compiler, "-std=c++17", "-Wno-psabi", f"-I{ROOT / 'csrc'}", *isa_flags(isa)]
    common += [f"-D{name}={value}" for name, value in SIZES.items()]
    objects = {source: folder / f"{source.stem}.o" for source in SOURCES}
    commands = [
        [*common, *flags, "-c", str(source), "-o", str(objects[source])]
        for source, flags in SOURCES.items()
    ]
    commands.sort(key=lambda command: "conv_bn_act" not in command[-1])  # the longest first
    driver = folder / "driver"
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, commands):
            assert done.returncode == 0, done.stderr[-4000:]
    done = run([*common, *SANITIZE, *map(str, objects.values()), "-o", str(driver), "-pthread"])
    assert done.returncode == 0, done.stderr[-4000:]
    return driver


@pytest.mark.parametrize(
    "isa",
    [pytest.param(isa, marks=[pytest.mark.slow] if isa in isas()[1:-1] else []) for isa in isas()],
)
def test_kernels(isa, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the kernels cannot be compiled with sanitizers")
    driver = build(compiler, isa, tmp_path)
    done = run([driver], timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 1e6
    # The sanitizer is there: it stops a kernel that is made to read past the end of its input.
    planted = run([driver, "plant"], timeout=60)
    assert planted.returncode != 0
    assert "AddressSanitizer" in planted.stderr
