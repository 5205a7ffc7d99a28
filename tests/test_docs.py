"""The docs name what there is: links and anchors, places in the source, commands and their options."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from functools import cache
from pathlib import Path

import pytest
from transformers import TrainingArguments

from vlmtune.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text_of(path), flags=re.S | re.M)
    heads = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).lower() for head in re.findall(r"^#+ (.+)$", prose, re.M)]
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in heads}


@cache
def options(command: str) -> set[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([command, "--help"]) == 0
    known = set(re.findall(r"--([a-z][\w-]*)", said.getvalue()))
    # Beside those of its help, train takes transformers', and the others pass over what is training's.
    return known | {field.name for field in dataclasses.fields(TrainingArguments)} | {"help", "debug"}


@page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@page
def test_commands_have_the_options(page: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", text_of(page))
    for command, rest in re.findall(r"\bvlmtune ([a-z][a-z-]+)\b([^\n`]*)", text):
        flags = re.findall(r"(?<=\s)--([a-z][\w-]*)", rest)
        if flags:
            assert command in COMMANDS, command
            unknown = [flag for flag in flags if flag not in options(command)]
            assert not unknown, f"vlmtune {command}{rest}: {unknown}"


@page
def test_places_in_the_source_exist(page: Path) -> None:
    for place in re.findall(r"`((?:src|tests|scripts|benchmarks|recipes|docs)/[\w/.]+)`", text_of(page)):
        assert (ROOT / place).exists(), place


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), [PAGES[0]]
    while waiting:
        here = waiting.pop()
        if here not in seen and here.suffix == ".md":
            seen.add(here)
            names = re.findall(r"\]\(([^)#:\s]+)", text_of(here))
            waiting += [(here.parent / name).resolve() for name in names]
    assert set(PAGES) <= seen
