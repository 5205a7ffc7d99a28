"""An optimizer's state in safetensors, written by all ranks between them, and read a tensor at a time.

Under FSDP and ZeRO no rank holds the whole optimizer, and none has to for a checkpoint: each tensor is gathered in its
turn, one rank keeps it, and writes what it has kept before that becomes much. The files hold what one process would
have, so that any strategy on any number of ranks goes on from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "optimizer.json"
# As transformers calls what one process writes.
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
# A rank writes a file when it has kept so many bytes.
FILE_BYTES = 1 << 28


def write_optimizer(
    folder: Path, values: Iterable[tuple[int, str, Any]], record: Mapping[str, Any], *, file_bytes: int = FILE_BYTES
) -> None:
    """Write a state into ``optimizer-RANK-N.safetensors`` and ``optimizer.json``; on all ranks together.

    Args:
        folder: to write into.
        values: the parameter's place, the value's name, and the value whole: the same in the same order on each rank.
            It is best a generator that gathers: a rank lets go of each tensor before it asks for the next.
        record: what else JSON can hold, such as ``param_groups``.
        file_bytes: the most a rank keeps before it writes a file; a larger tensor has one of its own.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    given = [0] * ranks
    numbers: dict[str, Any] = {}
    kept: dict[str, Tensor] = {}
    files = held = 0
    for place, name, value in values:
        key = f"{place}.{name}"
        if not isinstance(value, Tensor):
            numbers[key] = value
            continue
        keeper = given.index(min(given))
        given[keeper] += value.nbytes
        if keeper != rank:
            continue
        # A copy: several parameters may share one count of steps.
        kept[key] = value.detach().to("cpu", copy=True).contiguous()
        held += value.nbytes
        del value
        if held >= file_bytes:
            save_file(kept, folder / f"optimizer-{rank:05}-{files:05}.safetensors")
            kept, files, held = {}, files + 1, 0
    if kept:
        save_file(kept, folder / f"optimizer-{rank:05}-{files:05}.safetensors")
    if rank == 0:
        text = json.dumps({**record, "numbers": numbers}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def has_parts(folder: Path) -> bool:
    """Whether a checkpoint's optimizer was written by :func:`write_optimizer`."""
    return (folder / INDEX).is_file()


def read_optimizer(folder: Path) -> dict[str, Any]:
    """Return an optimizer's ``state_dict``, and what else was recorded, from a checkpoint of any strategy.

    One without an optimizer (``save_only_model``) gives an empty state. Tensors lie in files that are mapped into
    memory: only what is used is read. Whoever keeps one copies it.
    """
    if not has_parts(folder):
        if not (folder / OPTIMIZER).exists():
            return {"state": {}, "param_groups": []}
        state: dict[str, Any] = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        return state
    record: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    found: dict[str, Any] = record.pop("numbers")
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    parts: dict[int, dict[str, Any]] = {}
    for key, value in found.items():
        place, _, name = key.partition(".")
        parts.setdefault(int(place), {})[name] = value
    return {**record, "state": parts}


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a group of parameters as JSON holds them, with the parameters left out."""
    return {
        name: value.item() if isinstance(value, Tensor) else value for name, value in group.items() if name != "params"
    }


def with_kinds(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's saved settings in the kinds of the present ones: JSON knows no tuples and no tensors."""
    kinds = {name: type(value) for name, value in now.items() if isinstance(value, tuple)}
    return {name: kinds[name](value) if name in kinds else value for name, value in saved.items()}
