"""What the example scripts save: read back whole, or refused with a reason."""

import pytest
import torch
from test_cli import Trap
from torch import nn
from training import same

from fused_resnet.command import CommandError


@pytest.fixture
def parts():
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1, 0.9)}


def test_checkpoints_that_are_damaged(tmp_path, examples, parts):
    import resumable

    path = tmp_path / "checkpoint.pth"
    resumable.save(path, 4, parts, {"lr": 0.1})
    whole = path.read_bytes()
    assert resumable.restore(path, parts, {"lr": 0.1}) == 4
    lengths = [0, 1, 2, 4, 30, 64, 100, 1000, len(whole) // 2, len(whole) - 22, len(whole) - 1]
    contents = [*(whole[:n] for n in lengths), b"text\n", b"\x80\x02.", bytes(range(256)) * 9]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CommandError, match="damaged, or not a checkpoint: ") as caught:
            resumable.restore(path, parts, {"lr": 0.1})
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: [1, 2], "holds no state of a training, but a list"),
        (lambda s: s["model"], "holds no state of a training, but a OrderedDict"),
        (lambda s: {**s, "recipe": {}}, "lr was None there, and is 0.1 now"),
        (lambda s: {k: v for k, v in s.items() if k != "optimizer"}, "lacks optimizer"),
        (lambda s: {**s, "model": {"weight": torch.ones(2, 3)}}, 'Missing key.* "bias"'),
        (lambda s: {**s, "model": nn.Linear(3, 3).state_dict()}, "model does not fit: .*size"),
        (lambda s: {**s, "optimizer": {"state": {}}}, "optimizer does not fit"),
        (lambda s: {**s, "optimizer": 3}, "optimizer does not fit"),
    ],
)
def test_checkpoints_that_are_foreign(tmp_path, examples, parts, change, words):
    import resumable

    path = tmp_path / "checkpoint.pth"
    resumable.save(path, 4, parts, {"lr": 0.1})
    torch.save(change(torch.load(path, weights_only=True)), path)
    with torch.no_grad():
        parts["model"].weight.fill_(5)
    before = {name: part.state_dict() for name, part in parts.items()}
    before = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, before)
    with pytest.raises(CommandError, match=words) as caught:
        resumable.restore(path, parts, {"lr": 0.1})
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert same({name: part.state_dict() for name, part in parts.items()}, before)


def test_checkpoints_are_not_executed(tmp_path, examples, parts):
    import resumable

    path, place = tmp_path / "checkpoint.pth", tmp_path / "sprung"
    torch.save({"epochs": 1, "recipe": {}, "model": Trap(place)}, path)
    with pytest.raises(CommandError, match="mkdir") as caught:
        resumable.restore(path, parts, {})
    assert "weights_only=False" not in str(caught.value)
    assert not place.exists()
