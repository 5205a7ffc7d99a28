"""One training run from arguments to a saved model: what ``vlmtune train`` and the scripts do."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.config import EvaluationArguments, ModelWithLoRAArguments, TrainingArguments, VLMDataArguments
from vlmtune.config.secrets import redact
from vlmtune.data.loading import load_train_and_eval
from vlmtune.errors import ConfigError
from vlmtune.evaluation.card import leave_card
from vlmtune.evaluation.defaults import default_metrics
from vlmtune.models.families import get_family
from vlmtune.models.family import Family
from vlmtune.models.loading import load_config, load_model_for_training, load_processor, require_dtype
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.models.provenance import base_fingerprint, base_model
from vlmtune.models.quantization import get_torch_dtype, quantization_of
from vlmtune.models.serving import SERVERS, training_limits
from vlmtune.models.sizing import count_parameters, format_parameter_table
from vlmtune.training.answer_scores import AnswerScorer, choose_best_by
from vlmtune.training.callbacks import LogFile, TowerAside, write_log
from vlmtune.training.checkpoints import step_of, writing_files
from vlmtune.training.data_record import record_left_out
from vlmtune.training.device_batch import DeviceBatch
from vlmtune.training.environment import setup_training_environment
from vlmtune.training.image_reuse import Progress
from vlmtune.training.lock import only_run
from vlmtune.training.output_dir import FINISHED, Start, find_start
from vlmtune.training.parameter_groups import as_text, record, require_trained
from vlmtune.training.probe import require_trainable
from vlmtune.training.ranks import fill_between_ranks
from vlmtune.training.refused_options import refuse_options
from vlmtune.training.resume import data_differences, interruptions, note_versions, recipe_differences, require_same
from vlmtune.training.run_data import Load, RunData, load_run_data
from vlmtune.training.run_info import plain, save_training_info
from vlmtune.training.run_state import RunState
from vlmtune.training.sharding import check_strategy
from vlmtune.training.stream_sampler import StreamSampler
from vlmtune.training.trainer import MemoryEfficientTrainer, create_trainer

logger = logging.getLogger("vlmtune.training")


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        output_dir: holds the adapter or full model, processor, ``run.json`` and ``log.jsonl``.
        metrics: training and evaluation figures, by the names the log uses.
        steps: optimizer steps done.
        seconds: of training alone, without loading.
        left_out: (sample id, reason) of every sample that was not trained on, nor evaluated; with streaming those that
            this process met since it began.
    """

    output_dir: Path
    metrics: dict[str, float]
    steps: int
    seconds: float
    left_out: list[tuple[str, str]] = field(default_factory=list)


def run_training(
    model_args: ModelWithLoRAArguments,
    data_args: VLMDataArguments,
    training_args: TrainingArguments,
    evaluation_args: EvaluationArguments | None = None,
    *,
    progress: Progress | None = None,
    load: Load = load_train_and_eval,
) -> RunResult:
    """Check the data, load the model, train and save.

    Args:
        model_args: the model, its precision and adapters.
        data_args: the data, and how images are reused.
        training_args: the training.
        evaluation_args: how answers are generated and scored, where ``eval_answers`` asks for them.
        progress: shows how far the image features are.
        load: how the data are loaded.

    Everything that can be found wrong without weights is found before they load: the output directory, the
    options, every row and image, every text's length.

    Raises:
        VlmtuneError: whatever cannot go on, named; nothing is overwritten.
    """
    output_dir = Path(str(training_args.output_dir))
    with only_run(output_dir) if training_args.should_save else nullcontext():
        return _run(model_args, data_args, training_args, evaluation_args, output_dir, progress, load)


def _run(
    model_args: ModelWithLoRAArguments,
    data_args: VLMDataArguments,
    training_args: TrainingArguments,
    evaluation_args: EvaluationArguments | None,
    output_dir: Path,
    progress: Progress | None,
    load: Load,
) -> RunResult:
    check_strategy(training_args, model_args)
    refuse_options(training_args, own_batches=True)
    arguments = {"model": model_args, "data": data_args, "training": training_args}
    # As they were given: what follows adapts some of them.
    given = {name: plain(value) for name, value in arguments.items()}
    samples_per_step = training_args.train_batch_size * training_args.gradient_accumulation_steps
    samples_per_step *= training_args.world_size
    start = _find_start(output_dir, training_args)
    changes: list[str] = []
    if start.before is not None:
        changes = recipe_differences(start.before, arguments, samples_per_step)
        require_same(changes, output_dir, force=training_args.force_resume)
        note_versions(start.before)
    setup_training_environment(training_args.seed)

    family, processor = _family_and_processor(model_args, training_args)
    data = load_run_data(data_args, training_args, family, processor, model_args.attn_implementation, load)
    scorer = _answer_scorer(data, processor, training_args, evaluation_args)
    choose_best_by(training_args, list(scorer.metrics) if scorer else [])

    model = _trainable_model(model_args, training_args)
    model_record, data_record = _describe_model(model, family, model_args, training_args), data.record()
    if start.before is not None:
        found = data_differences(start.before, data_record, model_record)
        require_same(found, output_dir, force=training_args.force_resume)
        changes += found
    table, parts = format_parameter_table(model_record["parameters"]), as_text(model_record["parts"])
    logger.info("trainable parameters:\n%s\n%s", table, parts)
    trainer = _trainer(model, data, processor, scorer, training_args)
    require_trainable(trainer.model, processor, family)
    _use_cached_features(trainer, data, progress)
    if training_args.device_batch_size == "auto":
        assert data.train_scan is not None, "check_streaming refuses it"
        DeviceBatch(trainer, lambda: data.group_sampler(training_args), data.train_scan, model_args).choose()

    if start.checkpoint is not None and isinstance(trainer.train_sampler, StreamSampler):
        trainer.train_sampler.require_as_many(RunState.load(start.checkpoint).streamed)

    left_out = data.left_out()
    # Written last, so that a run that cannot begin leaves an empty directory and can be started again.
    if training_args.should_save:
        # That of a stream is continued while it is read.
        if data.stream is None or start.checkpoint is None:
            record_left_out(output_dir, left_out)
        step = step_of(start.checkpoint) if start.checkpoint else 0
        save_training_info(
            output_dir,
            arguments=given,
            data=data_record,
            model=model_record,
            samples_per_step=samples_per_step,
            resumed=interruptions(start.before, step, changes),
            status="training",
        )
    return _train_and_save(trainer, output_dir, start.checkpoint, left_out)


def _find_start(output_dir: Path, args: TrainingArguments) -> Start:
    """Find where the run begins, once for all processes: the first one's files would look to others like a run's."""
    found: list[Any] = [None]
    if args.should_save:
        found[0] = find_start(output_dir, resume=args.resume_from_checkpoint or args.resume)
        if found[0].checkpoint is not None:
            logger.info("going on from %s", found[0].checkpoint)
    if args.world_size > 1:
        broadcast_object_list(found)
    start: Start = found[0]
    return start


def _family_and_processor(model_args: ModelWithLoRAArguments, args: TrainingArguments) -> tuple[Family, Any]:
    """Find what model it is and load its processor; refuse what cannot be trained before weights load."""
    origin = _origin(model_args)
    config = load_config(model_args.model_name_or_path, **origin)
    family = get_family(config, model_args.model_type)
    require_dtype(family, get_torch_dtype(model_args.torch_dtype))
    if args.fp16:
        require_dtype(family, torch.float16)
    require_trained(model_args, args)
    processor = load_processor(model_args.model_name_or_path, **origin, image_max_pixels=model_args.image_max_pixels)
    return family, processor


def _origin(model_args: ModelWithLoRAArguments) -> dict[str, Any]:
    return {"revision": model_args.model_revision, "trust_remote_code": model_args.trust_remote_code}


def _trainable_model(model_args: ModelWithLoRAArguments, args: TrainingArguments) -> Any:
    """Load the weights and choose what of them is trained."""
    model = load_model_for_training(
        model_args.model_name_or_path,
        quantization_config=quantization_of(model_args, model_args.torch_dtype, sharded=bool(args.fsdp)),
        torch_dtype=model_args.torch_dtype,
        attn_implementation=model_args.attn_implementation,
        **_origin(model_args),
    )
    if not model_args.use_lora:
        return prepare_full_finetuning(model, parts=model_args.train_parts)
    model = setup_lora(model, **vars(model_args))
    if unserved := training_limits(vars(model_args)):
        logger.warning(
            "%s do not apply %s of an adapter: merge it by vlmtune merge before it is served there",
            SERVERS,
            " and ".join(unserved),
        )
    return model


def _describe_model(
    model: Any, family: Family, model_args: ModelWithLoRAArguments, args: TrainingArguments
) -> dict[str, Any]:
    """Return the entry of the model in ``run.json``."""
    return {
        "name": model_args.model_name_or_path,
        "family": family.name,
        "parameters": count_parameters(model),
        "parts": record(model, args),
        "fingerprint": base_fingerprint(model),
    }


def _answer_scorer(
    data: RunData, processor: Any, args: TrainingArguments, evaluation_args: EvaluationArguments | None
) -> AnswerScorer | None:
    if not args.eval_answers:
        return None
    if data.evaluation is None:
        raise ConfigError(
            "eval_answers is set, but there is no evaluation data. Set eval_split, eval_dataset_path or "
            "validation_fraction."
        )
    options = evaluation_args or EvaluationArguments()
    return AnswerScorer(
        data.eval_rows,
        processor,
        options.metrics or default_metrics(data.evaluation.metrics, data.eval_rows),
        options,
        count=args.eval_answers,
        seed=data.options.split_seed,
        max_seconds=args.max_eval_seconds,
        max_pixels=data.options.max_pixels,
        image_timeout=data.options.image_timeout,
    )


def _trainer(
    model: Any, data: RunData, processor: Any, scorer: AnswerScorer | None, args: TrainingArguments
) -> MemoryEfficientTrainer:
    patience = args.early_stopping_patience
    return create_trainer(
        model=model,
        args=args,
        train_dataset=data.train_rows,
        eval_dataset=data.eval_rows,
        data_collator=data.collator,
        processor=processor,
        train_sampler=data.train_sampler(args),
        eval_sampler=data.eval_sampler(args),
        answer_scorer=scorer,
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
    )


def _use_cached_features(trainer: MemoryEfficientTrainer, data: RunData, progress: Progress | None) -> None:
    """Let rows that share images take their features from the cache, and what computed them leave the device."""
    if not isinstance(data.collator, SharedImageCollator):
        return
    if data.stream is not None:
        logger.info("image features are computed in every step: streaming does not keep them")
        return
    sets = [rows for rows in (data.train_rows, data.eval_rows) if rows is not None]
    cache = fill_between_ranks(trainer, data.collator, data.options, sets, progress)
    data.collator.cache = cache
    if cache is None:
        return
    logger.info("image features come from %s", cache.folder)
    for sampler in (trainer.train_sampler, trainer.eval_sampler):
        if sampler is not None:
            sampler.vision_passes = False
    if trainer.args.world_size == 1 and trainer.answer_scorer is None:
        base = base_model(trainer.model)
        trainer.add_callback(TowerAside([base.get_submodule(trainer.family.parts[p]) for p in ("vision", "projector")]))


def _train_and_save(
    trainer: MemoryEfficientTrainer, output_dir: Path, checkpoint: Path | None, left_out: list[tuple[str, str]]
) -> RunResult:
    writes = trainer.args.should_save
    if writes:
        trainer.add_callback(LogFile(output_dir))
    try:
        with trainer.stop_signals:
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = trainer.run_state.seconds()
        metrics = dict(output.metrics)
        if trainer.eval_dataset is not None and "eval_loss" not in metrics:
            metrics |= _last_evaluation(trainer) or trainer.evaluate()
        # On every rank: where weights are sharded, all of them give their part.
        with writing_files(output_dir, writes=writes, wait=trainer.accelerator.wait_for_everyone) as folder:
            trainer.save_model(str(folder))
        if writes:
            write_log(output_dir, trainer.state.log_history)
            save_training_info(output_dir, metrics=metrics | {"training_seconds": round(seconds, 2)}, status=FINISHED)
    except BaseException as error:
        # Trackers keep their last figures back until they are told of the end.
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        if writes:
            _record_stop(trainer, output_dir, error)
        raise
    if writes:
        leave_card(output_dir)
        logger.info("saved to %s after %d steps in %.0f s", output_dir, trainer.state.global_step, seconds)
    if isinstance(trainer.train_sampler, StreamSampler):
        left_out = [*left_out, *trainer.train_sampler.left_out]
    return RunResult(output_dir, metrics, trainer.state.global_step, seconds, left_out)


def _last_evaluation(trainer: MemoryEfficientTrainer) -> dict[str, float]:
    """Return the figures of an evaluation of the weights as they are, where the last step brought one."""
    if trainer.args.load_best_model_at_end:
        return {}
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not evaluations or evaluations[-1]["step"] != trainer.state.global_step:
        return {}
    return {name: value for name, value in evaluations[-1].items() if name.startswith("eval_")}


def _record_stop(trainer: MemoryEfficientTrainer, output_dir: Path, error: BaseException) -> None:
    status = f"stopped by {type(error).__name__}: {error}".rstrip(": ")
    try:
        write_log(output_dir, trainer.state.log_history)
        save_training_info(output_dir, status=redact(status))
    except OSError as other:
        # A full disk; the error itself is what must be seen.
        logger.warning("the records in %s could not be written (%s)", output_dir, other)
