"""Each kind of LoRA on each family trains, comes back in a process of its own, and merges."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.config.merge import MergeArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.evaluation.merging import merge
from vlmtune.models.checkpoint import save_model_and_processor
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_inference, load_model_for_training, load_processor
from vlmtune.models.lora import setup_lora
from vlmtune.models.quantization import get_quantization_config

KINDS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"lora_init": "pissa"},
    "loftq": {"lora_init": "loftq"},
}
# The adapter of 4 bits is loaded by vlmtune, which knows what of a model to quantise; the others by PEFT alone.
OTHER_PROCESS = """
import sys, torch, transformers
from peft import PeftModel
place, folder, model_class, kinds = sys.argv[1:]
batch, found = torch.load(f"{place}/batch.pt"), {}
for kind in kinds.split():
    if kind == "loftq":
        from vlmtune.models.checkpoint import attach_adapter
        from vlmtune.models.loading import load_model_for_training
        from vlmtune.models.quantization import get_quantization_config
        config = get_quantization_config(use_4bit=True)
        base = load_model_for_training(folder, torch_dtype="float32", quantization_config=config)
        model = attach_adapter(base, f"{place}/{kind}")
    else:
        base = getattr(transformers, model_class).from_pretrained(folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, f"{place}/{kind}")
    found[kind] = model.train()(**batch).logits.detach()
torch.save(found, f"{place}/found.pt")
"""


def _base(folder, kind: str):
    config = get_quantization_config(use_4bit=kind == "loftq")
    return load_model_for_training(folder, torch_dtype="float32", quantization_config=config)


def _logits(model, batch):
    return model.train()(**batch).logits.detach()


def _train(family, folder, kind: str, batch):
    """Return the model after six steps, and the losses of these."""
    scopes = ["language"] if kind == "loftq" else [scope for scope, names in family.lora_targets.items() if names]
    torch.manual_seed(0)
    model = setup_lora(_base(folder, kind), lora_r=2, lora_scopes=scopes, lora_dropout=0, **KINDS[kind]).train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(learned, 5e-3), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(parameter.grad.any() for parameter in learned), kind
    return model, losses


# One test for all kinds: the other process takes as long to begin as all the rest.
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_kind(name, family_dir, image_folder, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    # For evaluation on the CPU it packs weights anew, which ones as small as these cannot be.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    family, folder = FAMILIES[name], family_dir(name)
    processor = load_processor(folder)
    ref = ImageRef(path=str(image_folder / "1.jpg"))
    messages = (Message.make("user", "What color is the shape?", images=1), Message.make("assistant", "red"))
    batch = BaseVLMDataCollator(processor, family)([Sample("a", (ref,), messages).to_row()])
    trained = {}
    for kind in KINDS:
        model, losses = _train(family, folder, kind, batch)
        trained[kind] = _logits(model, batch)
        assert losses[-1] < 0.95 * losses[0], kind
        assert not torch.allclose(trained[kind], _logits(_base(folder, kind), batch), atol=1e-2), kind
        save_model_and_processor(model, processor, tmp_path / kind)

    torch.save(dict(batch), tmp_path / "batch.pt")
    arguments = (str(tmp_path), str(folder), family.model_class, " ".join(KINDS))
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, *arguments], check=True, timeout=300)
    for kind, loaded in torch.load(tmp_path / "found.pt").items():
        # What PiSSA learned is saved as the difference of two adapters on other base weights.
        within = 1e-4 if kind == "pissa" else 0
        torch.testing.assert_close(loaded, trained[kind], rtol=within, atol=within, msg=f"{kind}: {{}}".format)

    for kind in KINDS:
        places = {"adapter": str(tmp_path / kind), "output_dir": str(tmp_path / f"{kind} merged")}
        onto = "dequantised" if kind == "loftq" else "original"
        merge(MergeArguments(**places, merge_onto=onto, samples=1, max_new_tokens=2))
        merged, _ = load_model_for_inference(tmp_path / f"{kind} merged", torch_dtype="float32", device="cpu")
        assert not hasattr(merged, "peft_config"), kind
        again = _logits(merged, batch)
        torch.testing.assert_close(again, trained[kind], rtol=1e-3, atol=1e-4, msg=f"{kind}: {{}}".format)
