"""Trainings that are stopped, killed and resumed: nothing but the epoch they were in is lost."""

import os
import random
import signal
import time

import pytest
from training import IMAGEFOLDER, SMALL, same, state, wait_for

KILLS = 20
EPOCHS = 60  # of three steps: enough to be killed in twenty times
OPTIONS = (*SMALL, "--epochs", EPOCHS, "--model-ema", "--lr-warmup-epochs", 5)


@pytest.fixture
def whole(server, image_folder, tmp_path):
    """The state after a training that nothing disturbs, and the seconds an epoch takes."""
    start = time.monotonic()
    folder = tmp_path / "whole"
    options = (*OPTIONS, "--output-dir", folder)
    assert server.run(IMAGEFOLDER, image_folder, *options, log=tmp_path / "whole.log") == 0
    return state(folder), (time.monotonic() - start) / EPOCHS


def test_killed_at_any_moment(server, image_folder, tmp_path, whole):
    """Every checkpoint that is left loads, is no older than the last, and is gone on from."""
    expected, seconds = whole
    moments = random.Random(0)
    folder, log = tmp_path / "output", tmp_path / "log"
    options = (*OPTIONS, "--output-dir", folder, "--resume", "auto")
    kills = reached = resumed = 0
    while kills < KILLS:
        before = log.read_text() if log.exists() else ""
        process = server.start(IMAGEFOLDER, image_folder, *options, log=log)
        if moments.random() < 0.7:  # or it is killed while it starts
            wait_for("epoch", log, len(before))
        time.sleep(moments.uniform(0, 3 * seconds))
        os.kill(process, signal.SIGKILL)
        status = server.wait()
        said = log.read_text().removeprefix(before)
        if reached:
            # Unless it was killed before it got there, it went on from where the last one ended.
            assert not said or f"{reached} epochs done" in said, said
            resumed += bool(said)
        if status == 0:  # it was faster than the kill
            assert same(state(folder), expected)
            (folder / "checkpoint.pth").unlink()
            reached = 0
            continue
        assert status == -signal.SIGKILL
        kills += 1
        if (folder / "checkpoint.pth").exists():
            epochs = state(folder)["epochs"]
            assert epochs >= reached
            # What was announced had been saved.
            assert f"epoch {epochs + 2}/" not in said
            reached = epochs
        else:
            assert not reached
    assert resumed
    assert server.run(IMAGEFOLDER, image_folder, *options, log=log) == 0
    assert same(state(folder), expected)
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize(
    ("die", "epochs"),
    [
        (("fsync", 3), 1),  # the second checkpoint is written, but not forced to the disk
        (("replace", 2), 1),  # the second has not got its name
        (("fsync", 4), 2),  # it has
        (("replace", 1), 0),
    ],
)
def test_killed_while_saving(server, image_folder, tmp_path, die, epochs):
    folder, log = tmp_path / "output", tmp_path / "log"
    options = (image_folder, *SMALL, "--epochs", 3, "--output-dir", folder)
    assert server.run(IMAGEFOLDER, *options, log=log, die=die) == -signal.SIGKILL
    assert (folder / "checkpoint.pth").exists() == bool(epochs)
    if epochs:
        assert state(folder)["epochs"] == epochs
    assert server.run(IMAGEFOLDER, *options, "--resume", "auto", log=log) == 0
    options = (*options[:-1], tmp_path / "whole")
    assert server.run(IMAGEFOLDER, *options, log=log) == 0
    assert same(state(folder), state(tmp_path / "whole"))
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pth"]


def test_a_full_disk(server, image_folder, tmp_path):
    """The last checkpoint stays, the half of the next does not."""
    folder, log = tmp_path / "output", tmp_path / "log"
    options = (image_folder, *SMALL, "--output-dir", folder, "--resume", "auto", "--epochs")
    assert server.run(IMAGEFOLDER, *options, 1, log=log) == 0
    kept = (folder / "checkpoint.pth").read_bytes()
    log.unlink()
    assert server.run(IMAGEFOLDER, *options, 2, log=log, limit=len(kept) // 2) == 1
    message = log.read_text().splitlines()[-1]
    assert f"{folder / 'checkpoint.pth'}: cannot be written: File too large" in message
    assert (folder / "checkpoint.pth").read_bytes() == kept
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize(
    ("number", "status", "workers"),
    [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 2),
     (signal.SIGTERM, 143, 2)],
)  # fmt: skip
def test_told_to_stop(server, image_folder, tmp_path, number, status, workers):
    """Ends after the step it is in, says how to go on, and that ends as if nothing had been.

    The signal goes to the whole group, worker processes too, as Ctrl-C does.
    """
    folder, log = tmp_path / "output", tmp_path / "log"
    options = (*SMALL, "--epochs", 4, "--workers", workers, "--output-dir", folder)
    process = server.start(IMAGEFOLDER, image_folder, *options, log=log, seconds=0.1)
    wait_for("epoch 1/4", log)
    wait_for("a step begins", log, log.read_text().index("epoch 1/4"))  # so the workers are there
    os.killpg(process, number)
    assert server.wait() == status
    text = log.read_text()
    done = state(folder)["epochs"]
    assert f"epoch {done}/4" in text
    assert done < 4
    assert f"{folder / 'checkpoint.pth'} holds the state after the last whole epoch" in text
    assert "the same command and --resume auto" in text
    assert text.splitlines()[-1] == f"stopped by {number.name}"
    assert "Traceback" not in text
    assert server.run(IMAGEFOLDER, image_folder, *options, "--resume", "auto", log=log) == 0
    options = (*options[:-1], tmp_path / "whole")
    assert server.run(IMAGEFOLDER, image_folder, *options, log=log) == 0
    assert same(state(folder), state(tmp_path / "whole"))


def test_told_to_stop_in_the_first_epoch(server, image_folder, tmp_path):
    folder, log = tmp_path / "output", tmp_path / "log"
    options = (*SMALL, "--epochs", 4, "--output-dir", folder)
    process = server.start(IMAGEFOLDER, image_folder, *options, log=log, seconds=1)
    while not folder.exists():  # it is made when signals are minded already
        time.sleep(0.002)
    os.kill(process, signal.SIGTERM)
    assert server.wait() == 143
    text = log.read_text()
    assert text.count("a step begins") == 1
    assert "no epoch was finished: use the same command again" in text
    assert not list(folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_twice(server, image_folder, tmp_path, number):
    """The second signal does not wait for the step, which here would take an hour."""
    folder, log = tmp_path / "output", tmp_path / "log"
    options = (*SMALL, "--output-dir", folder)
    process = server.start(IMAGEFOLDER, image_folder, *options, log=log, seconds=3600)
    while not folder.exists():
        time.sleep(0.002)
    os.kill(process, number)
    wait_for("once more stops at once", log)
    os.kill(process, number)
    assert server.wait() == -number
