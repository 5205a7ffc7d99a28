"""Memory estimated from the configuration equals what PyTorch's CPU allocator hands out in a training step."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path

import pytest
import torch
from allocator import peak
from torch import nn

from vlmtune.errors import ModelError
from vlmtune.models import memory_report
from vlmtune.models.families import get_family
from vlmtune.models.loading import load_model_for_training
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.models.memory import MemoryEstimator, Settings
from vlmtune.models.memory_report import changes, format_changes, format_estimate, format_fits, format_ways
from vlmtune.models.memory_trace import Batch, CountingMode
from vlmtune.models.precision import raise_trained
from vlmtune.models.sizing import count_parameters
from vlmtune.training.loss import chunked_cross_entropy, install_supervised_loss

WITHIN = 0.15
KINDS = {
    "lora": lambda model: setup_lora(model, lora_r=8),
    "lora everywhere": lambda model: setup_lora(model, lora_r=8, lora_scopes=("language", "projector", "vision")),
    "dora": lambda model: setup_lora(model, lora_r=8, use_dora=True),
    "language in full": lambda model: prepare_full_finetuning(model, ("language",)),
    "everything in full": lambda model: prepare_full_finetuning(model, ("language", "projector", "vision")),
}


def peak_bytes(step) -> int:
    """The most bytes that PyTorch's CPU allocator handed out in a step, beside those before."""
    # What earlier tests left must not be freed within the measurement.
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    finally:
        gc.enable()
    return peak(profile)


def _measure(
    folder: Path, kind: str, batch: Batch, *, checkpointing: bool, dtype: str = "float32", mixed: bool = False
) -> tuple[int, int]:
    """Peak of a real step (forward, loss, backward, AdamW) beside the weights, and in all."""
    model = KINDS[kind](load_model_for_training(folder, torch_dtype=dtype))
    if mixed:
        raise_trained(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    install_supervised_loss(model)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    image = base.config.mm_tokens_per_image
    length, side = image + batch.text_tokens, base.config.vision_config.image_size
    rows = torch.arange(batch.samples)[:, None] * length
    sources = (rows + torch.arange(length - batch.supervised_tokens, length)).flatten()

    def step() -> None:
        ids = torch.randint(10, 300, (batch.samples, length))
        ids[:, 2 : 2 + image] = base.config.image_token_id
        mask = torch.ones(batch.samples, 1, length, length, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(
                input_ids=ids,
                token_type_ids=(ids == base.config.image_token_id).long(),
                pixel_values=torch.randn(batch.samples, 3, side, side),
                attention_mask={"full_attention": mask, "sliding_attention": mask},
                position_ids=torch.arange(length).expand(batch.samples, length),
                target_sources=sources,
                target_ids=torch.randint(10, 300, sources.shape),
            ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    states = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    beside = peak_bytes(step)
    return beside, beside + weights + states


def _compare(
    folder: Path, kind: str, batch: Batch, *, checkpointing: bool, dtype: str = "float32", mixed: bool = False
) -> tuple[float, float]:
    """Estimated over measured: beside the weights and optimizer states, and in all."""
    autocast = torch.bfloat16 if mixed else None
    estimator = MemoryEstimator(folder, chunked_cross_entropy, KINDS[kind], dtype, autocast, "cpu")
    found = estimator.estimate(Settings(batch, checkpointing=checkpointing))
    beside, everything = _measure(folder, kind, batch, checkpointing=checkpointing, dtype=dtype, mixed=mixed)
    estimated = found.total - found.kinds["weights"] - found.kinds["optimizer states"]
    print(f"{kind}, {batch}, {checkpointing=}: {estimated / 2**20:.2f} of {beside / 2**20:.2f} MiB")
    return estimated / beside, found.total / everything


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def deep(tmp_path_factory, processor) -> Path:
    """A model of more layers than the estimator runs."""
    from vlmtune.demo.build import Sizes, build_model, save

    sizes = Sizes(
        image_size=64, patch_size=8, tokens_per_image=16, vision_hidden=48, vision_layers=7, vision_heads=2,
        text_hidden=64, text_layers=9, text_heads=2, text_kv_heads=1, head_dim=32, text_mlp=128, sliding_window=16,
        layer_types=("sliding_attention",) * 5 + ("full_attention",) + ("sliding_attention",) * 3, vocab_size=2048,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("deep")
    save(build_model(processor, sizes), processor, folder)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "language in full"])
def test_tiny_against_the_allocator(kind, checkpointing, tiny_gemma3_dir) -> None:
    beside, everything = _compare(tiny_gemma3_dir, kind, Batch(4, 60, 20), checkpointing=checkpointing)
    assert abs(beside - 1) < WITHIN and abs(everything - 1) < WITHIN


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora everywhere", "everything in full"])
@pytest.mark.parametrize("batch", [Batch(1, 120, 60), Batch(6, 40, 10)], ids=["1", "6"])
def test_deep_against_the_allocator(batch, kind, checkpointing, deep) -> None:
    """More layers, and more samples, than are run for the estimate."""
    beside, everything = _compare(deep, kind, batch, checkpointing=checkpointing)
    assert abs(beside - 1) < WITHIN and abs(everything - 1) < WITHIN


HALF_KINDS = ("lora", "language in full", "everything in full")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float32", "everything in full"), *(("bfloat16", kind) for kind in HALF_KINDS)],
)
def test_mixed_precision_against_the_allocator(dtype, kind, checkpointing, tiny_gemma3_dir) -> None:
    options = {"checkpointing": checkpointing, "dtype": dtype, "mixed": True}
    beside, everything = _compare(tiny_gemma3_dir, kind, Batch(4, 60, 20), **options)
    assert abs(beside - 1) < WITHIN and abs(everything - 1) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "lora everywhere", "everything in full"])
def test_81m_against_the_allocator(kind, checkpointing, tmp_path_factory, processor) -> None:
    from vlmtune.demo.build import Sizes, build_model, save

    # benchmarks/train_throughput.py's on a CPU.
    sizes = Sizes(
        image_size=448, patch_size=14, tokens_per_image=256, vision_hidden=384, vision_layers=8, vision_heads=6,
        text_hidden=512, text_layers=8, text_heads=8, text_kv_heads=4, head_dim=64, text_mlp=2048, sliding_window=512,
        vocab_size=65_536,
        layer_types=tuple("full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(8)),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("81m")
    save(build_model(processor, sizes), processor, folder)
    beside, everything = _compare(folder, kind, Batch(2, 40, 20), checkpointing=checkpointing)
    assert abs(beside - 1) < WITHIN and abs(everything - 1) < WITHIN


def _estimator(folder: Path, kind: str = "lora", dtype: str = "float32") -> MemoryEstimator:
    return MemoryEstimator(folder, chunked_cross_entropy, KINDS[kind], dtype)


class TestParameters:
    """Counted as the loaded model has them."""

    @pytest.mark.parametrize("kind", ["lora everywhere", "dora", "language in full"])
    def test_as_loaded(self, kind, deep) -> None:
        real = count_parameters(KINDS[kind](load_model_for_training(deep, torch_dtype="float32")))
        assert _estimator(deep, kind).estimate(Settings()).parts == real

    def test_weights_are_not_read(self, deep, tmp_path) -> None:
        (tmp_path / "config.json").write_bytes((deep / "config.json").read_bytes())
        assert _estimator(tmp_path).estimate(Settings()) == _estimator(deep).estimate(Settings())

    def test_the_configurations_own_number_format(self, deep, tmp_path) -> None:
        config = json.loads((deep / "config.json").read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part["dtype"] = "bfloat16"
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert _estimator(tmp_path).estimate(Settings()) == _estimator(deep).estimate(Settings())

    def test_no_model(self, tmp_path) -> None:
        with pytest.raises(ModelError, match="holds no model"):
            _estimator(tmp_path)


class TestSettings:
    """Each setting moves what it should."""

    def test_number_format(self, deep) -> None:
        wide, narrow = (_estimator(deep, "everything in full", d).estimate(Settings()).kinds for d in ("fp32", "bf16"))
        for kind in ("weights", "optimizer states"):
            assert narrow[kind] == pytest.approx(wide[kind] / 2, rel=1e-2)

    def test_quantisation(self, deep) -> None:
        estimator = _estimator(deep, dtype="bfloat16")
        sizes = {bits: estimator.estimate(Settings(bits=bits)).kinds["weights"] for bits in (16, 8, 4)}
        model = load_model_for_training(deep)
        inside = get_family(model).parts["language"]
        linear = sum(m.weight.numel() for m in model.get_submodule(inside).modules() if isinstance(m, nn.Linear))
        assert sizes[16] - sizes[4] == pytest.approx(1.48 * linear, rel=0.02)
        assert 0.9 * linear < sizes[16] - sizes[8] < linear

    def test_cached_features_leave_the_tower_out(self, deep) -> None:
        estimator = _estimator(deep)
        run, cached = (estimator.estimate(Settings(Batch(4, cached=c))) for c in (False, True))
        assert cached.total <= run.total
        assert cached.image_tokens == run.image_tokens == 16

    def test_accumulated_gradients_stay(self, deep) -> None:
        estimator = _estimator(deep, "everything in full")
        once, more = (estimator.estimate(Settings(Batch(1), accumulation=n)).total for n in (1, 4))
        assert more > once

    def test_devices(self, deep) -> None:
        estimator = _estimator(deep, "everything in full")

        def kinds(strategy: str, devices: int) -> dict[str, int]:
            return estimator.estimate(Settings(strategy=strategy, devices=devices)).kinds

        alone = kinds("ddp", 1)
        assert kinds("ddp", 8) == alone | {"communication": alone["gradients"]}
        for strategy, divided in (("zero1", 1), ("zero2", 8), ("zero3", 8), ("fsdp", 8)):
            assert kinds(strategy, 8)["gradients"] == alone["gradients"] // divided
        for strategy in ("fsdp", "zero3"):
            assert kinds(strategy, 8)["weights"] == alone["weights"] // 8
            assert kinds(strategy, 8)["optimizer states"] < kinds(strategy, 2)["optimizer states"]
            assert kinds(strategy, 8)["communication"] > 0
        assert kinds("zero2", 8)["weights"] == kinds("zero1", 8)["weights"] == alone["weights"]


class TestFit:
    """What fits, and what would make it fit."""

    def test_the_cheapest_change_comes_first(self, deep, monkeypatch) -> None:
        monkeypatch.setattr(memory_report, "GB", 10**6)
        estimator, settings = _estimator(deep), Settings(Batch(12))
        total = estimator.estimate(settings).total / 10**6
        small = estimator.estimate(Settings(Batch(6), accumulation=2)).total / 10**6
        found = changes(estimator, settings, (total + small) / 2 / 0.95)
        assert found[0].options == "per_device_train_batch_size: 6, gradient_accumulation_steps: 2"
        assert [change.slower for change in found] == sorted(change.slower for change in found)
        assert "activation_checkpointing: true" in {change.options for change in found}
        assert all(change.total <= (total + small) / 2 * 10**6 and change.slower > 1 for change in found)
        assert changes(estimator, settings, 1) == []
        # Weights that are trained are not quantised.
        assert not any("4bit" in c.options for c in changes(_estimator(deep, "everything in full"), settings, total))

    def test_what_a_change_says_holds(self, deep, monkeypatch) -> None:
        monkeypatch.setattr(memory_report, "GB", 10**6)
        estimator, settings = _estimator(deep), Settings(Batch(8))
        (change,) = [c for c in changes(estimator, settings, 20) if c.options == "activation_checkpointing: true"]
        assert change.total == estimator.estimate(Settings(Batch(8), checkpointing=True)).total

    def test_text(self, deep) -> None:
        estimator = _estimator(deep)
        text = format_fits(estimator, Settings())
        assert text.count("GB  fits") == len(memory_report.GPU_SIZES)
        table = format_estimate(estimator, Settings(checkpointing=True))
        assert "activations, vision" in table and "with checkpointing (as set)" in table
        assert "fits 24 GB as it is" in format_changes(estimator, Settings(), 24)
        assert "nor with a batch of 1, checkpointing and 4 bits" in format_changes(estimator, Settings(), 1e-4)
        ways = format_ways({"LoRA": (estimator, 16), "QLoRA": (estimator, 4)}, Settings())
        assert "8 zero3" in ways and len(ways.splitlines()) == 3


@pytest.mark.parametrize(("optim", "numbers"), [("adamw_torch", 8), ("adamw_bnb_8bit", 2), ("sgd", 0)])
def test_optimizers(optim, numbers, deep) -> None:
    found = _estimator(deep).estimate(Settings(optim=optim))
    assert found.kinds["optimizer states"] == numbers * found.parts["all"]["trainable"] > 0 or optim == "sgd"


def test_counting_sees_what_is_freed() -> None:
    with CountingMode() as mode:
        one = torch.empty(1000, device="meta")
        two = one + one
        assert mode.live == 8000
        view = two[:10]
        del one, two
        assert mode.live == 4000 and mode.peak == 8000
        del view
        assert mode.live == 0
