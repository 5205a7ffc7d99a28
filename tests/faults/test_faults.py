"""Faults of the machine around a run: each has one test here, and a line in docs/reliability.md."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmtune.errors import OutputError
from vlmtune.training.lock import LOCK_FILE, only_run

SECRETS = {"HF_TOKEN": "hf_plantedEnvironment", "WANDB_API_KEY": "planted-key-of-wandb"}


# -- signals and locks, with real processes ---------------------------------------------------------------


def enter(folder: Path) -> None:
    with only_run(folder):
        pass


def wait_for(path: Path, process: Any) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_a_real_run_is_stopped_locked_refused_and_resumed(make_run: Callable[[], Any], whole: Any) -> None:
    """SIGTERM saves and exits 75; a second run in the directory is refused; a changed recipe too; then it goes on."""
    run = make_run()
    # Held in its first checkpoint, so that what follows finds it alive.
    process = run.start()
    wait_for(run.output / "checkpoint-2", process)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(OutputError, match=rf"Another run is writing into {run.output} \(process {process.pid} on"):
        enter(run.output)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "SIGTERM: the run ends after this step" in said and "The same command goes on from there." in said
    assert "Traceback" not in said
    assert str(run.record()["status"]).startswith("stopped by StoppedBySignal")
    run.assert_nothing_is_broken()
    code, said = run.finish("--learning_rate", "5e-4", "--max_train_samples", "40")
    assert (
        code == 1 and "learning_rate was 0.001 and is 0.0005" in said and "max_train_samples was 48 and is 40" in said
    )
    code, said = run.finish("--save_total_limit", "2", env=SECRETS)
    assert code == 0 and "going on from" in said, said
    run.assert_finished_as(whole)
    assert [entry["status_before"][:7] for entry in run.record()["resumed"]] == ["stopped"]


@pytest.mark.slow
def test_a_second_signal_ends_at_once(make_run: Callable[[], Any]) -> None:
    run = make_run()
    process = run.start("--max_steps", "500", "--save_steps", "1", "--eval_strategy", "no")
    wait_for(run.output / "checkpoint-1", process)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT) and "again: ended at once" in said
    run.assert_nothing_is_broken()


def test_the_lock_is_freed(tmp_path: Path) -> None:
    with only_run(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).exists()
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk that cannot be written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield folder
        return
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no read-only disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("name", [".", "run"])
def test_a_read_only_output_directory(name: str, read_only: Path) -> None:
    with pytest.raises(OutputError, match="Nothing can be written in the output directory"):
        enter(read_only / name)


# -- secrets ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_secret_is_in_anything_a_run_writes(make_run: Callable[[], Any]) -> None:
    run = make_run()
    flags = ("--hub_token", "hf_plantedRecipe", "--report_to", "tensorboard", "--max_steps", "2", "--save_steps", "1")
    assert run.finish(*flags, env=SECRETS)[0] == 0
    # A failure that has a secret in its message, traceback and all.
    planted = ("--dataset_path", "/no/hf_plantedRecipe/hf_plantedEnvironment")
    code, said = run.finish(*flags, "--debug", *planted, "--output_dir", f"{run.output.parent}/second", env=SECRETS)
    assert code != 0 and "(hidden)" in said
    written = {path: path.read_bytes() for path in run.output.parent.rglob("*") if path.is_file()}
    assert any(path.name.startswith("events.out") for path in written) and any(
        path.name == "README.md" for path in written
    )
    for secret in (*SECRETS.values(), "hf_plantedRecipe"):
        assert secret not in said
        assert [path for path, content in written.items() if secret.encode() in content] == []


def test_a_killed_run_has_its_log(whole: Any) -> None:
    assert json.loads((whole.output / "log.jsonl").read_text().splitlines()[0])["step"] == 1


def test_the_page_of_faults_names_tests_that_exist() -> None:
    tests = Path(__file__).parents[1]
    page = (tests.parent / "docs" / "reliability.md").read_text()
    named, file = 0, ""
    for folder, test in re.findall(r"`([\w/]+\.py)?::(test_\w+)`", page):
        file = folder or file
        assert f"def {test}(" in (tests / file).read_text(), f"{file}::{test}"
        named += 1
    assert named > 25
