r"""Conversations as JSON lines, in the form chat APIs use.

A row is an object with ``messages`` (``role`` and ``content``: a text, or a list of parts) and, where the
parts do not hold them, ``images`` or ``image`` (paths, counted from the file's folder or ``image_dir``)::

    {"messages": [{"role": "user", "content": "<image>What is this?"},
                  {"role": "assistant", "content": "A dog."}], "images": ["dog.jpg"]}

Image parts are ``{"type": "image"}`` (the next of ``images``), ``{"type": "image", "image": "dog.jpg"}`` or
``{"type": "image_url", "image_url": {"url": "file:///data/dog.jpg"}}`` (``data:`` addresses too). In texts,
``<image>`` marks an image's place; images without a place stand before the first user's text. Optional:
``id``, ``references`` (texts to score against), ``meta``. Rows with ``prompt`` and ``completion`` (TRL), with
``question`` and ``answer``, or with ``image`` and ``caption`` are read too. A file is JSON lines or one JSON list,
plain, ``.gz`` or ``.zst``; a folder holds ``train.jsonl``, ``test.jsonl`` and so on.
"""

from __future__ import annotations

from collections.abc import Collection

from vlmtune.data.formats.columns import shape_of
from vlmtune.data.formats.row_files import row_format


def _wants(keys: Collection[str]) -> bool:
    # An image folder's metadata and ChartQA's rows are other formats'.
    return shape_of(keys) not in (None, "conversations") and not {"file_name", "file_names", "imgname"} & set(keys)


FORMAT = row_format(
    name="messages",
    looks_like="a .jsonl file, or a folder of them, whose lines hold 'messages' and 'images'",
    wants=_wants,
)
splits = FORMAT.splits
