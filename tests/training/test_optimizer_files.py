"""An optimizer written by several ranks is one process's, and no rank ever keeps more than a part of it."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from vlmtune.training import optimizer_files
from vlmtune.training.optimizer_files import has_parts, read_optimizer, settings_of, with_kinds, write_optimizer
from vlmtune.training.sharding import shared_out_optimizer

ROWS = 1000


def stepped() -> torch.optim.AdamW:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(ROWS, 4)) for _ in range(12)]
    optimizer = torch.optim.AdamW([{"params": weights[:5], "lr": 0.1}, {"params": weights[5:], "lr": 0.2}])
    sum((w**2).sum() for w in weights).backward()
    optimizer.step()
    return optimizer


def gathering(state: dict, alive: list[int]) -> Iterator[tuple[int, str, object]]:
    """As FSDP gives them: each value made when it is asked for; notes how many are alive then."""
    made: list[weakref.ref] = []
    for place, own in state["state"].items():
        for name, value in own.items():
            alive.append(sum(one() is not None for one in made))
            found = value.clone()
            made.append(weakref.ref(found))
            yield place, name, found
            del found


@pytest.fixture
def written(tmp_path, monkeypatch) -> SimpleNamespace:
    """A state that three ranks wrote, each file of at most three tensors."""
    optimizer, alive, kept = stepped(), [], []
    state = optimizer.state_dict()
    record = {"param_groups": [{**settings_of(group), "params": group["params"]} for group in state["param_groups"]]}
    save = optimizer_files.save_file
    monkeypatch.setattr(optimizer_files, "save_file", lambda tensors, path: kept.append(path) or save(tensors, path))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        write_optimizer(tmp_path, gathering(state, alive), record, file_bytes=2 * ROWS * 4 * 4 + 1)
    return SimpleNamespace(folder=tmp_path, optimizer=optimizer, state=state, alive=alive, files=kept)


def test_it_is_read_as_one_process_has_it(written) -> None:
    assert has_parts(written.folder)
    fresh = stepped()
    saved = read_optimizer(written.folder)
    fresh.load_state_dict(shared_out_optimizer(saved, fresh))
    found, expected = fresh.state_dict(), written.state
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for place, own in expected["state"].items():
        for name, value in own.items():
            assert torch.equal(found["state"][place][name], value)


def test_what_goes_on_holds_no_file_of_the_checkpoint(written) -> None:
    """Which may be deleted, and must stay as it is."""
    before = {path: path.read_bytes() for path in written.files}
    fresh = stepped()
    fresh.load_state_dict(shared_out_optimizer(read_optimizer(written.folder), fresh))
    fresh.step()
    assert {path: path.read_bytes() for path in written.files} == before
    mapped = Path("/proc/self/maps").read_text()
    assert not [path for path in written.files if str(path) in mapped]


def test_no_rank_keeps_more_than_a_part(written) -> None:
    sizes = [[tensor.nbytes for tensor in load_file(path).values()] for path in written.files]
    assert len(sizes) >= 3 * 3
    assert max(map(sum, sizes)) <= 3 * ROWS * 4 * 4 + 100
    shares = [sum(p.stat().st_size for p in written.folder.glob(f"optimizer-0000{rank}-*")) for rank in range(3)]
    assert max(shares) < 1.2 * min(shares)
    # Of what was gathered, none but the one in hand.
    assert max(written.alive) <= 1


def test_it_is_json_and_safetensors(written) -> None:
    names = {path.suffix for path in written.folder.iterdir()}
    assert names == {".json", ".safetensors"}
    json.loads((written.folder / "optimizer.json").read_text())


def test_settings_keep_their_kinds() -> None:
    group = {"lr": torch.tensor(0.5), "betas": (0.9, 0.95), "fused": None, "params": [1]}
    saved = json.loads(json.dumps(settings_of(group)))
    assert with_kinds(saved, group) == {"lr": 0.5, "betas": (0.9, 0.95), "fused": None}


def test_a_checkpoint_without_an_optimizer_has_an_empty_state(tmp_path) -> None:
    assert read_optimizer(tmp_path)["state"] == {}


def test_that_of_one_process_is_read_too(tmp_path) -> None:
    optimizer = stepped()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert not has_parts(tmp_path)
    assert torch.equal(read_optimizer(tmp_path)["state"][3]["exp_avg"], optimizer.state_dict()["state"][3]["exp_avg"])
