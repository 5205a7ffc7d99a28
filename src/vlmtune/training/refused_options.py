"""Options of transformers.TrainingArguments that would do nothing in a run of ours, or harm: refused by name."""

from __future__ import annotations

from typing import Any

from vlmtune.config.options import raise_problems

# The option, the value that it must have, and why.
REFUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the loss is that of the answers' own tokens, computed without full logits"),
    "average_tokens_across_devices": (
        True,
        "every supervised token of a step weighs alike, whatever its device",
    ),
    "use_liger_kernel": (False, "the loss is computed on supervised tokens only and in chunks without it"),
    "auto_find_batch_size": (
        False,
        "on_oom: shrink keeps the step, and device_batch_size: auto finds the batch",
    ),
    "bf16_full_eval": (False, "it would round the weights that are saved; set torch_dtype: bfloat16"),
    "fp16_full_eval": (False, "it would round the weights that are saved; set torch_dtype"),
    "enable_jit_checkpoint": (False, "a run saves on SIGTERM by itself"),
    "push_to_hub": (False, "it would publish records of an unfinished run; use vlmtune push afterwards"),
}
# Those that the order of our own batches takes no notice of.
OF_BATCHES: dict[str, tuple[Any, str]] = {
    "dataloader_drop_last": (False, "batches hold whole images, and every sample is trained on in every epoch"),
    "train_sampling_strategy": ("random", "batches hold whole images, of texts of like length"),
}


def refuse_options(args: Any, *, own_batches: bool) -> None:
    """Refuse options that would not do what they say.

    Args:
        args: training arguments, ours or those of transformers.
        own_batches: an ``ImageGroupSampler`` makes the batches.

    Raises:
        OptionsError: all of them, with the reasons.
    """
    problems = []
    for name, (needed, reason) in (REFUSED | (OF_BATCHES if own_batches else {})).items():
        value = getattr(args, name, needed)
        if value != needed:
            shown = str(value).lower() if isinstance(value, bool) else getattr(value, "value", value)
            problems.append(f"{name} is {shown}, but {reason}. Leave it out.")
    raise_problems(problems)
