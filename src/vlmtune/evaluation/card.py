"""A model card, by the records that training, merging and evaluation leave. Texts of others are shown, never obeyed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.runner import SCORES
from vlmtune.files import write_whole
from vlmtune.models.adapter_files import read_settings
from vlmtune.models.checkpoint import is_adapter_dir
from vlmtune.models.families import get_family
from vlmtune.models.loading import load_config
from vlmtune.models.merge import MERGE_FILE

logger = logging.getLogger("vlmtune.card")

CARD = "README.md"
MARK = "<!-- Written by vlmtune. Take this line out to keep your own changes. -->"
# Options of a run that a card shows, by their group.
SHOWN = {
    "model": "torch_dtype use_lora lora_r lora_alpha lora_dropout lora_scopes use_rslora use_dora use_4bit use_8bit "
    "train_parts modules_to_save",
    "data": "share_images validation_fraction max_length",
    "training": "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate "
    "lr_scheduler_type warmup_steps weight_decay bf16 seed",
}
_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit", "Gemma": "gemma"}


def write_card(folder: Path, evaluation: Path | None = None) -> bool:
    """Write a folder's card, and say whether it was: one that a person wrote or changed is kept.

    Args:
        folder: of an adapter or a model.
        evaluation: folder of its scores; ``evaluation`` in it by default.

    Raises:
        ModelError: the base model's configuration cannot be read.
    """
    file = folder / CARD
    # PEFT leaves an empty form.
    if (
        file.exists()
        and MARK not in (text := file.read_text(encoding="utf-8"))
        and "[More Information Needed]" not in text
    ):
        return False
    write_whole(file, model_card(folder, evaluation))
    return True


def leave_card(folder: Path) -> None:
    """Write the card of what has just been made: where that fails, the model stays and the log says why."""
    try:
        write_card(folder)
    except (VlmtuneError, OSError, ValueError) as error:
        logger.warning("no model card was written into %s: %s", folder, error)


def model_card(folder: Path, evaluation: Path | None = None) -> str:
    """Return the card of an adapter's or a model's folder, as Markdown with the Hub's metadata."""
    adapter = is_adapter_dir(folder)
    run, merged = _read(folder / "run.json"), _read(folder / MERGE_FILE)
    if not run and merged:
        run = _read(Path(str(merged.get("adapter"))) / "run.json")
    settings = read_settings(folder) if adapter else {}
    given = settings.get("base_model_name_or_path") or merged.get("base_model") or run.get("model", {}).get("name")
    base = str(given or "unknown")
    family = get_family(load_config(base if adapter else folder))
    licence = next((name for start, name in _LICENCES.items() if family.licence.startswith(start)), "other")
    head: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": licence,
        "tags": ["vlmtune", family.name, *(["lora"] if adapter else [])],
    }
    # A folder's place is nobody's business, and no name on the Hub.
    if not Path(base).is_dir():
        head["base_model"] = base
    lines = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---", MARK, ""]
    lines += [f"# {_plain(folder.resolve().name)}", ""]
    lines += [
        f"{'An adapter (LoRA) for' if adapter else 'Tuned from'} {_code(head.get('base_model', Path(base).name))}.",
        "",
    ]
    lines += [f"Licence of the base: {family.licence}. What is made of it is bound by it too.", ""]
    for title, body in (
        ("Data", _data(run)),
        ("Recipe", _recipe(run)),
        ("Scores", _scores(evaluation or folder / "evaluation")),
        ("Merge", _merge(merged)),
        ("Versions", _versions(run or merged)),
    ):
        lines += [f"## {title}", "", *body, ""]
    name = folder.resolve().name
    lines += [
        "## Intended use",
        "",
        "Questions about images like those it was trained on. It can be wrong: check its answers on your own images "
        "before you rely on them.",
        "",
        "## Load and serve",
        "",
        "```",
        f"vlmtune predict {_safe(name)} photo.jpg --prompt 'Describe this image.'",
        f"vlmtune serve {_safe(name)}",
        *([f"vlmtune merge {_safe(name)} {_safe(name)}-merged"] if adapter else [f"vllm serve {_safe(name)}"]),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _data(run: Mapping[str, Any]) -> list[str]:
    data, options = run.get("data", {}), run.get("arguments", {}).get("data", {})
    if not data:
        return ["No record."]
    source = Path(str(options.get("dataset_path", ""))).name
    lines = [f"- Source: {_code(source)}, format {_code(data.get('format'))}"]
    for part in ("train", "evaluation"):
        found = data.get(part)
        if found:
            named = ("samples", "shards", "left_out", "tokens", "supervised_tokens")
            counts = ", ".join(f"{int(found[key]):,} {key.replace('_', ' ')}" for key in named if key in found)
            lines.append(f"- {part.capitalize()}: {counts}; fingerprint {_code(found.get('fingerprint'))}")
    return lines


def _recipe(run: Mapping[str, Any]) -> list[str]:
    arguments = run.get("arguments", {})
    shown = {
        name: arguments[group][name]
        for group, names in SHOWN.items()
        for name in names.split()
        if arguments.get(group, {}).get(name) not in (None, False, [], "")
    }
    if not shown:
        return ["No record."]
    return ["```yaml", *yaml.safe_dump(shown, sort_keys=False).replace("```", "").strip().splitlines(), "```"]


def _scores(folder: Path) -> list[str]:
    record = _read(folder / SCORES)
    table = record.get("metrics", record)
    rows = [(name, entry) for name, entry in table.items() if isinstance(entry, Mapping) and "value" in entry]
    if not rows:
        return ["Not evaluated."]
    lines = ["| metric | value | 95 % interval | samples |", "|---|---|---|---|"]
    for name, entry in rows:
        low, high = entry.get("low"), entry.get("high")
        interval = f"{low:.4g} to {high:.4g}" if low is not None and high is not None else "-"
        lines.append(f"| {_plain(name)} | {entry['value']:.4g} | {interval} | {entry.get('n', '-')} |")
    return lines


def _merge(record: Mapping[str, Any]) -> list[str]:
    drifts = record.get("drift", {})
    if not drifts:
        return ["Not merged."]
    return [f"- Drift from {_plain(name)}: {found['drift']:.2%} of its change" for name, found in drifts.items()]


def _versions(record: Mapping[str, Any]) -> list[str]:
    return [", ".join(f"{_plain(n)} {_plain(v)}" for n, v in record.get("versions", {}).items()) or "No record."]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _plain(text: Any) -> str:
    """Text of others without the power of Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(str(text).split()))


def _code(text: Any) -> str:
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)
