"""Data read in a process of their own: the same rows, set aside and logged the same, or read again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = """
import dataclasses, json, logging, sys
from vlmtune.config import VLMDataArguments
from vlmtune.data.ahead import Ahead, worthwhile

how, path = sys.argv[1:3]
log = []
class Kept(logging.Handler):
    def emit(self, record):
        log.append((record.levelname, record.getMessage()))
logging.getLogger("vlmtune").addHandler(Kept())
options = VLMDataArguments(dataset_path=path, max_bad_fraction=0.5, validation_fraction=0.25)
if how == "here":
    from vlmtune.data.loading import load_train_and_eval as load
else:
    assert worthwhile(options)
    ahead = Ahead(options)
    load = ahead.load
if how == "other":
    options = dataclasses.replace(options, max_train_samples=3)
if how == "killed":
    ahead._process.kill()
try:
    train, evaluation = load(options)
except Exception as error:
    print(json.dumps([type(error).__name__, str(error), log]))
else:
    sides = (train, evaluation)
    rows = [[list(data.dataset), [vars(row) for row in data.quarantine.rows], data.source] for data in sides]
    print(json.dumps([rows, log]))
"""


def read(how: str, path: Path) -> object:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert "Traceback" not in found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of more images than lie in memory, among them a missing image, an empty caption and a repeat."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "Images").mkdir()
    lines = ["image,caption"]
    for number in range(40):
        Image.new("RGB", (8, 8), (number * 6, 0, 0)).save(folder / "Images" / f"{number}.png")
        lines += [f"{number}.png,image {number} in words {turn}" for turn in range(60)]
    lines += ["absent.png,not there", "3.png,  ", "5.png,image 5 in words 7"]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_what_is_read_ahead_is_what_is_read(captions: Path) -> None:
    here = read("here", captions)
    assert isinstance(here, list)
    assert len(here[0][0][0]) + len(here[0][1][0]) == 2400
    assert {row["kind"] for row in here[0][0][1]} == {"missing image", "empty caption", "duplicate"}
    assert any("3 of 2403 rows were set aside" in message for _, message in here[1])
    assert read("ahead", captions) == here


@pytest.mark.parametrize("how", ["killed", "other"])
def test_what_cannot_be_taken_over_is_read_again(how: str, captions: Path) -> None:
    here, again = read("here", captions), read(how, captions)
    assert isinstance(here, list) and isinstance(again, list)
    assert len(again[0][0][0]) == (3 if how == "other" else len(here[0][0][0]))
    assert again[1] == here[1]


def test_an_error_is_met_in_its_turn_and_said_once(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("image,caption\nabsent.png,not there\n")
    assert read("ahead", tmp_path) == read("here", tmp_path)


def test_the_other_process_ends_with_this_one(captions: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys, time, vlmtune.data.ahead as ahead\n"
        "from vlmtune.config import VLMDataArguments\n"
        "ahead._read = lambda options, sender: (ahead.threading.Thread(target=ahead._end_with_parent).start(),"
        "time.sleep(60))\n"
        "started = ahead.Ahead(VLMDataArguments(dataset_path=sys.argv[1]))\n"
        "print(started._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    found = subprocess.run([sys.executable, "-c", script, str(captions)], capture_output=True, text=True, timeout=30)
    # Its end closes the output that both write to, for which run() waits.
    assert found.returncode == -9
    pid = int(found.stdout)
    state = Path(f"/proc/{pid}/stat")
    # Its output is closed a moment before it is gone.
    until = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.02)
