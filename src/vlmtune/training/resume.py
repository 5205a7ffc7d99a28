"""Whether a run that goes on is the run that began: the same recipe, data and model."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Mapping
from typing import Any

from vlmtune.errors import ResumeError
from vlmtune.models.provenance import versions
from vlmtune.training.run_info import plain

logger = logging.getLogger("vlmtune.training")

# Options that change where a run computes, what it writes and how it is watched, but no weight.
FREE = frozenset(
    "output_dir resume resume_from_checkpoint force_resume overwrite_output_dir on_oom on_nonfinite stall_seconds "
    "disable_tqdm report_to run_name project trackio_space_id push_to_hub logging_dir cache_dir cache_max_gb "
    "verify_images image_timeout per_device_eval_batch_size max_eval_seconds skip_memory_metrics use_cpu local_rank "
    "ddp_backend ddp_timeout debug torch_empty_cache_steps per_device_train_batch_size gradient_accumulation_steps "
    "train_batch_size eval_batch_size device_batch_size device_memory_gb strategy devices nodes rendezvous "
    "fsdp fsdp_config deepspeed accelerator_config effective_batch_size ddp_find_unused_parameters".split()
)
FREE_PREFIXES = ("dataloader_", "logging_", "log_", "hub_", "save_")


def recipe_differences(before: Mapping[str, Any], arguments: Mapping[str, Any], samples_per_step: int) -> list[str]:
    """Return the options that decide the trained weights and differ from those of the run, one sentence each.

    Args:
        before: the run's record.
        arguments: name of a group -> its argument object, as they are now.
        samples_per_step: samples of one optimizer step now, over all devices.
    """
    found = []
    then = before.get("arguments", {})
    # As the record holds them: JSON knows no tuples and no paths.
    now = json.loads(json.dumps({name: plain(value) for name, value in arguments.items()}, default=str))
    for group, options in now.items():
        for name, value in options.items():
            free = name in FREE or name.startswith(FREE_PREFIXES)
            # An option that a version does not have cannot have been set there.
            if free or name not in then.get(group, {}) or then[group][name] == value:
                continue
            found.append(f"{name} was {_shown(then[group][name])} and is {_shown(value)}")
    steps = before.get("samples_per_step", samples_per_step)
    if steps != samples_per_step:
        found.append(f"a step took {steps} samples and takes {samples_per_step}")
    return found


def data_differences(before: Mapping[str, Any], data: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """Return how the data and the model differ from those of the run, one sentence each."""
    found = []
    for name, title in (("train", "the training data"), ("evaluation", "the evaluation data")):
        then, now = (record.get(name) or {} for record in (before.get("data", {}), data))
        if then.get("fingerprint") != now.get("fingerprint"):
            before_and_after = " then, ".join(_size(one) for one in (then, now))
            found.append(f"{title} changed ({before_and_after} now)")
    then, now = before.get("model", {}).get("fingerprint"), model.get("fingerprint")
    if then is not None and now is not None and then != now:
        found.append(f"the weights of the base model {model.get('name')} changed")
    return found


def _size(record: Mapping[str, Any]) -> str:
    if "shards" in record:
        return f"{record['shards']:,} shards of {record['bytes']:,} bytes"
    return f"{record.get('samples', 0):,} samples"


def require_same(differences: list[str], output_dir: Any, *, force: bool) -> None:
    """Refuse to go on with a run that would be another one, unless that is what is wanted.

    Raises:
        ResumeError: there are differences and ``force`` is off.
    """
    if not differences:
        return
    listed = "\n".join(f"  - {difference}" for difference in differences)
    if force:
        logger.warning("the run goes on although it changed:\n%s", listed)
        return
    raise ResumeError(
        f"The run in {output_dir} was started otherwise:\n{listed}\nSet these back, choose another output_dir, or "
        "go on all the same by --force_resume."
    )


def note_versions(before: Mapping[str, Any]) -> None:
    """Log the packages whose versions changed since the run began: results may differ in the last digits."""
    then, now = before.get("versions", {}), versions()
    changed = [f"{name} {then[name]} -> {now[name]}" for name in now if name in then and then[name] != now[name]]
    if changed:
        logger.warning("the run goes on with other versions: %s", ", ".join(changed))


def interruptions(before: Mapping[str, Any] | None, step: int, changes: list[str]) -> list[dict[str, Any]]:
    """Return the record of a run's interruptions, with the one that has just ended."""
    if before is None:
        return []
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = {"time": now, "step": step, "status_before": before.get("status")}
    return [*before.get("resumed", []), entry | ({"changes": changes} if changes else {})]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
