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
            "activation_checkpointing, bf16, fp16.",
        )
        return 0
    from vlmtune.config import EvaluationArguments, TrainingArguments, VLMDataArguments
    from vlmtune.config.recipe import parse_arguments
    from vlmtune.config.training_options import TrainingOptions
    from vlmtune.models.memory import Settings
    from vlmtune.models.memory_images import largest_size
    from vlmtune.models.memory_report import format_changes, format_estimate, format_fits, format_ways
    from vlmtune.models.memory_trace import Batch
    from vlmtune.training.memory_plan import run_estimator, ways_to_train

    recipe_path, flags = recipe_and_flags(argv)
    model, args, training = parse_arguments(
        [*classes, TrainingOptions],
        flags,
        recipe_path,
        ignored=[VLMDataArguments, EvaluationArguments, TrainingArguments],
    )
    estimator = run_estimator(model, training)
    cached = args.cache_image_features != "off" and not model.trained_parts & {"vision", "projector"}
    sized = estimator.family.sized and args.images_per_sample > 0
    size = (args.height_and_width or largest_size(estimator.processor, estimator.family)) if sized else None
    settings = Settings(
        Batch(
            training.per_device_train_batch_size,
            args.text_tokens,
            args.supervised_tokens,
            args.images_per_sample,
            cached and estimator.family.feature_cache,
            size,
        ),
        accumulation=training.gradient_accumulation_steps,
        checkpointing=bool(training.activation_checkpointing or training.gradient_checkpointing),
        bits=4 if model.use_4bit else 8 if model.use_8bit else 16,
        devices=args.devices,
        strategy=args.strategy,
        optim=args.optim,
        largest_images=args.image_size is None,
    )
    found = estimator.estimate(settings)
    tokens = found.image_tokens + args.text_tokens
    weights, computing = (str(dtype).removeprefix("torch.") for dtype in (estimator.number_format, estimator.autocast))
    where = f"each of {settings.devices} devices ({settings.strategy})" if settings.devices > 1 else "one device"
    print(
        f"{model.model_name_or_path}: {settings.batch.samples} samples of {tokens} tokens on "
        f"{where}, weights in {weights}"
        f"{f', computed in {computing}' if estimator.autocast else ''}"
    )
    if size is not None:
        largest = "" if args.image_size else ", of which its processor makes the most tokens (--image_size for yours)"
        print(f"images of {size[1]} x {size[0]} pixels, {found.image_tokens} tokens a sample{largest}")
    elif args.image_size is not None:
        print(f"image_size changes nothing: {estimator.family.name} takes every image at one size")
    print()
    print(format_estimate(estimator, settings))
    print()
    if args.gpu_gb is not None:
        print(format_changes(estimator, settings, args.gpu_gb))
        return 0
    print(format_fits(estimator, settings))
    print()
    print(format_ways(ways_to_train(model, training, estimator), settings))
    return 0
