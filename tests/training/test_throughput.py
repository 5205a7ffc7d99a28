"""What a trainer counts; rates are tested with the trainer itself."""

from __future__ import annotations

import sys

import pytest
import torch

from vlmtune.training import throughput
from vlmtune.training.throughput import Work, peak_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts this process's memory on a CPU alone")
def test_the_peak_of_a_process_grows_with_what_it_holds() -> None:
    before = peak_memory()
    block = torch.ones(before // 4 + 2**26)
    assert peak_memory() >= max(before, block.nbytes)
    grown = peak_memory()
    del block
    assert peak_memory() == grown


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    assert Work().rates()["peak_memory_gib"] == 1.5


def test_where_memory_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput.torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert "peak_memory_gib" not in Work().rates()
