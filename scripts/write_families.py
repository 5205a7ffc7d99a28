#!/usr/bin/env python3
"""Write docs/families.md from the family records and what the tests proved of them; `make families` does both."""

from __future__ import annotations

from pathlib import Path

from vlmtune.models.overview import as_markdown

INTRODUCTION = """# Families of models

What vlmtune knows of each family of vision-language models, and what is proved for it by
`tests/parity/families` and `tests/invariants/test_sharing.py`. The records are in
`src/vlmtune/models/families/`; `vlmtune families` prints the table. A family is chosen by the `model_type` of a
model's `config.json`, never by its name.

No family needs torchvision: images go through Pillow, and the video part of a processor is kept with the checkpoint
and not used.

A model of a family that is not listed, but that transformers loads, is taken with what can be read off its
checkpoint: LoRA and QLoRA on its language model only, no sharing, no kept features. Before the first step it must
pass the checks that every listed family passed, on the checkpoint itself: token ids as its processor makes them, only
the answer and its end learned, as many image places as features, another image changes the output, a padded batch
changes nothing, no token sees a later one, the loss is that of the model's logits, gradients where something is
trained and nowhere else. One that fails is refused with what failed.

"""

if __name__ == "__main__":
    page = Path(__file__).resolve().parents[1] / "docs" / "families.md"
    page.write_text(INTRODUCTION + as_markdown() + "\n", encoding="utf-8")
    print(f"wrote {page}")
