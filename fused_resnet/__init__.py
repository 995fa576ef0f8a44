"""Fused conv + BatchNorm + ReLU and residual add + ReLU for ResNet-family networks.

``fuse(model)`` makes a torchvision model run fused, in place; ``freeze(model, example=x)`` makes a
copy for serving. See the README.
"""

__version__ = "0.1.0"

from . import caffe, engines, functional, models
from .blocks import BasicBlock, Bottleneck
from .convert import fuse, report, unfuse
from .engines import decompositions, use_engine
from .freeze import freeze
from .frozen_file import load_frozen, save_frozen
from .modules import AddAct, BatchNormAct2d, ConvBNAct2d
from .sync_batch_norm import SyncBatchNorm
from .tune import tune
from .tuning import use_tuning

__all__ = [
    "AddAct",
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "SyncBatchNorm",
    "caffe",
    "decompositions",
    "engines",
    "freeze",
    "functional",
    "fuse",
    "load_frozen",
    "models",
    "report",
    "save_frozen",
    "tune",
    "unfuse",
    "use_engine",
    "use_tuning",
]
