"""The record of a run: configuration, versions, hardware, data fingerprint and metrics, as ``run.json``."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmtune.config.secrets import HIDDEN, SECRET_NAME
from vlmtune.files import write_whole
from vlmtune.models.provenance import versions

RUN_FILE = "run.json"


def hardware() -> dict[str, Any]:
    """The processor, its cores and memory, and the GPUs, as this process sees them."""
    info: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        info["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return info


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def save_training_info(
    output_dir: str | Path,
    *,
    arguments: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    **extra: Any,
) -> Path:
    """Write or update ``run.json`` in ``output_dir``; parts given later are merged into those given before.

    Args:
        output_dir: the run's folder; made when absent.
        arguments: name -> argument dataclass or mapping; options that name secrets are masked.
        data: source, counts and fingerprint of the data.
        model: name, family and parameter counts.
        metrics: losses, scores and times.
        **extra: further JSON values.

    Returns:
        The file's path. It is replaced atomically: a reader sees the old one or the new one.
    """
    path = Path(output_dir) / RUN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record.setdefault("created", now)
    record |= {"updated": now, "versions": versions(), "hardware": hardware()}
    if arguments is not None:
        record["arguments"] = {name: plain(value) for name, value in arguments.items()}
    for name, part in (("data", data), ("model", model), ("metrics", metrics)):
        if part is not None:
            record[name] = {**record.get(name, {}), **plain(part)}
    record |= plain(extra)
    write_whole(path, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
    return path


def plain(value: Any) -> Any:
    """Return ``value`` as JSON values with secrets masked."""
    if hasattr(value, "to_sanitized_dict"):
        value = value.to_dict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {
            str(key): HIDDEN if SECRET_NAME.search(str(key)) and isinstance(item, str) and item else plain(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
