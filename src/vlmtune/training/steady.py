"""A trainer that faults cost little: whole checkpoints, stops that save, steps that are done again.

Everything here is about what happens between steps; the loss, evaluation and model files are
:mod:`vlmtune.training.trainer`'s.
"""

from __future__ import annotations

import gc
import json
import logging
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.errors import NonFiniteError, ResumeError, StoppedBySignal, TrainingError
from vlmtune.training.accumulation import GradientAccumulationManager
from vlmtune.training.checkpoints import delete_old, latest_checkpoint, require_whole, step_of, writing_checkpoint
from vlmtune.training.loaders import (
    WORKER_ERRORS,
    SteadyBatches,
    batches_from,
    calm_worker_deaths,
    kept_random_state,
    worker_died,
)
from vlmtune.training.run_state import RunState
from vlmtune.training.signals import StopNow, StopSignals
from vlmtune.training.stream_sampler import StreamSampler, go_on, positions

logger = logging.getLogger("vlmtune.training")

# More in a row is a model that is broken, not a sample.
SKIPPED_IN_A_ROW = 10
TIMES_AGAIN = 3


class EvaluationCut(Exception):
    """A signal came during an evaluation."""


class SteadyTrainer(Trainer):
    """``transformers.Trainer`` with whole checkpoints, exact resuming, and ways through the faults of long runs.

    Attributes:
        run_state: the figures that go on over interruptions.
        train_sampler: makes the training batches of this rank; ``None`` for the base class's.
        skipping: the step in progress is left out.
        stop_signals: entered by whoever wants SIGTERM and SIGINT to end the run after a step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_state = RunState()
        self.train_sampler: ImageGroupSampler | StreamSampler | None = None
        self.stop_signals = StopSignals()
        self._restored: RunState | None = None
        self._batches: SteadyBatches | None = None
        self._loss_before_step = torch.zeros(())
        self._skipped_in_a_row = 0
        self.skipping = False
        self._in_step = False
        self._saved_step = 0

    # -- starting, going on -------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the base class does.

        Raises:
            ResumeError: there is no checkpoint to resume from, or it is damaged or lacks what resuming needs.
            NonFiniteError: a loss or gradient became NaN or infinite.
            StoppedBySignal: SIGTERM or SIGINT came; a checkpoint of the last step was written.
            TrainingError: memory ran out and the batch cannot be made smaller.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ResumeError(f"There is no finished checkpoint in {self.args.output_dir} to resume from.")
        checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self.run_state = RunState()
        calm_worker_deaths()
        if checkpoint is not None:
            require_whole(checkpoint)
            self._restored = RunState.load(checkpoint)
            own = checkpoint.resolve().parent == Path(str(self.args.output_dir)).resolve()
            self._saved_step = step_of(checkpoint) if own else -1
            self._take_smaller_batches(self._restored)
            go_on(self.train_sampler, self._restored.streamed)
        while True:
            try:
                return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
            except pickle.UnpicklingError as error:
                # Only weights are ever unpickled; whatever else a file holds is refused before it runs.
                raise ResumeError(f"{checkpoint} holds something other than states: {error}") from error
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                smaller = self._smaller_batches(error)
            # Outside the handler, where the failed step's tensors are no longer held by its traceback.
            checkpoint = self._shrink(smaller)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._batches = None
        self._epoch = kwargs["epoch"]
        first = kwargs["resume_from_checkpoint"] is not None and self._epoch == kwargs["epochs_trained"]
        self._batches_before = kwargs["steps_trained_in_current_epoch"] if first else 0
        if self._restored is not None:
            self._restore(self._restored)
            self._restored = None
            if self.run_state.evaluation_due:
                self._evaluate_now(kwargs["trial"], kwargs["ignore_keys_for_eval"])
        # The base class looks whether all is done only after a step.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            return
        super()._run_epoch(*args, **kwargs)

    def _restore(self, state: RunState) -> None:
        self.run_state = state
        self._tr_loss.fill_(state.loss_since_log)
        self._total_loss_scalar = state.loss_before
        self._globalstep_last_logged = state.logged_step
        # So that the mean loss and the speed are the whole run's.
        self._initial_global_step = 0
        for callback in self.callback_handler.callbacks:
            for saved in self._saved_callbacks(callback):
                vars(callback).update(saved["attributes"])
                if isinstance(callback, EarlyStoppingCallback):
                    patience, counter = callback.early_stopping_patience, callback.early_stopping_patience_counter
                    self.control.should_training_stop |= counter >= patience

    def _saved_callbacks(self, callback: Any) -> list[dict[str, Any]]:
        saved = self.state.stateful_callbacks.get(type(callback).__name__, [])
        return list(saved) if isinstance(saved, list) else [saved]

    def _evaluate_now(self, trial: Any, ignore_keys: Any) -> None:
        self.run_state.evaluation_due = False
        metrics = self._evaluate(trial, ignore_keys)
        if self._determine_best_metric(metrics=metrics, trial=trial) and self.args.save_strategy == SaveStrategy.BEST:
            self._save_checkpoint(self.model, trial)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # Not by the clock that gave start_time: it may have been put back since.
        return super()._finalize_training(trial, num_train_samples, time.time() - self.run_state.seconds())

    # -- batches ------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect the step's batches; data loading processes that were killed are replaced."""
        self._loss_before_step = self._tr_loss.clone()
        self._skipped_in_a_row = self._skipped_in_a_row if self.skipping else 0
        self.skipping = False
        first = self._batches is None
        if self._batches is None:
            self._batches = SteadyBatches(epoch_iterator, self._batches_again, self._batches_before)
        # A collective save would wait for ranks to which nothing happened.
        alone = self.args.world_size == 1
        try:
            # PyTorch's loader draws a random number when it starts; whether it starts here or after a fault must not
            # change what follows. Without a sampler of ours that number is the order of the samples.
            neutral = first and self.train_sampler is not None
            with self.stop_signals.at_once(alone), kept_random_state() if neutral else nullcontext():
                batches, count = super().get_batch_samples(self._batches, num_batches, device)
                return batches, count
        except StopNow:
            self._save_between_steps()
            self._stopped(self.stop_signals.received)
        except Exception:
            if alone:
                self._save_between_steps()
            raise

    def _save_between_steps(self) -> None:
        """Write what the finished steps have learned, unless it is written already."""
        if self.state.global_step > self._saved_step:
            self._save_checkpoint(self.model, None)

    def _batches_again(self, given: int) -> Iterator[Any]:
        return batches_from(self.get_train_dataloader(), self._epoch, given)

    # -- what is not finite -------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take one batch forward and backward; a loss that is to be skipped counts as nought."""
        self._in_step = True
        loss: Tensor = super().training_step(*args, **kwargs)
        self._in_step = False
        return loss if torch.isfinite(loss) else torch.zeros_like(loss)

    def skip_step(self, message: str) -> None:
        """Leave out the step: no gradient reaches the weights.

        Raises:
            NonFiniteError: too many steps in a row were left out.
        """
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > SKIPPED_IN_A_ROW:
            raise NonFiniteError(f"{message} {SKIPPED_IN_A_ROW} steps in a row before it were left out too.")
        self.model.zero_grad()
        self.skipping = True
        self._tr_loss.copy_(self._loss_before_step)
        self.run_state.skipped += 1
        self.run_state.skipped_since_log += 1
        logger.warning(
            "step %d is left out (%d so far): %s", self.state.global_step + 1, self.run_state.skipped, message
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean loss of the steps that were not left out, and how many were."""
        state = self.run_state
        if "learning_rate" in logs and "loss" in logs:
            steps, skipped = self.state.global_step - state.logged_step, state.skipped_since_log
            if skipped:
                logs["skipped_steps"] = state.skipped
                if steps > skipped:
                    logs["loss"] *= steps / (steps - skipped)
                else:
                    del logs["loss"]
            state.logged_step, state.skipped_since_log = self.state.global_step, 0
        elif "train_runtime" in logs and state.skipped:
            logs["skipped_steps"] = state.skipped
            logs["train_loss"] *= self.state.global_step / max(self.state.global_step - state.skipped, 1)
        super().log(logs, start_time)

    # -- memory -------------------------------------------------------------------------------------------

    def _smaller_batches(self, error: RuntimeError) -> GradientAccumulationManager:
        """Half the device's batch at the same effective batch."""
        args = self.args
        now = GradientAccumulationManager(args.per_device_train_batch_size, args.gradient_accumulation_steps)
        reasons = {
            "on_oom is stop": args.on_oom != "shrink",
            "with several processes the others are in the midst of the step": args.world_size > 1,
            "it ran out outside forward and backward": not self._in_step,
            "the device's batch is 1 already": args.per_device_train_batch_size == 1,
        }
        reason = next((text for text, holds in reasons.items() if holds), None)
        if reason is not None:
            kept = latest_checkpoint(args.output_dir)
            raise TrainingError(
                f"Memory ran out in step {self.state.global_step + 1} with {now.per_device_batch_size} samples a "
                f"device, and the batch was not made smaller: {reason}. "
                + (f"The last good checkpoint is {kept}. " if kept else "")
                + f"Halve per_device_train_batch_size and double gradient_accumulation_steps (now "
                f"{now.accumulation_steps}), or turn on activation_checkpointing. PyTorch said: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        return now.halve()

    def _shrink(self, smaller: GradientAccumulationManager) -> Path | None:
        """Write what the last step left, take the smaller batches from now on, and say where to go on from."""
        self.model.zero_grad()
        self._batches, self._in_step = None, False
        self._tr_loss = self._loss_before_step
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "memory ran out in step %d: it is done again, and from now on a device takes %d samples at once, %d times "
            "a step, instead of %d, %d times; the step's samples are the same",
            *(self.state.global_step + 1, smaller.per_device_batch_size, smaller.accumulation_steps),
            *(self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps),
        )
        self._set_batches(smaller.per_device_batch_size, smaller.accumulation_steps)
        if self.state.global_step == 0:
            self.run_state = RunState(seconds_before=self.run_state.seconds())
            return None
        self._save_between_steps()
        checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        self._restored = RunState.load(checkpoint)
        return checkpoint

    def _take_smaller_batches(self, state: RunState) -> None:
        """Go on with the batches that a run without memory came down to."""
        args, now = self.args, (self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps)
        same_step = state.device_batch * state.accumulation == now[0] * now[1]
        if args.on_oom == "shrink" and same_step and state.device_batch < now[0]:
            self._set_batches(state.device_batch, state.accumulation)

    def _set_batches(self, device_batch: int, accumulation: int) -> None:
        self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps = device_batch, accumulation
        self._train_batch_size = self.args.train_batch_size
        if self.train_sampler is not None:
            self.train_sampler.set_batches(self.args.train_batch_size, accumulation)

    # -- saving -------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        stop = self._stop_received()
        if stop:
            self.run_state.evaluation_due = self.control.should_evaluate
            self.control.should_evaluate, self.control.should_save = False, True
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)
        except EvaluationCut:
            self.run_state.evaluation_due = True
            self._save_checkpoint(model, None)
            stop = self._stop_received()
        if stop:
            self._stopped(stop)

    def _stopped(self, number: int) -> NoReturn:
        name, step = signal.Signals(number).name, self.state.global_step
        place = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        saved = f"step {step} was finished and {place} written" if step else "no step had been finished"
        raise StoppedBySignal(f"{name} came; {saved}. The same command goes on from there.")

    def _stop_received(self) -> int:
        """The signal that some rank has received, the same on every rank; 0 for none."""
        received = self.stop_signals.received
        if self.args.world_size == 1:
            return received
        flag = torch.tensor(received, device=self.args.device)
        return int(self.accelerator.gather(flag.reshape(1)).max())

    def cut_evaluation(self) -> None:
        """End an evaluation, between two of its batches, when a signal has come; it is made up for after resuming."""
        if self.is_in_train and self._stop_received():
            raise EvaluationCut

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate without changing the training that follows: its random numbers are as before."""
        for times in range(TIMES_AGAIN + 1):
            try:
                with kept_random_state():
                    return super()._evaluate(*args, **kwargs)
            except WORKER_ERRORS as error:
                if not worker_died(error) or times == TIMES_AGAIN:
                    raise
                logger.warning("a data loading process was killed; the evaluation is done again (%s)", error)
        raise AssertionError("unreachable")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a whole checkpoint or none, and only then delete old ones."""
        args, state = self.args, self.state
        run_dir = Path(self._get_output_dir(trial=trial))
        place = run_dir / f"checkpoint-{state.global_step}"
        self.store_flos()
        mean_loss = self.accelerator.gather(self._tr_loss.reshape(1)).mean().item()
        self.run_state.streamed = positions(self.train_sampler, self.accelerator)
        with self.whole_checkpoint(place) as folder:
            self.save_model(str(folder), _internal_call=True)
            best = run_dir / f"checkpoint-{state.best_global_step}"
            if state.best_global_step and (best == place or best.is_dir()):
                state.best_model_checkpoint = str(best)
            if not args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            if args.should_save:
                self._export_callbacks()
                self._figures(mean_loss).save(folder)
                arguments = json.dumps(args.to_sanitized_dict(), indent=2, default=str)
                (folder / "training_args.json").write_text(arguments + "\n")
                state.save_to_json(str(folder / "trainer_state.json"))
        self._saved_step = state.global_step
        if args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if args.should_save:
            delete_old(run_dir, keep=args.save_total_limit, best=state.best_model_checkpoint, newest=place)

    def whole_checkpoint(self, place: Path) -> AbstractContextManager[Path]:
        """Give a folder that becomes ``place`` when everything is written."""
        return writing_checkpoint(place, writes=self.args.should_save, wait=self.accelerator.wait_for_everyone)

    def _export_callbacks(self) -> None:
        exported: dict[str, Any] = {}
        for one in [*self.callback_handler.callbacks, self.control]:
            if isinstance(one, ExportableState):
                name = type(one).__name__
                exported[name] = [*exported[name], one.state()] if name in exported else [one.state()]
        self.state.stateful_callbacks = exported

    def _figures(self, mean_loss: float) -> RunState:
        state = self.run_state
        state.loss_since_log, state.loss_before = mean_loss, self._total_loss_scalar
        state.logged_step = self._globalstep_last_logged
        state.device_batch = self.args.per_device_train_batch_size
        state.accumulation = self.args.gradient_accumulation_steps
        return state
