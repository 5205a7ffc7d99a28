"""What stops do to a run inside one process: signals that save, resuming that changes nothing, planted pickles."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training.steps import (
    At,
    losses,
    sampler,
    weights,
)

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.errors import ImageError, ResumeError, StoppedBySignal
from vlmtune.training.checkpoints import damage, seal
from vlmtune.training.run_state import RUN_STATE, RunState


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(number: signal.Signals, same_trainer, tmp_path: Path) -> None:
    whole = same_trainer(max_steps=6, train_sampler=sampler())
    whole.train()
    before = signal.getsignal(number)
    trainer = same_trainer(
        max_steps=6,
        train_sampler=sampler(),
        callbacks=[At("on_step_begin", 2, lambda: os.kill(os.getpid(), number))],
    )
    with (
        pytest.raises(StoppedBySignal, match=rf"{number.name} came; step 3 .*checkpoint-3 written"),
        trainer.stop_signals,
    ):
        trainer.train()
    assert signal.getsignal(number) == before
    assert damage(tmp_path / "run" / "checkpoint-3") is None
    resumed = same_trainer(max_steps=6, train_sampler=sampler())
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


def test_a_signal_while_waiting_for_data_does_not_wait(same_trainer, processor, tmp_path: Path) -> None:
    class Hanging(SharedImageCollator):
        made = 0

        def __call__(self, rows: Any) -> Any:
            self.made += 1
            if self.made == 4:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                time.sleep(60)
            return super().__call__(rows)

    trainer = same_trainer(train_sampler=sampler(), data_collator=Hanging(processor, "gemma3"))
    started = time.perf_counter()
    with pytest.raises(StoppedBySignal, match="checkpoint-2 written"), trainer.stop_signals:
        trainer.train()
    assert time.perf_counter() - started < 30
    assert damage(tmp_path / "run" / "checkpoint-2") is None


def test_an_evaluation_that_was_cut_is_made_up_for(same_trainer, rows, tmp_path: Path) -> None:
    options = {
        "max_steps": 6,
        "eval_dataset": rows,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
    }
    options |= {"save_steps": 6, "load_best_model_at_end": False, "metric_for_best_model": "loss"}
    whole = same_trainer(train_sampler=sampler(), **options)
    whole.train()
    cut = At(
        "on_prediction_step",
        2,
        lambda: os.kill(os.getpid(), signal.SIGTERM) if not trainer.stop_signals.received else None,
    )
    trainer = same_trainer(train_sampler=sampler(), callbacks=[cut], **options | {"output_dir": str(tmp_path / "cut")})
    with pytest.raises(StoppedBySignal), trainer.stop_signals:
        trainer.train()
    place = tmp_path / "cut" / "checkpoint-2"
    assert RunState.load(place).evaluation_due
    resumed = same_trainer(train_sampler=sampler(), **options | {"output_dir": str(tmp_path / "cut")})
    resumed.train(resume_from_checkpoint=str(place))
    found, expected = (
        [{k: e[k] for k in ("step", "loss", "eval_loss") if k in e} for e in t.state.log_history]
        for t in (resumed, whole)
    )
    assert found[:-1] == expected[:-1]
    assert resumed.state.best_global_step == whole.state.best_global_step


# -- going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, 5, 8])
def test_the_losses_after_resuming_are_those_of_an_uninterrupted_run(at: int, same_trainer, tmp_path: Path) -> None:
    """Log lines that span the interruption too; 5 is the end of an epoch. Dropout is on: random numbers count."""
    options = {
        "logging_steps": 4,
        "save_strategy": "steps",
        "save_steps": at,
        "save_total_limit": None,
        "max_steps": 28,
    }
    whole = same_trainer(train_sampler=sampler(), **options)
    whole.train()
    place = tmp_path / "run" / f"checkpoint-{at}"
    resumed = same_trainer(train_sampler=sampler(), **options | {"output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(place))
    assert losses(resumed) == losses(whole)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    last = [trainer.state.log_history[-1]["train_loss"] for trainer in (whole, resumed)]
    assert last[0] == pytest.approx(last[1], rel=1e-6)


def test_nothing_is_trained_beyond_the_last_step(make_trainer, tmp_path: Path) -> None:
    """A run that was killed while it saved its model has all its steps behind it; the base class takes one more."""
    first = make_trainer(save_strategy="steps", save_steps=4)
    first.train()
    again = make_trainer()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    for name, value in weights(first).items():
        assert torch.equal(value, weights(again)[name])
    assert again.state.log_history[-1]["train_loss"] == pytest.approx(first.state.log_history[-1]["train_loss"])


def test_a_clock_that_goes_back_changes_no_figure(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [2e9]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    trainer = make_trainer(save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    last = trainer.state.log_history[-1]
    assert trainer.run_state.seconds() >= 0
    assert losses(trainer).keys() == {1, 2, 3, 4}
    assert all(entry.get("samples_per_second", 1) > 0 for entry in trainer.state.log_history), last


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_planted_pickle_does_not_run(name: str, make_trainer, tmp_path: Path) -> None:
    """The manifest was made to agree: hashes show damage, not intent."""
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    place, marker = tmp_path / "run" / "checkpoint-1", tmp_path / "ran"
    payload = pickle.dumps(Payload(marker))
    pickle.loads(payload)
    assert marker.exists()
    marker.unlink()
    (place / name).write_bytes(payload)
    (place / "manifest.json").unlink()
    seal(place)
    with pytest.raises(ResumeError, match="something other than states"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(place))
    assert not marker.exists()


def test_state_of_another_form(make_trainer, tmp_path: Path) -> None:
    (tmp_path / RUN_STATE).write_text(json.dumps([1]))
    with pytest.raises(ResumeError, match=RUN_STATE):
        RunState.load(tmp_path)


def test_an_image_that_fails_between_steps_costs_no_step(make_trainer, processor, tmp_path: Path) -> None:
    class Failing(SharedImageCollator):
        made = 0

        def __call__(self, rows: Any) -> Any:
            self.made += 1
            if self.made == 5:
                raise ImageError("photo.jpg took longer than 60 s")
            return super().__call__(rows)

    with pytest.raises(ImageError, match=r"photo\.jpg"):
        make_trainer(train_sampler=sampler(), data_collator=Failing(processor, "gemma3")).train()
    assert damage(tmp_path / "run" / "checkpoint-3") is None
