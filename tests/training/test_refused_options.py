"""Options that would not do what they say are refused before anything loads, in a run and in ``create_trainer``."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments as PlainArguments

from vlmtune.config import TrainingArguments
from vlmtune.config.options import OptionsError
from vlmtune.training import run as run_module
from vlmtune.training.refused_options import OF_BATCHES, REFUSED
from vlmtune.training.run import run_training
from vlmtune.training.trainer import create_trainer

OTHER = {
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "train_sampling_strategy": "sequential",
}
OPTIONS = [*REFUSED, *OF_BATCHES]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_refuses_it(name: str, run_arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "load_config", lambda *a, **k: pytest.fail("the model is looked at"))
    with pytest.raises(OptionsError, match=rf"{name} is .*, but .*Leave it out\."):
        run_training(*run_arguments(tmp_path / "run", **{name: OTHER.get(name, True)}))
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_all_are_named_at_once(run_arguments, tmp_path: Path) -> None:
    # transformers itself refuses the two formats of evaluation together.
    names = [name for name in OPTIONS if name != "fp16_full_eval"]
    with pytest.raises(OptionsError) as caught:
        run_training(*run_arguments(tmp_path / "run", **{name: OTHER.get(name, True) for name in names}))
    assert all(f"{name} is " in str(caught.value) for name in names)


def test_columns_must_stay(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="remove_unused_columns is true"):
        TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=True)


def test_arguments_of_transformers_in_a_script(tiny_model, processor, tmp_path: Path) -> None:
    args = PlainArguments(output_dir=str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(OptionsError, match=r"label_smoothing_factor is 0\.1"):
        create_trainer(model=tiny_model, args=args, processor=processor)


def test_the_base_order_knows_them(make_trainer) -> None:
    """Without our sampler a last, smaller batch can be dropped: three batches of 3 of the ten rows."""
    trainer = make_trainer(dataloader_drop_last=True, per_device_train_batch_size=3)
    assert len(trainer.get_train_dataloader()) == 3
