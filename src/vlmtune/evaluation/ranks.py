"""One evaluation by several processes: what one does for all, and what all do together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process writes the files: the only one, or the first of the run."""
    return bool(PartialState().is_main_process)


def count() -> int:
    """Return the number of processes."""
    return int(PartialState().num_processes)


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
    state = PartialState()
    if state.num_processes == 1:
        return do(items)
    ends = [len(items) * rank // state.num_processes for rank in range(state.num_processes + 1)]
    mine = items[ends[state.process_index] : ends[state.process_index + 1]]
    found: list[T] = gather_object(do(mine) if mine else [])
    return found
