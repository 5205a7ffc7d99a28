"""The trainer: ``transformers.Trainer`` with a loss by supervised tokens, strict checkpoints and named failures.

Everything else (devices, schedulers, optimizers, trackers, resuming) is the base class's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.errors import NonFiniteError, ResumeError, TrainingError
from vlmtune.models.checkpoint import is_adapter_dir, save_model_and_processor
from vlmtune.models.families import get_family
from vlmtune.models.precision import short_formats
from vlmtune.models.provenance import base_fingerprint, base_model
from vlmtune.training.answer_pictures import show_answers
from vlmtune.training.answer_scores import AnswerScorer
from vlmtune.training.callbacks import LoggingCallback
from vlmtune.training.checkpoints import latest_checkpoint
from vlmtune.training.loaders import batch_loader
from vlmtune.training.loss import count_targets, install_supervised_loss, targets_from_labels
from vlmtune.training.parameter_groups import split_by_part
from vlmtune.training.refused_options import refuse_options
from vlmtune.training.sharding import ShardingTrainer
from vlmtune.training.shared_rows import dummy_image, shared_row_inputs
from vlmtune.training.steady import SteadyTrainer
from vlmtune.training.stream_sampler import StreamSampler
from vlmtune.training.throughput import Work
from vlmtune.training.trackers import let_trackers_fail
from vlmtune.training.watchdog import Watchdog

IdsByBatch = list[list[str]]


class MemoryEfficientTrainer(SteadyTrainer, ShardingTrainer):
    """Trains a vision-language model without ever forming full logits.

    Differs from ``transformers.Trainer`` in this:

    * the loss is the sum over supervised tokens divided by their number in the whole step, over all
      accumulated batches and all ranks; the LM head runs on supervised positions only, in chunks;
    * evaluation returns losses only, weighted by supervised tokens;
    * every checkpoint holds the processor, and loading one is strict: a missing tensor is an error;
    * a loss or gradient that is not finite stops the run, or leaves out the step, before it reaches the weights.

    What faults do to a run is :class:`~vlmtune.training.steady.SteadyTrainer`'s.

    Args:
        *args: as ``transformers.Trainer``.
        loss_chunk_tokens: supervised tokens the LM head takes at a time; 0 chooses by the vocabulary.
        train_sampler: makes the training batches of this rank; the base class's random ones by default.
        eval_sampler: the same for ``eval_dataset``, so that no sample is evaluated twice to fill a rank's batch.
        answer_scorer: scores generated answers at each evaluation; by default the loss alone is taken.
        **kwargs: as ``transformers.Trainer``; ``processing_class`` is the processor.
    """

    def __init__(
        self,
        *args: Any,
        loss_chunk_tokens: int = 0,
        train_sampler: ImageGroupSampler | StreamSampler | None = None,
        eval_sampler: ImageGroupSampler | None = None,
        answer_scorer: AnswerScorer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Says to the base class that compute_loss has already divided by the whole step's tokens.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        install_supervised_loss(self.model, chunk_tokens=loss_chunk_tokens)
        self.family = get_family(self.accelerator.unwrap_model(self.model))
        self.train_sampler, self.eval_sampler = train_sampler, eval_sampler
        if isinstance(train_sampler, StreamSampler):
            train_sampler.done = lambda: self.state.global_step
        self.answer_scorer = answer_scorer
        self._dummy_image: dict[str, Tensor] | None = None
        # Taken before weights are sharded: no rank alone can read them later.
        sharded = self.shares_out
        self._fingerprint = base_fingerprint(self.model) if sharded else None
        self.loaded_formats = {} if self.accelerator.mixed_precision == "no" else short_formats(self.model)
        base = base_model(self.model)
        places = (place for part, place in self.family.parts.items() if part in ("vision", "projector"))
        tower = (base.get_submodule(place) for place in places)
        self._tower_in_step = sharded or any(p.requires_grad for part in tower for p in part.parameters())
        self._step_ids: IdsByBatch = []
        self._eval_sums = self._no_sums()
        self.work = Work()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the training batches, those of ``train_sampler`` where there is one."""
        if self.train_sampler is None:
            random_order: DataLoader[Any] = super().get_train_dataloader()
            return random_order
        return self._loader(self.train_dataset, self.train_sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the loader of the evaluation batches, those of ``eval_sampler`` where it is for this data set."""
        if self.eval_sampler is None or eval_dataset not in (None, self.eval_dataset):
            in_order: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
            return in_order
        return self._loader(self.eval_dataset, self.eval_sampler)

    def _loader(self, rows: Any, sampler: ImageGroupSampler | StreamSampler) -> DataLoader[Any]:
        return batch_loader(rows, sampler, self.data_collator, self.args, self.accelerator)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the base class's optimizer, with the learning rates of the parts."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        split_by_part(optimizer, self.model if model is None else model, self.family, self.args)
        self.trained_groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        return optimizer

    # -- loss ---------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect the step's batches and count their supervised tokens, noting how long the data took."""
        started = time.perf_counter()
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.work.add(batches, time.perf_counter() - started)
        self._step_ids = [batch.get("sample_ids", []) for batch in batches]
        return batches, count

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        count = torch.tensor(sum(count_targets(batch) for batch in batch_samples), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the batch's summed loss over the step's supervised tokens."""
        inputs = dict(inputs)
        ids = inputs.pop("sample_ids", [])
        if "target_sources" not in inputs:
            inputs["target_sources"], inputs["target_ids"] = targets_from_labels(inputs.pop("labels"))
        inputs |= shared_row_inputs(self.family, self.accelerator.unwrap_model(model), inputs)
        if self._needs_dummy_image(inputs):
            inputs["dummy_image"] = self._dummy()
        count = num_items_in_batch if num_items_in_batch is not None else len(inputs["target_ids"])
        total = model(**inputs)["loss"]
        if not torch.isfinite(total):
            if not (self._may_skip and model.training):
                raise NonFiniteError(self._not_finite("loss", total.detach(), ids))
            # Every rank learns of it by the gradient.
            total = total * torch.nan
        # DDP and FSDP average gradients over ranks; the count is already over all of them.
        loss = total / max(int(count), 1) * (self.args.world_size if model.training else 1)
        return (loss, {"loss": loss, "total": total}) if return_outputs else loss

    def _needs_dummy_image(self, inputs: Mapping[str, Any]) -> bool:
        """Whether this rank must call the tower for nothing, because others may call it in this step.

        Ranks that shard weights gather them layer by layer, and all must call the same layers; so must ranks whose
        gradients of the tower are averaged.
        """
        collator = self.data_collator
        if self.args.world_size == 1 or not self._tower_in_step or not isinstance(collator, BaseVLMDataCollator):
            return False
        if getattr(collator, "cache", None) is not None:
            return False
        return "mm_encoder_outputs" not in inputs and self.family.image_inputs[0] not in inputs

    def _dummy(self) -> dict[str, Tensor]:
        if self._dummy_image is None:
            self._dummy_image = dummy_image(self.data_collator.encoder)
        return {name: tensor.to(self.args.device) for name, tensor in self._dummy_image.items()}

    @property
    def _may_skip(self) -> bool:
        return getattr(self.args, "on_nonfinite", "stop") == "skip"

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._finite_norm(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.skipping:
            return None
        # One process and many must take the same step: a tower that no image went through has the gradient nought
        # on many ranks, by their dummy image, so that its momentum and weight decay go on.
        if self._tower_in_step and self.args.world_size == 1:
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return self._finite_norm(super()._get_grad_norm(model, grad_norm=grad_norm))

    def _finite_norm(self, norm: Any) -> Any:
        # With float16 the scaler skips overflowing steps by itself.
        if norm is None or self.accelerator.scaler is not None or torch.isfinite(torch.as_tensor(norm)):
            return norm
        message = self._not_finite("gradient norm", norm, [i for ids in self._step_ids for i in ids])
        if not self._may_skip:
            raise NonFiniteError(message)
        self.skip_step(message)
        return None

    def _not_finite(self, what: str, value: Any, ids: list[str]) -> str:
        names = ", ".join(repr(name) for name in ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        checkpoint = latest_checkpoint(self.args.output_dir)
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been written yet."
        return (
            f"The {what} became {float(value)} in step {self.state.global_step + 1}"
            + (f", with the samples {names}" if names else "")
            + f". The weights were not changed by this step. {kept} Look at those samples, lower the learning rate, "
            "or train in bf16 or fp32."
        )

    # -- evaluation ---------------------------------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return the batch's mean loss; logits never leave the step."""
        self.cut_evaluation()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        sums = torch.stack([outputs["total"].double(), outputs["total"].new_tensor(count_targets(inputs)).double()])
        self._eval_sums = self._eval_sums + sums
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Run the base loop, weight the loss by supervised tokens instead of by batches, and score answers."""
        self._eval_sums = self._no_sums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self._eval_sums, reduction="sum").tolist()
        if count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        if self.answer_scorer is not None:
            output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in self._answer_scores().items()})
        return output

    def _answer_scores(self) -> dict[str, float]:
        assert self.answer_scorer is not None
        model, args = self.accelerator.unwrap_model(self.model), self.args
        if args.world_size == 1:
            # Of several ranks one may have fewer batches to answer, and they must stop together.
            self.answer_scorer.between = self.cut_evaluation
        with self.compute_loss_context_manager():
            scores, answered = self.answer_scorer(model, rank=args.process_index, world_size=args.world_size)
        if self.is_world_process_zero():
            show_answers(self.callback_handler.callbacks, answered, self.state.global_step)
        return scores

    def _no_sums(self) -> Tensor:
        """Loss and supervised tokens of an evaluation without batches."""
        return torch.zeros(2, dtype=torch.float64, device=self.args.device)

    # -- checkpoints --------------------------------------------------------------------------------------

    def _save(
        self,
        output_dir: str | None = None,
        state_dict: dict[str, Any] | None = None,
        formats: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_model_and_processor(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            folder,
            state_dict=state_dict,
            fingerprint=self._fingerprint,
            formats=formats,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(model if model is not None else self.model)
        folder = Path(resume_from_checkpoint)
        if not folder.is_dir():
            raise ResumeError(f"There is no checkpoint at {folder}. Name a checkpoint-N folder of this run.")
        adapted = hasattr(target, "peft_config")
        if adapted != is_adapter_dir(folder):
            raise ResumeError(
                f"{folder} holds {'full weights' if adapted else 'an adapter'}, but this run trains "
                f"{'an adapter' if adapted else 'full weights'}. Resume with the settings the run was started with."
            )
        self.load_whole(target, folder, adapted=adapted)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is None:
            raise TrainingError("There is no best checkpoint to load: no evaluation took place before a save.")
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as :meth:`SteadyTrainer.train` does."""
        self.work.restart_clock()
        # Before a checkpoint's float32 weights are loaded.
        self.keep_trained_precise()
        try:
            return super().train(*args, **kwargs)
        finally:
            # The base class tells callbacks of the end only where there was no error.
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Watchdog):
                    callback.stop()

    # -- logging ------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput and the share of time spent waiting for data to training logs."""
        if "loss" in logs and "learning_rate" in logs:
            logs |= self.work.rates()
        super().log(logs, start_time)


def create_trainer(
    *,
    model: nn.Module,
    args: Any,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    data_collator: Any = None,
    processor: Any = None,
    callbacks: list[Any] | None = None,
    **kwargs: Any,
) -> MemoryEfficientTrainer:
    """Make the trainer.

    Args:
        model: from :func:`~vlmtune.models.loading.load_model_for_training`, adapted by ``setup_lora`` or not.
        args: ``TrainingArguments``.
        train_dataset: rows for the collator.
        eval_dataset: rows to take the evaluation loss on, if any.
        data_collator: from :func:`~vlmtune.batching.collator.create_data_collator`.
        processor: saved with every checkpoint; taken from the collator when absent.
        callbacks: further ``TrainerCallback``s.
        **kwargs: further arguments of ``transformers.Trainer``.

    Raises:
        TrainingError: nothing in the model is trainable, or no processor is known.
        OptionsError: options that would not do what they say.
    """
    refuse_options(args, own_batches=kwargs.get("train_sampler") is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("Nothing in the model is trainable. Call setup_lora, or unfreeze a part first.")
    processor = processor or getattr(data_collator, "processor", None)
    if processor is None:
        raise TrainingError("create_trainer needs the processor, to save it with every checkpoint: pass processor=.")
    if isinstance(data_collator, BaseVLMDataCollator):
        data_collator.return_sample_ids = True
    # Rows are made into tensors by the collator; the base class would drop the columns the model does not know.
    args.remove_unused_columns = False
    # A NaN must stop the run, not be averaged away.
    args.logging_nan_inf_filter = False
    trainer = MemoryEfficientTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
        processing_class=processor,
        callbacks=callbacks,
        loss_chunk_tokens=getattr(args, "loss_chunk_tokens", 0),
        **kwargs,
    )
    # The base class's own callbacks print every log entry as a dict.
    handler = trainer.callback_handler
    handler.callbacks = [one for one in handler.callbacks if type(one) not in (PrinterCallback, ProgressCallback)]
    let_trackers_fail(handler.callbacks)
    if stall_seconds := getattr(args, "stall_seconds", 0):
        trainer.add_callback(Watchdog(stall_seconds))
    if not any(isinstance(one, LoggingCallback) for one in handler.callbacks):
        trainer.add_callback(LoggingCallback())
    return trainer
