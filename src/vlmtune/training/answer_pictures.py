"""A few evaluation answers with their pictures, for the trackers that show pictures: TensorBoard and W&B."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from transformers.integrations import TensorBoardCallback, WandbCallback

from vlmtune.data.images import decode
from vlmtune.training.answer_scores import Answered
from vlmtune.training.trackers import without_failing

SHOWN = 4
SIDE = 320


def show_answers(callbacks: Iterable[Any], answered: Sequence[Answered], step: int) -> None:
    """Give the first answers to every tracker among the trainer's callbacks that shows pictures.

    Args:
        callbacks: the trainer's.
        answered: the evaluation's answers; the first are the same samples each time, so that they can be compared.
        step: optimizer steps done.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            without_failing(callback, partial(_to_tensorboard, callback.tb_writer, answered[:SHOWN], step))
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            without_failing(callback, partial(_to_wandb, callback._wandb, answered[:SHOWN], step))


def _to_tensorboard(writer: Any, answered: Sequence[Answered], step: int) -> None:
    for number, one in enumerate(answered):
        # TensorBoard renders Markdown: indented lines stay as they are.
        lines = _caption(one).splitlines()
        writer.add_text(f"answers/{number}", "\n".join("    " + line for line in lines), step)
        for place, picture in enumerate(_pictures(one)):
            tag = f"answers/{number}" + (f".{place}" if place else "")
            writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")


def _to_wandb(wandb: Any, answered: Sequence[Answered], step: int) -> None:
    # In a table's cell W&B keeps no picture of an offline run, and none of a list.
    pictures = [wandb.Image(picture, caption=_caption(one)) for one in answered for picture in _pictures(one)]
    table = wandb.Table(columns=list(_COLUMNS), data=[list(_texts(one)) for one in answered])
    logged = {"eval/answers": table, "train/global_step": step} | ({"eval/pictures": pictures} if pictures else {})
    wandb.log(logged)


_COLUMNS = ("id", "prompt", "answer", "references")


def _texts(one: Answered) -> tuple[str, str, str, str]:
    prompt = "\n".join(message.text for message in one.sample.prompt if message.role == "user")
    return one.sample.id, prompt, one.answer, " | ".join(one.sample.references)


def _caption(one: Answered) -> str:
    return "\n".join(f"{name}: {value}" for name, value in zip(_COLUMNS, _texts(one), strict=True))


def _pictures(one: Answered) -> list[Image.Image]:
    pictures = [decode(image) for image in one.sample.images]
    for picture in pictures:
        picture.thumbnail((SIDE, SIDE))
    return pictures
