"""What faults do to a run inside one process: stops that save, steps done again, steps left out."""

from __future__ import annotations

import gc
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
from transformers import TrainerCallback

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.errors import ImageError, NonFiniteError, ResumeError, StoppedBySignal, TrainingError
from vlmtune.training.checkpoints import damage, seal
from vlmtune.training.run_state import RUN_STATE, RunState
from vlmtune.training.steady import SKIPPED_IN_A_ROW
from vlmtune.training.trainer import MemoryEfficientTrainer

KEYS = ["k0"] * 5 + ["k1"] * 5


def sampler(batch_size: int = 2, **options: Any) -> ImageGroupSampler:
    return ImageGroupSampler([""] * 10, [20] * 10, batch_size, **options)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def losses(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


class At(TrainerCallback):
    """Does something at one event of one step."""

    def __init__(self, event: str, step: int, action: Any) -> None:
        def act(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                action()

        setattr(self, event, act)


@pytest.fixture
def same_trainer(make_trainer, fresh_model) -> Any:
    """Make trainers that begin with the same adapters."""

    def make(*, dropout: float = 0.2, **options: Any) -> MemoryEfficientTrainer:
        torch.manual_seed(0)
        return make_trainer(model=fresh_model(lora_dropout=dropout), **options)

    return make


# -- signals ----------------------------------------------------------------------------------------------


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


# -- what is not finite -----------------------------------------------------------------------------------


class Poison(SharedImageCollator):
    """Gives the batches with these numbers weights that make the loss infinite."""

    batches: tuple[int, ...] = ()
    made = 0

    def __call__(self, rows: Any) -> Any:
        batch = super().__call__(rows)
        self.made += 1
        if self.made in self.batches:
            batch["target_weights"] = torch.full_like(batch["target_weights"], torch.inf, dtype=torch.float32)
        return batch


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_is_left_out(max_grad_norm: float, make_trainer, processor, caplog: pytest.LogCaptureFixture) -> None:
    collator = Poison(processor, "gemma3")
    trainer = make_trainer(
        train_sampler=sampler(),
        data_collator=collator,
        on_nonfinite="skip",
        logging_steps=2,
        logging_first_step=False,
        max_grad_norm=max_grad_norm,
    )
    kept: dict[int, Any] = {}
    step = MemoryEfficientTrainer.training_step

    def poisoned(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept[self.state.global_step] = weights(self)
        if self.state.global_step == 1:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            hook = parameter.register_hook(lambda gradient: gradient * torch.nan)
            try:
                return step(self, model, inputs, *args, **kwargs)
            finally:
                hook.remove()
        return step(self, model, inputs, *args, **kwargs)

    trainer.training_step = poisoned.__get__(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    for name, value in kept[1].items():
        assert torch.equal(value, kept[2][name]), "the step reached the weights"
    assert any(not torch.equal(value, kept[3][name]) for name, value in kept[2].items())
    assert trainer.run_state.skipped == 1
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps") for entry in logs] == [1, None]
    assert all(0 < entry["loss"] < 20 for entry in logs)
    assert trainer.state.log_history[-1]["skipped_steps"] == 1
    assert "step 2 is left out (1 so far)" in caplog.text and "with the samples" in caplog.text


def test_a_model_that_is_broken_stops_all_the_same(make_trainer) -> None:
    def break_weights() -> None:
        with torch.no_grad():
            next(p for p in trainer.model.parameters() if p.requires_grad).view(-1)[0] = torch.nan

    trainer = make_trainer(max_steps=40, on_nonfinite="skip", callbacks=[At("on_step_begin", 1, break_weights)])
    with pytest.raises(NonFiniteError, match="in a row"):
        trainer.train()
    assert trainer.state.global_step == 1 + SKIPPED_IN_A_ROW


# -- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("ours", [True, False])
def test_memory_that_runs_out(
    where: str, at: int, ours: bool, same_trainer, processor, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Raised inside the real forward or half-way through the real backward, where some gradients are there already."""

    def run(oom: bool, folder: str) -> Any:
        seen: list[str] = []

        class Seen(SharedImageCollator):
            def __call__(self, rows: Any) -> Any:
                batch = super().__call__(rows)
                seen.extend(batch["sample_ids"])
                return batch

        given = {"train_sampler": sampler(4)} if ours else {}
        trainer = same_trainer(
            max_steps=5,
            dropout=0.0,
            per_device_train_batch_size=4,
            data_collator=Seen(processor, "gemma3"),
            output_dir=str(tmp_path / folder),
            **given,
        )
        if oom:
            plant(trainer)
        trainer.train()
        return trainer

    def plant(trainer: Any) -> None:
        def fail(*args: Any) -> None:
            if (
                trainer.state.global_step == at
                and trainer.args.per_device_train_batch_size == 4
                and trainer.model.training
            ):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        if where == "forward":
            trainer.model.get_base_model().lm_head.register_forward_pre_hook(fail)
        else:
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            trained[len(trained) // 2].register_hook(fail)

    whole, shrunk = run(False, "whole"), run(True, "shrunk")
    assert (shrunk.args.per_device_train_batch_size, shrunk.args.gradient_accumulation_steps) == (2, 2)
    assert "a device takes 2 samples at once, 2 times a step, instead of 4, 1 times" in caplog.text
    assert shrunk.state.global_step == 5
    for step, loss in losses(whole).items():
        assert losses(shrunk)[step] == pytest.approx(loss, rel=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(shrunk)[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"on_oom": "stop"}, "on_oom is stop"), ({"per_device_train_batch_size": 1}, "batch is 1 already")],
)
def test_memory_that_runs_out_for_good(options: dict[str, Any], reason: str, make_trainer) -> None:
    trainer = make_trainer(**options)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.get_base_model().lm_head.register_forward_pre_hook(fail)
    with pytest.raises(TrainingError, match=rf"Memory ran out in step 1 .*{reason}"):
        trainer.train()


def test_memory_that_runs_out_while_weights_change_is_not_tried_again(make_trainer) -> None:
    """Half of the weights may have been changed."""

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = make_trainer(callbacks=[At("on_optimizer_step", 1, fail)])
    with pytest.raises(TrainingError, match="outside forward and backward"):
        trainer.train()
    gc.collect()


def test_a_resumed_run_keeps_the_smaller_batch(make_trainer, tmp_path: Path) -> None:
    first = make_trainer(
        train_sampler=sampler(2, accumulation=2),
        gradient_accumulation_steps=2,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    first.train()
    resumed = make_trainer(train_sampler=sampler(4), per_device_train_batch_size=4, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.args.per_device_train_batch_size, resumed.args.gradient_accumulation_steps) == (2, 2)
    assert resumed.state.global_step == 4
