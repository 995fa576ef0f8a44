"""torchvision's ten ResNets, fused: the same functions, arguments and weights."""

import functools
from collections.abc import Callable

from torchvision import models as torchvision_models
from torchvision.models import ResNet

from .convert import fuse

__all__ = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


def _fused(build: Callable[..., ResNet]) -> Callable[..., ResNet]:
    @functools.wraps(build)
    def fused(*args: object, **kwargs: object) -> ResNet:
        return fuse(build(*args, **kwargs))

    return fused


resnet18 = _fused(torchvision_models.resnet18)
resnet34 = _fused(torchvision_models.resnet34)
resnet50 = _fused(torchvision_models.resnet50)
resnet101 = _fused(torchvision_models.resnet101)
resnet152 = _fused(torchvision_models.resnet152)
resnext50_32x4d = _fused(torchvision_models.resnext50_32x4d)
resnext101_32x8d = _fused(torchvision_models.resnext101_32x8d)
resnext101_64x4d = _fused(torchvision_models.resnext101_64x4d)
wide_resnet50_2 = _fused(torchvision_models.wide_resnet50_2)
wide_resnet101_2 = _fused(torchvision_models.wide_resnet101_2)
