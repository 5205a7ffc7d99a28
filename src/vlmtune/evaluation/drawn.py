"""Pictures drawn on the spot, with questions, to compare two ways of answering on."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw

from vlmtune.data.formats.base import DEFAULT_CAPTION_PROMPT
from vlmtune.data.sample import ImageRef, Message, Sample

COLORS = ("red", "green", "blue", "gold", "teal", "purple", "orange", "gray")
QUESTIONS = (DEFAULT_CAPTION_PROMPT, "What colors are there?", "How many shapes are in the image?")


def drawn_sample(number: int) -> Sample:
    """Return a picture with two shapes, and a question about it; another for each number."""
    picture = Image.new("RGB", (160, 120), COLORS[(number + 3) % len(COLORS)])
    draw = ImageDraw.Draw(picture)
    left = 10 + 17 * number % 60
    draw.ellipse((left, 15, left + 60, 75), fill=COLORS[number % len(COLORS)])
    draw.rectangle((95, 60, 145, 110), fill=COLORS[(number + 5) % len(COLORS)])
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    message = Message.make("user", QUESTIONS[number % len(QUESTIONS)], images=1)
    return Sample(f"drawn-{number}", (ImageRef(bytes=stream.getvalue()),), (message,))
