"""Energy of calls, with a counter in the place of the driver's; on a GPU, the driver's."""

import sys
import types

import pytest
import torch

from bench import energy, report


@pytest.fixture
def driver(monkeypatch):
    """pynvml of one GPU, which takes 3 J a call and none at rest."""
    made = types.ModuleType("pynvml")
    made.NVMLError = type("NVMLError", (Exception,), {})
    made.calls = 0
    made.nvmlInit = lambda: None
    made.nvmlDeviceGetHandleByUUID = {"GPU-1-2": "gpu"}.__getitem__
    made.nvmlDeviceGetTotalEnergyConsumption = lambda gpu: 10**9 + 3000 * made.calls
    monkeypatch.setitem(sys.modules, "pynvml", made)
    properties = types.SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def test_of_calls(driver, monkeypatch):
    monkeypatch.setattr(energy, "SECONDS", 0.01)

    def call():
        driver.calls += 1

    assert energy.of_calls(call) == {"joules": pytest.approx(3.0)}
    assert driver.calls % energy.LAUNCHED == 0
    assert energy.absent("cuda") == {}


def test_absent(driver, monkeypatch):
    def refuse(gpu):
        raise driver.NVMLError("Not Supported")

    driver.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert energy.absent("cuda") == {"energy": "the driver does not tell: Not Supported"}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in energy.absent("cuda")["energy"]
    assert energy.absent("cpu") == {"energy": "it is read from GPUs"}


def test_it_is_shown_for_an_image():
    error = {"mean": 0.0, "max": 0.0}
    row = {"case": "resnet18/b2/bf16", "what": "resnet18", "images": 2, "joules": 0.5}
    row |= {
        "why_not": None,
        "seconds": None,
        "floor": {"seconds": None},
        "speedup": None,
        "to_peer": None,
    }
    row |= {"prepare_seconds": None, "error": error}
    assert report.figures(row)["energy an image"] == "250 mJ"
    assert report.figures(row | {"joules": None})["energy an image"] == ""


@pytest.mark.gpu
def test_on_a_gpu():
    pytest.importorskip("pynvml")
    x = torch.ones(4096, 4096, device="cuda")
    assert 0 < energy.of_calls(lambda: x @ x)["joules"] < 100
