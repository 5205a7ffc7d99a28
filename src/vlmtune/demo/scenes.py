"""Draw simple scenes and talk about them: what the demo's model is pretrained on.

A scene is one to four plain shapes on a background. Captions and questions are made from what was drawn, so
every answer is right. No picture or question of easy-VQA is used, and no question has its form: yes/no questions
here are about where things lie, what a thing is or which color it has is answered in a sentence, and what is said
to be in a picture is judged as true or false.

``python -m vlmtune.demo.scenes FOLDER --images 40000`` writes pictures and ``train.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 64
# Names and middle values; each drawing varies them a little.
COLORS = {
    "red": (225, 25, 25),
    "green": (20, 200, 40),
    "blue": (25, 40, 225),
    "yellow": (245, 235, 25),
    "orange": (250, 145, 20),
    "purple": (135, 30, 160),
    "pink": (250, 130, 190),
    "brown": (150, 60, 40),
    "gray": (130, 130, 130),
    "black": (15, 15, 15),
    "white": (252, 252, 252),
    "teal": (10, 130, 130),
    "cyan": (60, 225, 235),
}
BACKGROUNDS = {"pale": None, "dark": (35, 35, 45), "sky": (150, 200, 240), "sand": (225, 205, 160)}
NUMBERS = ("no", "one", "two", "three", "four")
Point = tuple[float, float]


def _on_circle(turn: float) -> Point:
    """The point of the unit circle at ``turn`` radians, clockwise from the top."""
    return math.sin(turn), -math.cos(turn)


def _star() -> list[Point]:
    corners = [_on_circle(math.pi * i / 5) for i in range(10)]
    return [(x, y) if i % 2 == 0 else (0.45 * x, 0.45 * y) for i, (x, y) in enumerate(corners)]


_CROSS: list[Point] = [
    (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
    (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
]  # fmt: skip
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "ring")
# How often each is drawn: plain shapes are the common ones, as in any picture book.
SHAPE_WEIGHTS = (4, 4, 4, 1, 1, 1)


@dataclass(frozen=True)
class Thing:
    """One shape: what it is, its color's name, its middle and half its width and height, in pixels."""

    shape: str
    color: str
    x: float
    y: float
    half_width: float
    half_height: float

    @property
    def size(self) -> str:
        """``small`` or ``large``, by area."""
        return "small" if self.half_width * self.half_height < 70 else "large"

    @property
    def name(self) -> str:
        """Color and shape."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things on a background, the first drawn first."""

    things: tuple[Thing, ...]
    background: str


def make_scene(rng: random.Random) -> Scene:
    """Make a scene of one to four things of different names that do not cover each other."""
    wanted = rng.choices((1, 2, 3, 4), (78, 16, 4, 2))[0]
    background = rng.choices(list(BACKGROUNDS), (75, 9, 8, 8))[0]
    things: list[Thing] = []
    for _ in range(60):
        if len(things) == wanted:
            break
        shape = rng.choices(SHAPES, SHAPE_WEIGHTS)[0]
        color = rng.choice(_visible_colors(background))
        largest = (22.0, 15.0, 12.0, 11.0)[wanted - 1]
        width = height = rng.uniform(5.0, largest)
        if shape == "rectangle":
            height = rng.uniform(5.0, largest)
        x, y = rng.uniform(width + 1, SIZE - width - 1), rng.uniform(height + 1, SIZE - height - 1)
        thing = Thing(shape, color, x, y, width, height)
        if all(_apart(thing, other) for other in things) and all(thing.name != other.name for other in things):
            things.append(thing)
    return Scene(tuple(things), background)


def _visible_colors(background: str) -> list[str]:
    hidden = {"pale": {"white"}, "dark": {"black"}, "sky": {"cyan"}, "sand": {"white"}}[background]
    return [color for color in COLORS if color not in hidden]


def _apart(one: Thing, other: Thing) -> bool:
    return (
        abs(one.x - other.x) > one.half_width + other.half_width + 1
        or abs(one.y - other.y) > one.half_height + other.half_height + 1
    )


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene at 64 x 64 pixels, with edges smooth or stepped."""
    scale = rng.choice((1, 1, 4))
    base = BACKGROUNDS[scene.background]
    if base is None:
        base = (rng.randint(222, 255), rng.randint(222, 255), rng.randint(222, 255))
    picture = Image.new("RGB", (SIZE * scale, SIZE * scale), _varied(base, rng, 6))
    canvas = ImageDraw.Draw(picture)
    for thing in scene.things:
        color = _varied(COLORS[thing.color], rng, 16)
        box = [
            (thing.x - thing.half_width) * scale,
            (thing.y - thing.half_height) * scale,
            (thing.x + thing.half_width) * scale,
            (thing.y + thing.half_height) * scale,
        ]
        if thing.shape == "circle":
            canvas.ellipse(box, fill=color)
        elif thing.shape == "ring":
            canvas.ellipse(box, outline=color, width=max(2, round(thing.half_width * scale * 0.35)))
        elif thing.shape in ("rectangle", "square"):
            canvas.rectangle(box, fill=color)
        else:
            corners = _corners(thing.shape, rng)
            canvas.polygon(
                [
                    ((thing.x + thing.half_width * u) * scale, (thing.y + thing.half_height * v) * scale)
                    for u, v in corners
                ],
                fill=color,
            )
    return picture if scale == 1 else picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _corners(shape: str, rng: random.Random) -> list[Point]:
    if shape == "triangle":
        # Upright, turned, or with any three corners that are not nearly on one line.
        shift = rng.choice((0.0, math.pi, rng.uniform(0, 2 * math.pi)))
        if rng.random() < 0.5:
            return [_on_circle(2 * math.pi * i / 3 + shift) for i in range(3)]
        turns = (rng.uniform(0, 0.9), rng.uniform(1.9, 3.0), rng.uniform(4.0, 5.2))
        return [_on_circle(turn + shift) for turn in turns]
    if shape == "cross":
        return _CROSS
    return _star()


def _varied(color: tuple[int, int, int], rng: random.Random, most: int) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, value + rng.randint(-most, most))) for value in color)
    return red, green, blue


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _where(thing: Thing) -> str:
    rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
    row = rows[min(2, int(thing.y / SIZE * 3))]
    column = columns[min(2, int(thing.x / SIZE * 3))]
    if row == "middle":
        return "in the center" if column == "center" else f"on the {column}"
    return f"at the {row}" if column == "center" else f"at the {row} {column}"


def caption(scene: Scene) -> str:
    """Say what is in a scene, from left to right."""
    named = [_a(thing.name) for thing in sorted(scene.things, key=lambda thing: thing.x)]
    listed = named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]
    return f"{listed[0].upper()}{listed[1:]}."


def talk(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Return four questions about a scene with their answers.

    One is on shapes, one on colors, places or numbers, and two are claims to be judged.

    A question has one right answer, word for word: what is left to learn is to see.
    """
    things = scene.things
    shapes = [(rng.choice(("Describe this image.", "Describe the picture.", "What do you see?")), caption(scene))]
    others = [(rng.choice(("How many shapes are there?", "Count the shapes.")), NUMBERS[len(things)])]
    if len(things) == 1:
        thing = things[0]
        shapes.append(("Name the shape.", f"It is {_a(thing.shape)}."))
        others.append(("Name the color of the shape.", f"It is {thing.color}."))
        # Single words as answers too: a token that no text has held keeps its random vector, and adapters leave it so.
        shapes.append(("Shape, in one word:", thing.shape))
        others.append(("Color, in one word:", thing.color))
        others.append(("How big is it?", f"It is {thing.size}."))
    for thing in things:
        others.append((f"Where is the {thing.name}?", f"It is {_where(thing)}."))
        if sum(other.shape == thing.shape for other in things) == 1:
            others.append((f"Tell me the color of the {thing.shape}.", f"The {thing.shape} is {thing.color}."))
        if sum(other.color == thing.color for other in things) == 1:
            shapes.append(
                (f"Tell me the shape of the {thing.color} thing.", f"The {thing.color} thing is {_a(thing.shape)}.")
            )
    if len(things) > 1:
        one, other = rng.sample(things, 2)
        above = rng.random() < 0.5
        truth = one.y < other.y if above else one.x < other.x
        side = "above" if above else "left of"
        others.append((f"Is the {one.name} {side} the {other.name}?", "yes" if truth else "no"))
    claims = [_claim(scene, rng)]
    while len(claims) < 2:
        claims += [other for other in [_claim(scene, rng)] if other not in claims]
    return [rng.choice(shapes), rng.choice(others), *claims]


def _claim(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a sentence about what a scene holds, to be judged, and the judgement; half of them are true."""
    kind, present = rng.choice(("shape", "color", "name")), rng.random() < 0.5
    held = sorted({getattr(thing, kind) for thing in scene.things})
    if present:
        value = rng.choice(held)
    elif kind == "name":
        # Half right: neither color nor shape alone gives the answer.
        thing = rng.choice(scene.things)
        near = [f"{thing.color} {shape}" for shape in SHAPES] + [f"{color} {thing.shape}" for color in COLORS]
        value = rng.choice([name for name in near if name not in held])
    else:
        value = rng.choice([word for word in (SHAPES if kind == "shape" else COLORS) if word not in held])
    noun = f"{value} thing" if kind == "color" else value
    return f"True or false: {_a(noun)} can be seen.", "true" if present else "false"


def rows(number: int, scene: Scene, rng: random.Random) -> Iterator[dict[str, object]]:
    """Yield the lines of ``train.jsonl`` about picture ``number``: a question and its answer each.

    Questions stand alone, so that every answer must be seen in the picture and none read off an earlier turn;
    vlmtune computes the picture once for all of them.
    """
    for index, (question, answer) in enumerate(talk(scene, rng)):
        question = question if rng.random() < 0.7 else question.lower()
        messages = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
        yield {"id": f"scene-{number}#{index}", "images": [f"images/{number}.png"], "messages": messages}


def corpus(scenes: int = 3000, seed: int = 1) -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on: what is said about scenes, and everyday words."""
    rng = random.Random(seed)
    for _ in range(scenes):
        for question, answer in talk(make_scene(rng), rng):
            yield f"user\n{question}"
            yield question.lower()
            yield f"model\n{answer}"
    yield from [_EVERYDAY] * 40


_EVERYDAY = (
    "what which who where when how is are was were does do did can could has have the a an this that these those "
    "there here it image picture photo contain contains show shows shown present see seen look object objects thing "
    "color colour shape shapes size number yes no not any some in on at of to and or with without from for by as "
    "please answer question describe name tell me list count write read explain correct true false left right top "
    "bottom above below between behind front next big small large little man woman people person dog cat bird house "
    "tree car street water sky sun day night white black red green blue yellow brown gray teal rectangle circle "
    "triangle"
)


def write(folder: Path, images: int, seed: int = 0) -> None:
    """Write ``images`` pictures and the questions about them."""
    (folder / "images").mkdir(parents=True)
    rng = random.Random(seed)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number, scene in enumerate(_scenes(images, rng)):
            draw(scene, rng).save(folder / "images" / f"{number}.png")
            file.writelines(json.dumps(row) + "\n" for row in rows(number, scene, rng))


def _scenes(count: int, rng: random.Random) -> Iterable[Scene]:
    return (make_scene(rng) for _ in range(count))


def main(argv: list[str] | None = None) -> None:
    """Write pictures of scenes and questions about them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write(args.folder, args.images, args.seed)
    print(f"wrote {args.images:,} pictures and their questions to {args.folder}")


if __name__ == "__main__":
    main()
