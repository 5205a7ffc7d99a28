#!/usr/bin/env python3
"""Fine-tune Gemma-3 on your own captioned images, step by step: read it, copy it, change it.

    python scripts/training/train_gemma3_vlm.py \\
        --model_name_or_path google/gemma-3-4b-pt --dataset_path data/flickr8k --output_dir runs/flickr8k
    python scripts/training/train_gemma3_vlm.py recipe.yaml --learning_rate 1e-4
    python scripts/training/train_gemma3_vlm.py recipe.yaml --resume

The data may lie in any format that vlmtune reads. All options: --help. `vlmtune train recipe.yaml` does the same job,
and computes an image once for all its texts (share_images, cache_image_features), which this script leaves out.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

# The checkout's root, so that `utils` is found from any working directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# It reports kernels that it could use and need not.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from transformers import HfArgumentParser

from utils import (
    GradientAccumulationManager,
    ModelWithLoRAArguments,
    TrainingArguments,
    VLMDataArguments,
    create_data_collator,
    create_trainer,
    estimate_model_size,
    get_quantization_config,
    load_model_for_training,
    save_model_and_processor,
    save_training_info,
    setup_lora,
    setup_training_environment,
)
from vlmtune import VlmtuneError, get_family, load_processor, parse_recipe, prepare_full_finetuning
from vlmtune.batching.scan import scan
from vlmtune.data.fingerprint import fingerprint
from vlmtune.data.loading import load_train_and_eval
from vlmtune.errors import ConfigError
from vlmtune.models.loading import load_config
from vlmtune.training.output_dir import find_start
from vlmtune.training.resume import recipe_differences, require_same

logger = logging.getLogger("train_gemma3_vlm")


def read_arguments() -> tuple[ModelWithLoRAArguments, VLMDataArguments, TrainingArguments]:
    """Read the options from a YAML file, from flags, or from both; flags override the file."""
    flags = sys.argv[1:]
    if "--help" in flags or "-h" in flags:
        HfArgumentParser((ModelWithLoRAArguments, VLMDataArguments, TrainingArguments)).print_help()
        raise SystemExit(0)
    recipe_path = flags.pop(0) if flags and not flags[0].startswith("--") else None
    recipe = parse_recipe(flags, recipe_path)
    for name in ("eval_answers", "early_stopping_patience"):
        if getattr(recipe.training, name):
            raise ConfigError(f"{name} works with `vlmtune train`; this script takes the evaluation loss alone.")
    return recipe.model, recipe.data, recipe.training


def load_model(args: ModelWithLoRAArguments):
    """Load the model, quantised if asked for, and make the chosen weights trainable."""
    quantization_config = get_quantization_config(
        use_4bit=args.use_4bit,
        use_8bit=args.use_8bit,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=(
            args.torch_dtype if args.bnb_4bit_compute_dtype == "auto" else args.bnb_4bit_compute_dtype
        ),
        bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
    )
    model = load_model_for_training(
        args.model_name_or_path,
        quantization_config=quantization_config,
        torch_dtype=args.torch_dtype,
        attn_implementation=args.attn_implementation,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    if args.use_lora:
        model = setup_lora(model, **vars(args))
    else:
        model = prepare_full_finetuning(model, parts=args.train_parts)
    size = estimate_model_size(model)
    logger.info(
        "%s parameters, %s of them trained (%.2f %%), %.0f MB of weights",
        f"{size['total_parameters']:,}",
        f"{size['trainable_parameters']:,}",
        100 * size["trainable_share"],
        size["size_mb"],
    )
    return model


def main() -> None:
    """Load data and model, train, save."""
    model_args, data_args, training_args = read_arguments()
    output_dir = Path(training_args.output_dir)
    # Refuses a folder that holds something else, and finds where an unfinished run of this recipe goes on.
    arguments = {"model": model_args, "data": data_args, "training": training_args}
    start = find_start(output_dir, resume=training_args.resume_from_checkpoint or training_args.resume)
    if start.before is not None:
        samples = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
        changes = recipe_differences(start.before, arguments, samples * training_args.world_size)
        require_same(changes, output_dir, force=training_args.force_resume)
    setup_training_environment(training_args.seed)

    origin = {"revision": model_args.model_revision, "trust_remote_code": model_args.trust_remote_code}
    get_family(load_config(model_args.model_name_or_path, **origin))  # no such model, or none that takes images
    processor = load_processor(model_args.model_name_or_path, **origin)
    data_collator = create_data_collator(
        processor,
        model_type="gemma",
        max_length=data_args.max_length,
        on_too_long=data_args.on_too_long,
        max_pixels=data_args.max_pixels,
    )

    # As GenericVLMDatasetLoader.load(**vars(data_args)), and the evaluation data with it, if the options name any.
    datasets = []
    for data in load_train_and_eval(data_args):
        if data is not None:
            # Every text is encoded once before the weights load, so that no bad row stops the run later.
            found = scan(data.dataset, data_collator.encoder, max_bad_fraction=data_args.max_bad_fraction)
            logger.info("%s: %s", data.source, found.summary())
            datasets.append(data.dataset.select(found.kept))
    train_dataset, eval_dataset = datasets[0], datasets[1] if len(datasets) > 1 else None

    model = load_model(model_args)
    batch = GradientAccumulationManager(
        per_device_batch_size=training_args.per_device_train_batch_size,
        accumulation_steps=training_args.gradient_accumulation_steps,
        world_size=training_args.world_size,
    )
    logger.info("%d samples an optimizer step", batch.effective_batch_size)
    if training_args.should_save:
        save_training_info(
            output_dir,
            arguments=arguments,
            data={"training_samples": len(train_dataset), "fingerprint": fingerprint(train_dataset)},
            status="training",
        )

    trainer = create_trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
        processor=processor,
    )
    result = trainer.train(resume_from_checkpoint=start.checkpoint)
    metrics = dict(result.metrics)
    if eval_dataset is not None:
        metrics |= trainer.evaluate()

    if training_args.should_save:
        save_model_and_processor(trainer.accelerator.unwrap_model(trainer.model), processor, output_dir)
        save_training_info(output_dir, metrics=metrics, status="finished")
        logger.info("saved to %s; try it: vlmtune predict %s IMAGE", output_dir, output_dir)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    for name in ("vlmtune", "train_gemma3_vlm"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        main()
    except VlmtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
