"""Serve a network: freeze it, write it to a file, load that, call it from many threads, export it.

    python examples/serve.py --export onnx aotinductor
    python examples/serve.py --int8

What is exported needs no Python source: ONNX Runtime reads ``model.onnx``, and any process that
imports fused_resnet runs ``model.pt2`` by ``torch._inductor.aoti_load_package``.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torchvision

import fused_resnet

THREADS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="resnet18", help="one of torchvision's (default: resnet18)")
    add("--weights", type=Path, help="its state_dict; default: fresh ones, which know nothing")
    add("--size", type=int, default=224, help="of the images (default: 224)")
    add("--export", nargs="*", default=[], choices=["onnx", "aotinductor"])
    add("--int8", action="store_true", help="in 8 bits; AOTInductor can export that, ONNX cannot")
    add("--output", type=Path, default=Path("fused-resnet-serve"), help="a folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    model = torchvision.models.get_model(args.model).eval()
    if args.weights is not None:
        model.load_state_dict(torch.load(args.weights, weights_only=True))
    images = torch.randn(2 * THREADS, 3, args.size, args.size)

    # Once, where the model is: fold, tune on an input like those to come, compare with float64.
    # In 8 bits it takes some hundred images to say how large activations are.
    bits: dict[str, Any] = {"dtype": torch.int8, "calibration": images.split(4)}
    frozen = fused_resnet.freeze(model, example=images[:1], **(bits if args.int8 else {}))
    print("errors:", frozen.errors)
    fused_resnet.save_frozen(frozen, args.output / "model.safetensors")

    # Where it is served: the architecture without memory, and the file.
    with torch.device("meta"):
        architecture = torchvision.models.get_model(args.model)
    served = fused_resnet.load_frozen(args.output / "model.safetensors", architecture)
    with ThreadPoolExecutor(THREADS) as pool:
        answers = [*pool.map(served, images.split(1))]
    same = all(torch.equal(y, frozen(x)) for x, y in zip(images.split(1), answers, strict=True))
    print(f"{len(answers)} requests from {THREADS} threads, each as from one: {same}")

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad():
        program = torch.export.export(served, (images[:2],), dynamic_shapes=((batch,),))
    if "onnx" in args.export:
        # ONNX knows none of our ops: what they consist of goes in their place.
        plain = program.run_decompositions(fused_resnet.decompositions())
        file = args.output / "model.onnx"
        torch.onnx.export(plain, f=file, dynamo=True, external_data=False)
    if "aotinductor" in args.export:
        path = str(args.output / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    for path in sorted(args.output.iterdir()):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
