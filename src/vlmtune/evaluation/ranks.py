"""One evaluation by several processes: what one does for all, and what all do together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")


def place() -> tuple[int, int]:
    """Return this process's number and how many there are, joining the others on the first call."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    # Without an accelerator it must be told, or every process takes itself for the only one.
    state = PartialState(cpu=not torch.accelerator.is_available())
    return int(state.process_index), int(state.num_processes)


def is_first() -> bool:
    """Whether this process writes the files: the only one, or the first of the run."""
    return place()[0] == 0


def count() -> int:
    """Return the number of processes."""
    return place()[1]


def by_first(do: Callable[[], T]) -> T:
    """Do something on the first process and return its result on all; its error is raised on all, too."""
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = do()
        except Exception as error:
            outcome[1] = error
    if count() > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def shared_out(items: Sequence[Any], do: Callable[[Sequence[Any]], list[T]]) -> list[T]:
    """Do something to all items, each process to its part of neighbours, and return all results, in order."""
    rank, ranks = place()
    if ranks == 1:
        return do(items)
    mine = items[len(items) * rank // ranks : len(items) * (rank + 1) // ranks]
    found: list[T] = gather_object(do(mine) if mine else [])
    return found
