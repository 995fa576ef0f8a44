"""torchvision's detection and segmentation networks: which pairs are fused, outputs and training.

In float64, where no rounding decides on which side of a ReLU or of a threshold a value falls.
"""

import copy

import pytest
import torch
from models import Ops, away_from_zero, images, settle, small
from tolerances import judge
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.models import quantization, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import fused_resnet


def detector(kind):
    """On a small ResNet with FrozenBatchNorm2d, whose stem and first stage do not train."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    return settle(kind(backbone, num_classes=3, min_size=64, max_size=96), 0).double()


def targets():
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 8.0, 60.0, 44.0]]).double()
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[:, 8:40, 20:40] = 1
    return [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}]


def sums(model, x):
    """The losses and gradients of a step; what is sampled is sampled alike."""
    torch.manual_seed(0)
    losses = model.train()([x], targets())
    sum(losses.values()).backward()
    return list(losses.values()), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN, RetinaNet])
def test_detection(kind):
    plain = detector(kind)
    model, x = fused_resnet.fuse(copy.deepcopy(plain)), images(0, 1, 64)[0].double()
    entries = fused_resnet.report(model)
    assert len(entries) == 20
    assert not entries.unfused
    with torch.no_grad(), Ops() as ops:
        ours = tree_leaves(model([x]))
    with torch.no_grad():
        theirs = tree_leaves(plain([x]))
    assert ops.names
    for a, b in zip(ours, theirs, strict=True):
        if b.is_floating_point():
            judge([a], [b], [b])
        else:
            assert torch.equal(a, b)
    frozen = [n for n, p in plain.named_parameters() if not p.requires_grad]
    assert {name.split(".")[2] for name in frozen} == {"conv1", "layer1"}
    (losses, grads), (expected, exact) = sums(model, x), sums(plain, x)
    judge(losses, expected, expected)
    judge(grads, exact, exact)


@pytest.mark.parametrize("build", [segmentation.fcn_resnet50, segmentation.deeplabv3_resnet50])
def test_segmentation(build):
    """With dilation. What DeepLab pools to a single pixel is left alone, and named."""
    torch.manual_seed(0)
    plain = build(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)
    away_from_zero(settle(plain, 0, images(1, 3, 33))).double()
    for m in plain.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    model = fused_resnet.fuse(copy.deepcopy(plain))
    left = {e.conv: e.reason for e in fused_resnet.report(model).unfused}
    deep = build is segmentation.deeplabv3_resnet50
    assert list(left) == ["classifier.0.convs.4.1"] * deep
    assert all("ASPPPooling is not a class that can be fused" in why for why in left.values())
    found = []
    for m in (model, plain):
        y = m.train()(images(0, 3, 33).double())
        sum(F.cross_entropy(v, v.new_zeros(3, 33, 33).long()) for v in y.values()).backward()
        # As one: behind a BatchNorm of three values a gradient is little but rounding.
        found.append([*y.values(), torch.cat([p.grad.flatten() for p in m.parameters()])])
    judge(*found, found[1])


def test_features_from_inside_a_pair():
    """A BatchNorm whose output is asked for is not fused away; torch's ReLU then writes into it."""
    found = []
    for fuse in (fused_resnet.fuse, lambda m: m):
        model = IntermediateLayerGetter(small().double(), {"bn1": "a", "layer1": "b"})
        with torch.no_grad():
            found.append(list(fuse(model)(images(0, 1, 33).double()).values()))
        entry = {e.conv: e for e in fused_resnet.report(model)}["conv1"]
        assert "used elsewhere" in entry.reason or fuse is not fused_resnet.fuse
    judge(*found, found[1])


def test_quantizable_is_refused():
    torch.manual_seed(0)
    model = quantization.resnet18(weights=None).eval()
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in fused_resnet.fuse(model).modules()] == kinds
    reasons = {e.reason for e in fused_resnet.report(model)}
    assert len(fused_resnet.report(model)) == 20
    assert all("made for quantization, whose fuse_model()" in reason for reason in reasons)
    with pytest.raises(RuntimeError, match=r"strict, and 20 pairs .* QuantizableResNet is made"):
        fused_resnet.fuse(model, strict=True)
