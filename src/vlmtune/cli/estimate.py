"""``vlmtune estimate``."""

from __future__ import annotations

from vlmtune.cli.common import asks_help, print_help, recipe_and_flags


def estimate(argv: list[str]) -> int:
    """Estimate a run's memory."""
    from vlmtune.config import ModelWithLoRAArguments
    from vlmtune.config.estimate import EstimateArguments

    classes = [ModelWithLoRAArguments, EstimateArguments]
    if asks_help(argv):
        print_help(
            "usage: vlmtune estimate [RECIPE.yaml] [--option value ...]\n\n"
            "Estimates the memory that a recipe's training takes on each device, and on which GPUs it fits, from the\n"
            "model's configuration alone: no weights are read, no GPU is needed.",
            classes,
            "These options of training count too: per_device_train_batch_size, gradient_accumulation_steps,\n"
            "activation_checkpointing.",
        )
        return 0
    from vlmtune.config import EvaluationArguments, TrainingArguments, VLMDataArguments
    from vlmtune.config.recipe import parse_arguments
    from vlmtune.config.training_options import TrainingOptions
    from vlmtune.models.memory import MemoryEstimator, Settings, adapter_from, format_estimate, format_fits
    from vlmtune.models.memory_trace import Batch
    from vlmtune.training.loss import chunked_cross_entropy

    recipe_path, flags = recipe_and_flags(argv)
    model, args, training = parse_arguments(
        [*classes, TrainingOptions],
        flags,
        recipe_path,
        ignored=[VLMDataArguments, EvaluationArguments, TrainingArguments],
    )
    estimator = MemoryEstimator(
        model.model_name_or_path,
        chunked_cross_entropy,
        adapter_from(model),
        model.torch_dtype,
        options={"revision": model.model_revision, "trust_remote_code": model.trust_remote_code},
    )
    trained = set(model.lora_scopes if model.use_lora else model.train_parts)
    cached = args.cache_image_features != "off" and not trained & {"vision", "projector"}
    settings = Settings(
        Batch(
            training.per_device_train_batch_size,
            args.text_tokens,
            args.supervised_tokens,
            args.images_per_sample,
            cached and estimator.family.feature_cache,
        ),
        accumulation=training.gradient_accumulation_steps,
        checkpointing=bool(training.activation_checkpointing or training.gradient_checkpointing),
        bits=4 if model.use_4bit else 8 if model.use_8bit else 16,
        devices=args.devices,
        strategy=args.strategy,
    )
    found = estimator.estimate(settings)
    tokens = found.image_tokens + args.text_tokens
    print(
        f"{model.model_name_or_path}: {settings.batch.samples} samples of {tokens} tokens on each of "
        f"{settings.devices} devices ({settings.strategy}), weights in "
        f"{str(estimator.number_format).removeprefix('torch.')}\n"
    )
    print(format_estimate(found))
    print()
    print(format_fits(estimator, settings))
    return 0
