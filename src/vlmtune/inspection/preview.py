"""What the model will really see: the tokens of a row, which of them are learned, and the image after preprocessing.

Texts of one image are shown as they lie in a shared row: the common prefix once, then a branch each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from vlmtune.batching.encode import EncodedSample, Encoder
from vlmtune.batching.masks import why_not_shared
from vlmtune.batching.sharing import common_prefix, group_samples
from vlmtune.config import BaseModelArguments, VLMDataArguments
from vlmtune.data.images import decode
from vlmtune.data.loading import load_train_and_eval
from vlmtune.data.sample import Sample
from vlmtune.data.shards import first_shard
from vlmtune.errors import DataError, VlmtuneError, nearest
from vlmtune.inspection.html import data_address, page
from vlmtune.inspection.tower import pictures_of
from vlmtune.models.families import get_family
from vlmtune.models.loading import load_config, load_processor

# Tokens before one that its own text is told apart by: spaces and letters of several bytes span tokens.
CONTEXT = 6
STYLE = """
.row { line-height: 1.9; } .row span { border-radius: 3px; padding: .12rem 0; white-space: pre-wrap; }
.row .learned { background: #2e9d5f44; border-bottom: 2px solid var(--good); }
.row .image { background: #8a5cc844; border-bottom: 2px solid #8a5cc8; padding: .12rem .3rem; }
.row span:hover { outline: 2px solid currentColor; } .key { color: var(--soft); }
.row span + span.learned { margin-left: 1px; }
.shared, .branch { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; }
.branches { margin-left: 1.2rem; border-left: 3px solid var(--bar); padding: .1rem 0 .1rem 1.6rem; }
.branches .branch { position: relative; margin: .7rem 0; }
.branches .branch::before {
  content: ""; position: absolute; left: -1.7rem; top: 1.4rem; width: 1.7rem; border-top: 3px solid var(--bar);
}
.pictures { margin-bottom: .8rem; } .pictures figure { width: auto; max-width: 100%; }
.pictures img { height: 12rem; object-fit: contain; image-rendering: pixelated; }
section { border-top: 1px solid var(--line); margin-top: 1.5rem; padding-top: .6rem; }
"""


@dataclass(frozen=True)
class Token:
    """One token, or a run of image tokens.

    Attributes:
        text: as it reads in the row.
        kind: ``context``, ``learned`` or ``image``.
        ids: token ids.
        position: what the model takes for its place: a number, or one an axis; the first and last of a run.
    """

    text: str
    kind: str
    ids: tuple[int, ...]
    position: str


@dataclass(frozen=True)
class Branch:
    """The tokens of one sample from its ``start`` on."""

    id: str
    start: int
    tokens: list[Token]
    n_learned: int


@dataclass(frozen=True)
class Group:
    """Samples that lie in one row.

    Attributes:
        prefix: the tokens they have in common; empty for a sample by itself.
        branches: one a sample.
        pictures: the images after preprocessing, or as decoded where tensors cannot be read as pictures.
        preprocessed: whether the pictures are what the vision tower gets.
        problem: why the samples cannot be encoded; then there is nothing else.
    """

    prefix: list[Token]
    branches: list[Branch]
    pictures: list[Image.Image]
    preprocessed: bool = True
    problem: str = ""


def preview(
    data_args: VLMDataArguments, model_args: BaseModelArguments, *, rows: int = 5, ids: Sequence[str] = ()
) -> list[Group]:
    """Encode rows of the training data as training would.

    Args:
        data_args: the data, the length limit, and whether images are shared.
        model_args: whose processor encodes.
        rows: how many rows from the first on.
        ids: these rows instead.

    Raises:
        DataError: a row named is not in the training data.
        VlmtuneError: the data or the model's processor cannot be read.
    """
    train, _ = load_train_and_eval(first_shard(data_args))
    known = {str(name): index for index, name in enumerate(train.dataset["id"])} if ids else {}
    for name in ids:
        if name not in known:
            raise DataError(f"There is no row {name!r} in the training data.{nearest(name, known)}")
    chosen = [known[name] for name in ids] if ids else range(min(rows, len(train.dataset)))
    samples = [Sample.from_row(train.dataset[index]) for index in chosen]
    origin: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
    }
    family = get_family(load_config(model_args.model_name_or_path, **origin), model_args.model_type)
    encoder = Encoder(
        load_processor(model_args.model_name_or_path, **origin, image_max_pixels=model_args.image_max_pixels),
        family,
        max_length=data_args.max_length,
        on_too_long=data_args.on_too_long,
        max_pixels=data_args.max_pixels,
    )
    shared = why_not_shared(family, model_args.attn_implementation) is None and data_args.share_images != "off"
    return preview_samples(samples, encoder, share=shared)


def preview_samples(samples: Sequence[Sample], encoder: Encoder, *, share: bool) -> list[Group]:
    """Encode samples, those of one image together where ``share`` says so."""
    encoded: list[EncodedSample] = []
    sources: dict[str, Sample] = {}
    groups: list[Group] = []
    for sample in samples:
        try:
            encoded.append(encoder(sample, hashes=True))
            sources[sample.id] = sample
        except VlmtuneError as error:
            groups.append(Group([], [], [], problem=f"{sample.id}: {error}"))
    shared = group_samples(encoded) if share else [[item] for item in encoded]
    made = [_group(members, sources[members[0].id], encoder) for members in shared if members]
    return made + groups


def _group(members: Sequence[EncodedSample], source: Sample, encoder: Encoder) -> Group:
    start = common_prefix(members) if len(members) > 1 else 0
    branches = [
        Branch(item.id, start, tokens_of(item, encoder, start, len(item.input_ids)), item.n_supervised)
        for item in members
    ]
    pictures = pictures_of(members[0], encoder)
    decoded = [] if pictures else [decode(image, max_pixels=encoder.max_pixels) for image in source.images]
    return Group(tokens_of(members[0], encoder, 0, start), branches, pictures or decoded, bool(pictures))


def tokens_of(item: EncodedSample, encoder: Encoder, start: int, stop: int) -> list[Token]:
    """Return the tokens from ``start`` to ``stop``, runs of image tokens folded."""

    def kind(index: int) -> str:
        if item.input_ids[index] in encoder.image_token_ids:
            return "image"
        # The first token of a sample has nothing to be predicted from.
        return "learned" if item.supervised[index] and index else "context"

    found: list[Token] = []
    for what, run in groupby(range(start, stop), key=kind):
        indices = list(run)
        if what == "image":
            ids = tuple(item.input_ids[index] for index in indices)
            first, last = (_position(item, index) for index in (indices[0], indices[-1]))
            found.append(Token(f"[image: {len(ids)} tokens]", what, ids, f"{first} to {last}"))
        else:
            found += [
                Token(_text(item, index, encoder), what, (item.input_ids[index],), _position(item, index))
                for index in indices
            ]
    return found


def _position(item: EncodedSample, index: int) -> str:
    return f"({', '.join(str(axis[index]) for axis in item.axes)})" if item.axes else str(index)


def _text(item: EncodedSample, index: int, encoder: Encoder) -> str:
    before = item.input_ids[max(0, index - CONTEXT) : index]
    tokenizer = encoder.processor.tokenizer
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    left, whole = tokenizer.decode(before, **options), tokenizer.decode([*before, item.input_ids[index]], **options)
    own = whole[len(left) :] if whole.startswith(left) else ""
    return own or str(tokenizer.convert_ids_to_tokens(item.input_ids[index]))


def print_preview(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print the rows with the learned tokens in green."""
    console = console or Console(highlight=False, soft_wrap=True)
    colors = {"learned": "bold black on green", "image": "magenta", "context": ""}

    def line(tokens: Sequence[Token]) -> Text:
        return Text.assemble(*((token.text, colors[token.kind]) for token in tokens))

    for group in groups:
        console.rule()
        if group.problem:
            console.print(Text(group.problem, style="bold red"))
            continue
        if group.prefix:
            console.print(Text(_prefix_title(group), style="bold"))
            console.print(line(group.prefix))
        for branch in group.branches:
            console.print(Text(_branch_title(branch), style="bold"))
            console.print(line(branch.tokens))
    console.rule()
    console.print(Text.assemble(("learned", colors["learned"]), "  ", ("image tokens", colors["image"]), "  context"))


def _prefix_title(group: Group) -> str:
    count = sum(len(token.ids) for token in group.prefix)
    return f"{count:,} tokens shared by {len(group.branches)} texts"


def _branch_title(branch: Branch) -> str:
    count = sum(len(token.ids) for token in branch.tokens)
    more = f" after the shared {branch.start:,}" if branch.start else ""
    return f"{branch.id}: {count:,} tokens{more}, {branch.n_learned:,} learned"


def html_preview(groups: Sequence[Group], title: str) -> str:
    """Return the rows as one page that needs no other file; a token's id and position show on hover."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="row key"><span class="learned">learned</span> <span class="image">image tokens</span> '
        "<span>context</span>; \u21b5 is a line break. Hover over a token for its position and id.</p>",
    ]
    for group in groups:
        parts.append("<section>")
        if group.problem:
            parts.append(f'<p class="verdict no">{escape(group.problem)}</p>')
        parts.append(_pictures(group) if group.pictures else "")
        if group.prefix:
            parts.append(f'<div class="shared"><h3>{escape(_prefix_title(group))}</h3>{_line(group.prefix)}</div>')
        kind = "branch" if group.prefix else "shared"
        branches = (
            f'<div class="{kind}"><h3>{escape(_branch_title(branch))}</h3>{_line(branch.tokens)}</div>'
            for branch in group.branches
        )
        parts.append(f'<div class="branches">{"".join(branches)}</div>' if group.prefix else "".join(branches))
        parts.append("</section>")
    return page(title, "\n".join(parts), STYLE)


def _pictures(group: Group) -> str:
    what = "after" if group.preprocessed else "before"
    figures = (
        f'<figure><img src="{data_address(_fitted(image), "PNG")}" alt="">'
        f"<figcaption>{what} preprocessing, {image.width} x {image.height} pixels</figcaption></figure>"
        for image in group.pictures
    )
    return f'<div class="pictures">{"".join(figures)}</div>'


def _fitted(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((448, 448))
    return image


def _visible(text: str) -> str:
    """A token's text with its line breaks shown; of several in a row the page breaks at the last."""
    breaks = text.count("\n")
    return escape(text.replace("\n", "\u21b5", breaks - 1).replace("\n", "\u21b5\n")) if breaks else escape(text)


def _line(tokens: Sequence[Token]) -> str:
    spans = (
        f'<span class="{token.kind}" title="position {token.position}, id {token.ids[0]}">{_visible(token.text)}</span>'
        for token in tokens
    )
    return f'<div class="row">{"".join(spans)}</div>'
