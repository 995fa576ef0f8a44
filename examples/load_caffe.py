"""A network from Caffe's files: loaded, frozen for serving, asked about an image.

Such as ResNet-50-deploy.prototxt and ResNet-50-model.caffemodel, as its authors published them::

    python examples/load_caffe.py deploy.prototxt its.caffemodel --image cat.jpg
"""

import argparse

import torch
from torch import Tensor

import fused_resnet

#: What ImageNet's images are on average, in the order that Caffe has: blue, green, red.
MEAN = (103.939, 116.779, 123.68)


def as_caffe_reads(path: str, size: int) -> Tensor:
    """An image (1, 3, size, size): its square in the middle, blue first, of 0 to 255 less MEAN."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    image = ImageOps.fit(Image.open(path).convert("RGB"), (size, size))
    return (pil_to_tensor(image).flip(0).float() - torch.tensor(MEAN).view(3, 1, 1)).unsqueeze(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("prototxt")
    parser.add_argument("caffemodel", nargs="?", help="its weights; default: initial ones")
    parser.add_argument("--image", help="default: noise")
    parser.add_argument("--size", type=int, default=224, help="of the image, in pixels")
    options = parser.parse_args()

    net = fused_resnet.caffe.load(options.prototxt, options.caffemodel)
    if options.image:
        x = as_caffe_reads(options.image, options.size)
    else:
        x = torch.randn(1, 3, options.size, options.size)
    fused_resnet.fuse(net)
    print(str(fused_resnet.report(net)).splitlines()[-1])
    deployed = fused_resnet.freeze(net, example=x)
    print(f"mean error against float64: {deployed.errors['frozen']['mean']:.1e}")
    probabilities = deployed(x).flatten()
    best = probabilities.topk(min(5, len(probabilities)))
    for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{value:8.4f}  class {index}")


if __name__ == "__main__":
    main()
