"""A picture of answers: each test image beside its question, the base model's answer and the tuned one's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlmtune.data.images import decode
from vlmtune.data.sample import ImageRef
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.metrics.exact_match import normalize

COLUMNS, CELL, THUMBNAIL, MARGIN = 2, (560, 150), 128, 12
INK, RIGHT, WRONG, PALE = (40, 40, 40), (20, 120, 50), (180, 40, 40), (247, 247, 247)


def draw_answers(pairs: Sequence[tuple[Prediction, Prediction]], path: Path) -> None:
    """Write a PNG of (base, tuned) answers; right ones are green, wrong ones red.

    Args:
        pairs: answers to the same samples, of one image each.
        path: the file to write.
    """
    rows = -(-len(pairs) // COLUMNS)
    width, height = CELL
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, rows * height + MARGIN), "white")
    canvas = ImageDraw.Draw(sheet)
    plain, large = ImageFont.load_default(18), ImageFont.load_default(20)
    for index, (base, tuned) in enumerate(pairs):
        left, top = (index % COLUMNS) * width + MARGIN, (index // COLUMNS) * height + MARGIN
        canvas.rounded_rectangle((left, top, left + width - MARGIN, top + height - MARGIN), 8, fill=PALE)
        thumbnail = decode(ImageRef(path=tuned.images[0])).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.NEAREST)
        sheet.paste(thumbnail, (left + 5, top + 5))
        text = left + THUMBNAIL + 20
        canvas.text((text, top + 10), tuned.prompt, font=large, fill=INK)
        for line, (name, prediction) in enumerate((("base", base), ("tuned", tuned))):
            right = normalize(prediction.answer) in {normalize(reference) for reference in prediction.references}
            y = top + 48 + 28 * line
            canvas.text((text, y), f"{name}:", font=plain, fill=INK)
            canvas.text(
                (text + 64, y), prediction.answer[:34] or "(nothing)", font=plain, fill=RIGHT if right else WRONG
            )
        canvas.text((text, top + 106), f"answer: {tuned.references[0]}", font=plain, fill=INK)
    sheet.save(path)
