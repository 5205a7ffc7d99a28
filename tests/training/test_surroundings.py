"""Faults around a trainer: data loading, images, trackers, stalls."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import vlmtune
from PIL import Image, ImageFile
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from vlmtune.data.images import check, decode
from vlmtune.data.sample import ImageRef
from vlmtune.errors import ImageError, TrainingError
from vlmtune.training.loaders import REPLACEMENTS, SteadyBatches, calm_worker_deaths
from vlmtune.training.trackers import let_trackers_fail
from vlmtune.training.watchdog import Watchdog

# -- data loading -----------------------------------------------------------------------------------------


def test_a_data_loading_process_that_is_killed_is_replaced(
    make_trainer, fresh_model, caplog: pytest.LogCaptureFixture
) -> None:
    import multiprocessing

    import torch

    from vlmtune.batching.sampler import ImageGroupSampler

    class Kill(TrainerCallback):
        """What the system does when its memory is full."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGKILL)

    def train(*callbacks: Any) -> list[float]:
        torch.manual_seed(0)
        trainer = make_trainer(
            model=fresh_model(lora_dropout=0.2),
            train_sampler=ImageGroupSampler([""] * 10, [20] * 10, 1),
            per_device_train_batch_size=1,
            dataloader_num_workers=1,
            max_steps=12,
            callbacks=list(callbacks),
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert train(Kill()) == train()
    assert "a data loading process was killed; others load its batches again" in caplog.text


def test_another_loaders_signal_handler_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data import DataLoader
    from torch.utils.data._utils import signal_handling

    def mine(*_: Any) -> None: ...

    found = signal.signal(signal.SIGCHLD, mine)
    try:
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
        assert len(list(DataLoader(range(2), num_workers=1))) == 2
        assert signal.getsignal(signal.SIGCHLD) is not mine
        calm_worker_deaths()
        assert signal.getsignal(signal.SIGCHLD) is mine
        calm_worker_deaths()
        assert signal.getsignal(signal.SIGCHLD) is mine
    finally:
        signal.signal(signal.SIGCHLD, found)


def test_a_batch_that_a_killed_process_would_have_handed_over_is_loaded_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    from torch.utils.data import DataLoader

    calm_worker_deaths()
    loader: Any = DataLoader(torch.arange(6), batch_size=2, num_workers=1)
    batches: Any = iter(loader)
    deadline = time.monotonic() + 60
    while batches._worker_result_queue.empty():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    batches._workers[0].kill()
    batches._workers[0].join()
    # As in the moment in which the process is gone and the system does not say so yet.
    monkeypatch.setattr(batches._workers[0], "is_alive", lambda: True)
    steady = SteadyBatches(batches, lambda given: iter(list(loader)[given:]))
    assert [batch.tolist() for batch in (next(steady), next(steady), next(steady))] == [[0, 1], [2, 3], [4, 5]]
    assert "a data loading process was killed" in caplog.text


def test_processes_that_are_killed_again_and_again_stop_the_run() -> None:
    def dying() -> Iterator[int]:
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
        yield

    asked: list[int] = []

    def again(given: int) -> Iterator[int]:
        asked.append(given)
        return dying()

    with pytest.raises(TrainingError, match="lower dataloader_num_workers"):
        next(SteadyBatches(dying(), again, 5))
    assert asked == [5] * REPLACEMENTS


class HangingFile(ImageFile.ImageFile):
    """A format whose decoder never returns."""

    format = "HANGING"
    released = threading.Event()

    def _open(self) -> None:
        if self.fp.read(7) != b"HANGING":
            raise SyntaxError
        self._size, self._mode = (4, 4), "RGB"

    def load(self) -> Any:
        self.released.wait(60)
        raise OSError("released")


@pytest.fixture
def hanging_image(tmp_path: Path) -> Iterator[ImageRef]:
    HangingFile.released = threading.Event()
    Image.register_open("HANGING", HangingFile, lambda prefix: prefix.startswith(b"HANGING"))
    (tmp_path / "photo.jpg").write_bytes(b"HANGING image")
    yield ImageRef(str(tmp_path / "photo.jpg"))
    HangingFile.released.set()
    Image.ID.remove("HANGING")
    del Image.OPEN["HANGING"]


def test_an_image_that_hangs_its_decoder(hanging_image: ImageRef) -> None:
    started = time.perf_counter()
    with pytest.raises(ImageError, match=r"photo\.jpg could not be read and decoded within 0\.2 s"):
        decode(hanging_image, timeout=0.2)
    assert "within 0.2 s" in str(check(hanging_image, "full", timeout=0.2))
    assert time.perf_counter() - started < 10
    good = io.BytesIO()
    Image.new("RGB", (3, 2)).save(good, "PNG")
    assert decode(ImageRef(bytes=good.getvalue()), timeout=10).size == (3, 2)


def test_image_timeout_goes_for_answering_and_for_checks(
    hanging_image: ImageRef, image_folder: Path, tiny_gemma3_dir: Path, tmp_path: Path, capsys
) -> None:
    rows = [{"id": path.stem, "image": str(path), "question": "What?", "answer": "red"} for path in
            (Path(str(hanging_image.path)), image_folder / "0.jpg")]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--dataset_path", tmp_path / "data.jsonl", "--image_timeout", 0.3, "--max_new_tokens", 2)
    model = ("--model_name_or_path", tiny_gemma3_dir, "--torch_dtype", "float32", "--honesty", "off")
    assert vlmtune("evaluate", *model, *options, "--evaluation_dir", tmp_path / "e") == 0
    found = json.loads((tmp_path / "e" / "scores.json").read_text())
    assert found["samples"] == 1 and "within 0.3 s" in found["unanswered"]["photo"]
    assert vlmtune("evaluate", *model, *options, "--verify_images", "full", "--evaluation_dir", tmp_path / "f") == 1
    assert "within 0.3 s" in capsys.readouterr().err


# -- trackers and stalls ----------------------------------------------------------------------------------


def test_a_tracker_that_cannot_write_does_not_stop_the_run(
    make_trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "logs"))
    trainer = make_trainer(report_to=["tensorboard"])
    assert any(isinstance(one, TensorBoardCallback) for one in trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.state.global_step == 4
    assert caplog.text.count("the tracker TensorBoard failed and gets nothing more") == 1


def test_a_tracker_that_is_offline_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    class Offline(WandbCallback):
        def __init__(self) -> None:
            self._wandb = SimpleNamespace()

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            calls.append("log")
            raise ConnectionError("api.wandb.ai cannot be reached")

    tracker = Offline()
    Offline.__name__ = "WandbCallback"
    let_trackers_fail([tracker])
    assert calls == []
    import vlmtune.training.trackers as trackers

    trackers._guard(tracker)
    for _ in range(3):
        tracker.on_log(None, None, None)
    assert calls == ["log"]
    assert "api.wandb.ai cannot be reached" in caplog.text


def test_a_stall_logs_the_stack_of_every_thread(make_trainer, caplog: pytest.LogCaptureFixture) -> None:
    class Stall(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                this_is_where_it_stands()

    def this_is_where_it_stands() -> None:
        time.sleep(1.5)

    other = threading.Event()
    threading.Thread(target=other.wait, name="another thread", daemon=True).start()
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(stall_seconds=0.5, max_steps=2, callbacks=[Stall()])
        trainer.train()
    other.set()
    assert "no step has ended for" in caplog.text and "since step 1" in caplog.text
    assert "this_is_where_it_stands" in caplog.text and "another thread:" in caplog.text
    time.sleep(0.3)
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_no_watchdog_where_none_is_wanted(make_trainer) -> None:
    trainer = make_trainer(stall_seconds=0)
    assert not any(isinstance(one, Watchdog) for one in trainer.callback_handler.callbacks)
