"""Compute the tables of docs/scaling.md and write them between its marks; ``--print`` only shows them.

What a formula needs of a model is counted on the model itself, built without memory (the meta device) at Gemma-3's
published sizes. What was measured is read from benchmarks/results.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
SAMPLER, STREAMING = RESULTS / "sampler.json", RESULTS / "streaming.json"

# The configurations of google/gemma-3-4b-pt, -12b-pt and -27b-pt: hidden, MLP, layers, heads, key-value heads, head.
SIZES = {
    "4B": (2560, 10_240, 34, 8, 4, 256),
    "12B": (3840, 15_360, 48, 16, 8, 256),
    "27B": (5376, 21_504, 62, 32, 16, 128),
}
DEVICES = (8, 64, 512)
IMAGES = (10**5, 10**6, 10**7, 10**8, 10**9)
SOFT_TOKENS = 256
TEXTS = 5
BF16, FP32 = 2, 4
# A trained weight and two moments of Adam, in float32 as `bf16: true` keeps them.
SAVED = 3 * FP32
# A row of the sampler (its place in a group, its tokens, its soft tokens), and a group.
ROW_BYTES, GROUP_BYTES = 8 + 4 + 4, 8
# A SHA-256 in hexadecimal and an Arrow offset, for each row.
KEY_BYTES = 64 + 4


@dataclass(frozen=True)
class Counted:
    """Parameters of a model, of its layers, of those gathered twice beside a frozen tower, and of LoRA."""

    all: int
    layers: int
    twice: int
    lora: int
    hidden: int


def count(size: str) -> Counted:
    """Build the model without memory and count."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    from vlmtune.models.lora import setup_lora

    hidden, mlp, layers, heads, kv_heads, head = SIZES[size]
    text = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "vocab_size": 262_208,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
    }
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=SOFT_TOKENS)
    with torch.device("meta"):
        model: Any = Gemma3ForConditionalGeneration(config)
    everything = numel(model)
    all_layers, twice = (sum(map(numel, units(model, frozen_tower=frozen))) for frozen in (False, True))
    adapted = setup_lora(model, lora_r=16, lora_init="default")
    lora = sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name)
    return Counted(everything, all_layers, twice, lora, hidden)


def numel(module: Any) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def units(model: Any, *, frozen_tower: bool) -> list[Any]:
    """The layers that `fsdp` shares out each by itself, and gathers once more for the backward pass.

    No gradient flows through a frozen tower, but its last layer is fetched ahead with the first of the language model.
    """
    from vlmtune.models.families import get_family
    from vlmtune.models.provenance import base_model

    base, family = base_model(model), get_family(model)
    lists = {part: list(base.get_submodule(f"{family.parts[part]}.{place}")) for part, place in family.layers.items()}
    return [*lists["language"], *(lists["vision"][-1:] if frozen_tower else lists["vision"])]


def exchanged(
    trained: int, everything: int, layers: int, devices: int, *, batches: int = 1, computed: int = BF16
) -> dict[str, float]:
    """Bytes that a device sends in one optimizer step, by ring collectives over ``devices``.

    An all-gather or a reduce-scatter of M bytes sends M (N - 1) / N from each of N devices, an all-reduce twice that
    (Thakur et al. 2005, doi:10.1177/1094342005051521). ``ddp`` all-reduces the gradients once a step, in float32;
    ``fsdp`` gathers the layers twice (forward, backward) and the other weights once for each of ``batches``, and
    reduce-scatters the gradients once, all in the number format that is computed in.

    Args:
        trained: parameters that are trained.
        everything: all parameters.
        layers: those of :func:`units`.
        devices: N.
        batches: of a device in one step.
        computed: bytes of a number in the format that is computed in.
    """
    share = (devices - 1) / devices
    return {
        "ddp": 2 * share * trained * FP32,
        "fsdp": share * (batches * (everything + layers) + trained) * computed,
    }


def spoken(size: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def tables() -> dict[str, str]:
    """Return the text of each mark."""
    counted = {size: count(size) for size in SIZES}
    communication, checkpoints, caches = [], [], []
    for size, found in counted.items():
        for what, trained, layers in (
            ("LoRA", found.lora, found.twice),
            ("in full", found.all, found.layers),
        ):
            sent = [exchanged(trained, found.all, layers, devices) for devices in DEVICES]
            communication.append(
                [f"{size}, {what}", f"{trained / 1e6:,.1f} M"]
                + [spoken(one["ddp"]) for one in sent]
                + [spoken(one["fsdp"]) for one in sent]
            )
            written = trained * SAVED
            times = [f"{written / rate:,.1f}" for rate in (0.5e9, 2e9)]
            checkpoints.append([f"{size}, {what}", spoken(written), *times])
        image = SOFT_TOKENS * found.hidden * BF16
        caches.append([size, spoken(image), *(spoken(image * images) for images in IMAGES)])
    held = []
    for images in IMAGES:
        texts = TEXTS * images
        sizes = [spoken(texts * ROW_BYTES + images * GROUP_BYTES), spoken(texts * KEY_BYTES)]
        held.append([f"{images:,}", f"{texts:,}", *sizes])
    measured = [
        [f"{one['groups']:,}", f"{one['groups'] * one['texts']:,}"]
        + [f"{one[name]:.1f}" for name in ("lines_cpu_s", "start_cpu_s", "epoch_cpu_s")]
        + [f"{one['step_ms']:.0f}"]
        + [spoken(one[name] * 2**20) for name in ("held_mib", "start_peak_mib")]
        for one in json.loads(SAMPLER.read_text())["points"]
    ]
    streamed = []
    for one in json.loads(STREAMING.read_text())["points"]:
        counts = f"{one['texts']:,}", "yes" if one["streaming"] else "no", f"{one['steps']:,}"
        streamed.append([*counts, f"{one['cpu_s']:.1f}", f"{one['peak_mib']:,}"])
    of_devices = [f"{strategy}, {devices}" for strategy in ("ddp", "fsdp") for devices in DEVICES]
    return {
        "communication": table(["Gemma-3", "trained", *of_devices], communication),
        "checkpoint": table(
            ["Gemma-3", "weights and optimizer", "seconds at 0.5 GB/s", "seconds at 2 GB/s"], checkpoints
        ),
        "cache": table(["Gemma-3", "an image", *(f"{images:,} images" for images in IMAGES)], caches),
        "sampler": table(["images", "texts", "sampler", "column of image hashes"], held),
        "measured": table(
            ["images", "texts", "first lines, s", "start, s", "epoch, s", "step, ms", "held", "at start"], measured
        ),
        "streaming": table(["texts", "streaming", "steps", "CPU seconds", "peak memory, MiB"], streamed),
    }


def main() -> None:
    """Write the page, or show the tables."""
    found = tables()
    if "--print" in sys.argv:
        print("\n\n".join(found.values()))
        return
    page = PAGE.read_text(encoding="utf-8")
    for name, text in found.items():
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{text}\n\g<2>", page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
