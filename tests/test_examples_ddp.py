"""The example of training on several processes."""

import argparse
import os
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from training import ENVIRONMENT, EXAMPLES, PATIENCE, same, state, wait_for

#: Runs the script in one of the processes; writes its id, and what it ends with.
WITNESS = """
import os, runpy, sys, torch
sys.path.insert(0, {examples!r})
import resumable
place = {output!r} + "/" + os.environ["RANK"]
with open(place + ".pid", "w") as file:
    file.write(str(os.getpid()))
guarded = resumable.guarded

def spied(main, quiet):
    differing = main.__globals__["differing"]
    def spy(model):
        torch.save(model.state_dict(), place + ".pth")
        return differing(model)
    main.__globals__["differing"] = spy
    return guarded(main, quiet=quiet)

resumable.guarded = spied
runpy.run_path({examples!r} + "/train_ddp.py", run_name="__main__")
"""


def torchrun(script, *args, log, stop=None):
    """Run two processes on this machine, ``stop`` them when they train; their exit status."""
    options = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", 2)
    command = [sys.executable, "-m", "torch.distributed.run", *options, script, *args]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*map(str, command)], env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        if stop is not None:
            wait_for("epoch 1/", log)
            stop()
        return process.wait(2 * PATIENCE)
    finally:
        process.terminate()  # it ends the processes it has started; killed, it would not


def test_two_processes(tmp_path, examples):
    """They end with the same parameters. One told to stop stops both, and they can go on."""
    import train_digits

    script, log = tmp_path / "witness.py", tmp_path / "log"
    script.write_text(WITNESS.format(examples=str(EXAMPLES), output=str(tmp_path)))
    options = ("--data", "synthetic", "--device", "cpu", "--output-dir", tmp_path / "output")
    options += ("--sync-bn",)

    def stop():
        os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGTERM)

    assert torchrun(script, *options, "--epochs", 10000, log=log, stop=stop) == 1
    text = log.read_text()
    # torchrun ends the other one when the first has ended: for that one it is a second signal.
    assert text.count("exitcode  : 143") in (1, 2), text
    assert text.count("exitcode  : 143") + text.count("exitcode  : -15") == 2, text
    assert text.count("the same command and --resume auto") == 1
    done = state(tmp_path / "output")["epochs"]
    assert text.count(f"epoch {done}/10000") == 1

    options = (*options, "--resume", "auto", "--epochs", done + 1)
    assert torchrun(script, *options, log=log) == 0, log.read_text()
    text = log.read_text()
    assert text.count(f": {done} epochs done") == text.count(f"epoch {done + 1}/{done + 1}") == 1
    assert "parameters are equal in all 2 processes" in text
    ranks = [torch.load(tmp_path / f"{i}.pth", weights_only=True) for i in range(2)]
    start = train_digits.network(0).state_dict()
    for name, _ in train_digits.network(0).named_parameters():
        assert same(ranks[0][name], ranks[1][name]), name
        assert not torch.equal(ranks[0][name], start[name]), name
    assert same(state(tmp_path / "output")["model"], ranks[0])


def test_a_signal_while_processes_agree(examples, monkeypatch):
    """Neither lost nor acted on alone: the process stops with the others, a step later."""
    import resumable

    check = runpy.run_path(str(EXAMPLES / "train_ddp.py"))["check_together"]
    stop = argparse.Namespace(number=0)

    def reduce(tensor, op):
        stop.number = 15

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    check(stop, torch.device("cpu"))
    with pytest.raises(resumable.StoppedError, match="SIGTERM"):
        check(stop, torch.device("cpu"))


def test_ddp_without_torchrun(examples, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="start it with torchrun"):
        runpy.run_path(str(EXAMPLES / "train_ddp.py"), run_name="__main__")
