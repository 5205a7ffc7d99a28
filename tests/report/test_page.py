"""The page holds what the records say, and text stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmtune.errors import EvaluationError, MissingDependencyError, OutputError
from vlmtune.evaluation.answering import Prediction
from vlmtune.files import UNFINISHED
from vlmtune.report.data import read_records
from vlmtune.report.page import render, write_report

from .conftest import EVIL, make_predictions, write_evaluation, write_run


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that every tag is closed."""

    VOID = frozenset({"meta", "img", "input", "br", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def page_of(*folders: Path, **options) -> str:
    return render(read_records(folders), title="A page", **options)


def text_of(html: str) -> str:
    body = re.sub(r"<(style|script).*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def boxes_in(html: str) -> list[dict[str, str | None]]:
    return Tags("".join(re.findall(r'<g class="box.*?</g>', html, re.DOTALL))).all("rect")


class TestContent:
    """What is on it."""

    def test_scores_and_difference(self, demo_page: str) -> None:
        said = text_of(demo_page)
        assert "exact_match rises from 25.0 % (base) to 75.0 % (tuned): +50.0" in said
        assert "25 became better , 5 became worse , 10 score the same" in said.replace(" ,", " ,")

    def test_checks(self, demo_page: str) -> None:
        said = text_of(demo_page)
        assert "With the wrong images the answers are worse: the model looks at its images (exact_match)." in said
        assert "With blank images the answers are not told apart" in said
        assert "97.5 % of the answers ended" in said and "it is scored already" in said

    def test_types_and_confusion(self, demo_page: str) -> None:
        html = demo_page
        said = text_of(html)
        assert "By answer type" in said and "warm 10" in said and "cold 30" in said
        assert "What it says instead" in said and len(Tags(html).all("caption")) == 2

    def test_types_fall_back_to_the_reference(self, demo: Path, pictures: Path) -> None:
        for name in ("base", "tuned"):
            write_evaluation(demo / name, make_predictions(pictures, {1, 2}, meta={}))
        assert "By reference" in text_of(page_of(demo))

    def test_long_answers_have_no_confusion(self, tmp_path: Path, pictures: Path) -> None:
        rows = [
            Prediction(f"{i}", "Describe.", (), f"a long caption {i}", (f"another long caption {i}",), True, 5, 0.1)
            for i in range(20)
        ]
        write_evaluation(tmp_path / "captions", rows)
        said = text_of(page_of(tmp_path / "captions"))
        assert "What it says instead" not in said and "By reference" not in said

    def test_gallery(self, demo_page: str) -> None:
        tags = Tags(demo_page)
        cards = [one for one in tags.all("li") if one.get("class") == "card"]
        groups = [set(card["data-groups"].split()) for card in cards]
        assert sum("improved" in group for group in groups) == 25
        assert sum("worsened" in group for group in groups) == 5
        assert sum("random" in group for group in groups) == 40 == len(cards)
        assert {one["value"] for one in tags.all("input") if one["type"] == "radio"} > {"improved", "wrong", ""}

    def test_curves_and_record(self, demo_page: str) -> None:
        html = demo_page
        said = text_of(html)
        for title in ("Loss", "Learning rate", "Gradient norm", "Scores during training"):
            assert f"Chart of {title} over the steps" in html
        assert "Chart of Peak memory so far, GiB over the steps: memory goes from 1.5 to 1.5." in html
        # A metric of its own scale has a chart of its own, and how many answers were scored is no score.
        assert "Chart of cider during training over the steps: cider goes from 0.9 to 0.9." in html
        assert "Scores during training over the steps: exact_match goes from 0.5 to 0.5." in html
        assert "LoRA, rank 8" in said and "1,234" in said and "a processor, 2 cores" in said
        assert "442,368 of 3,658,560 (12.09 %)" in said
        assert "runtime" not in html

    def test_how_it_was_evaluated(self, demo_page: str) -> None:
        said = text_of(demo_page)
        assert "How it was evaluated base" in said and "the likeliest token each time" in said
        assert "some data, split test" in said and "4.0 s, 100.0 ms an answer" in said

    def test_every_picture_and_chart_has_words(self, demo_page: str) -> None:
        tags = Tags(demo_page)
        assert all(image["alt"].startswith("Image ") for image in tags.all("img"))
        assert all(chart["role"] == "img" and chart["aria-label"] for chart in tags.all("svg"))
        ids = [attributes["id"] for _, attributes in tags.found if attributes.get("id") and len(attributes["id"]) < 11]
        assert len(ids) == len(set(ids))

    def test_a_run_without_evaluation_and_an_evaluation_without_run(self, tmp_path: Path, pictures: Path) -> None:
        write_run(tmp_path / "run")
        assert "Pictures and answers" not in page_of(tmp_path / "run")
        write_evaluation(tmp_path / "alone", make_predictions(pictures, {1}))
        said = text_of(page_of(tmp_path / "alone"))
        assert "Pictures and answers" in said and "most improved" not in said and "What was trained" not in said

    def test_an_evaluation_is_compared_with_the_base_it_scored(self, tmp_path: Path, pictures: Path) -> None:
        write_run(tmp_path / "run")
        write_evaluation(tmp_path / "run" / "evaluation", make_predictions(pictures, set(range(30))))
        write_evaluation(tmp_path / "run" / "evaluation" / "base", make_predictions(pictures, {1}))
        assert "rises from 2.5 % (base) to 75.0 % (run)" in text_of(page_of(tmp_path / "run"))

    def test_captions_show_their_scores(self, tmp_path: Path, pictures: Path) -> None:
        rows = make_predictions(pictures, set(), answer="a red thing")
        write_evaluation(tmp_path / "e", rows, metrics={"rouge_l": {}})
        assert re.search(r'<span class="mark" title="score">0\.[1-9]\d</span>', page_of(tmp_path / "e"))

    def test_a_function_that_a_folder_names_is_not_called(
        self, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.system", lambda *a: pytest.fail("it was called"))
        table = {"os.system": {"value": 0.25}, "exact_match": {}}
        write_evaluation(tmp_path / "e", make_predictions(pictures, {1}), metrics=table)
        said = text_of(page_of(tmp_path / "e"))
        assert "os.system, a function of your own, is not computed here. Recorded: e 0.25." in said and "2.5 %" in said

    def test_images_that_are_gone(self, demo: Path, pictures: Path) -> None:
        (pictures / "3.jpg").unlink()
        assert "3.jpg is no longer there" in page_of(demo)

    def test_boxes_are_drawn(self, tmp_path: Path, pictures: Path) -> None:
        row = make_predictions(pictures, set(), 1)[0]
        box = Prediction(**vars(row) | {"references": ("[5, 5, 30, 30]",), "answer": "It is at [0, 0, 20, 20]."})
        # Two questions about one picture show their own boxes; an empty one is not drawn.
        other = Prediction(**vars(box) | {"id": "other", "answer": "[9, 2, 2, 9]"})
        write_evaluation(tmp_path / "boxes", [box, other])
        html = page_of(tmp_path / "boxes")
        drawn = [[float(one[key]) for key in ("x", "y", "width", "height")] for one in boxes_in(html)]
        assert sorted(drawn) == [[0, 0, 20, 20], [5, 5, 25, 25], [5, 5, 25, 25]]
        assert html.count('class="box box-reference"') == 2 and html.count('class="box box-0"') == 1
        assert "Their numbers are read as pixels of the image." in text_of(html)
        write_evaluation(tmp_path / "none", [row])
        assert not boxes_in(page_of(tmp_path / "none"))

    def test_labelled_boxes(self, tmp_path: Path, pictures: Path) -> None:
        row = make_predictions(pictures, set(), 1)[0]
        wanted = '[{"bbox": [100, 100, 500, 500], "label": "dog"}, {"bbox": [600, 0, 900, 999], "label": "<b>cat"}]'
        one = Prediction(**vars(row) | {"references": (wanted,), "answer": "none"})
        write_evaluation(tmp_path / "boxes", [one], metrics={"map": {}})
        html = page_of(tmp_path / "boxes")
        # The picture is 40 x 60, and the boxes do not fit into it.
        assert [float(box["x"]) for box in boxes_in(html)] == [4, 24]
        assert "read as thousandths of the image" in text_of(html) and "&lt;b&gt;cat</text>" in html

    def test_answers_that_were_cut(self, tmp_path: Path, pictures: Path) -> None:
        rows = make_predictions(pictures, {1}, ended=False)
        write_evaluation(tmp_path / "e", [*rows[:1], *make_predictions(pictures, {1})[1:]])
        assert page_of(tmp_path / "e").count("[cut]") == 1

    def test_a_note_is_said_once(self, tmp_path: Path, pictures: Path) -> None:
        rows = make_predictions(pictures, {1}, answer="a **red** shape")
        for name in ("base", "tuned"):
            write_evaluation(tmp_path / "e" / name, rows, metrics={"rouge_l": {}, "bleu1": {}})
        note = "Markdown was dropped from 40 of 40 answers (base: rouge_l, bleu1; tuned: rouge_l, bleu1)"
        assert note in text_of(page_of(tmp_path / "e"))


class TestSafety:
    """Model output, captions and names are untrusted; the page loads nothing."""

    def test_text_stays_text(self, tmp_path: Path, pictures: Path) -> None:
        changes = {"answer": EVIL, "prompt": EVIL, "references": (EVIL,)}
        rows = make_predictions(pictures, set(), 30)
        rows = [
            Prediction(**vars(one) | changes | {"id": f"{EVIL}{i}", "meta": {"answer_type": f"{EVIL}{i % 2}"}})
            for i, one in enumerate(rows)
        ]
        write_evaluation(tmp_path / "e", rows)
        write_run(tmp_path / "run", run_note=EVIL)
        html = render(read_records([tmp_path / "run", tmp_path / "e"]), title=EVIL, differences=True)
        tags = Tags(html)
        assert len(tags.all("script")) == 1 and html.count("window.evil = 1</script>") == 0
        assert not [attributes for _, attributes in tags.found if any(name.startswith("on") for name in attributes)]
        assert "&lt;script&gt;window.evil" in html

    def test_policy_and_addresses(self, demo_page: str) -> None:
        html = demo_page
        tags = Tags(html)
        policy = next(one["content"] for one in tags.all("meta") if one.get("http-equiv"))
        script = re.search(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
        addresses = [one[key] for _, one in tags.found for key in ("src", "href", "xlink:href") if one.get(key)]
        assert addresses and all(address.startswith(("data:image/", "#")) for address in addresses)
        assert "http://" not in html and "https://" not in html and "@import" not in html

    def test_colors_come_from_the_style_sheet(self, demo_page: str) -> None:
        html = demo_page
        charts = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
        assert not re.findall(r"#[0-9a-f]{6}\b", charts) and "var(--series-1)" in charts

    def test_two_hundred_pictures_stay_below_five_megabytes(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for number in range(200):
            pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((800, 600), Image.Resampling.BICUBIC)
            picture.save(tmp_path / f"{number}.jpg", quality=95)
        # A quarter each is improved, got worse, stays wrong in other words, and stays right in other words.
        for name, right in (("base", (1, 3)), ("tuned", (0, 3))):
            rows = [
                Prediction(
                    id=str(i),
                    prompt="Describe.",
                    images=(str(tmp_path / f"{i}.jpg"),),
                    answer=f"{'The' if name == 'base' else 'a'} caption {i if i % 4 in right else name}",
                    references=(f"a caption {i}",),
                    ended=True,
                    tokens=9,
                    seconds=0.1,
                )
                for i in range(200)
            ]
            write_evaluation(tmp_path / "e" / name, rows)
        page = write_report(read_records([tmp_path / "e"]), tmp_path / "page.html", title="Many")
        tags = Tags(page.read_text())
        assert len(tags.all("img")) >= 150
        assert page.stat().st_size < 5_000_000


class TestFiles:
    """What is read, and what is never overwritten."""

    def test_an_earlier_report_is_replaced_and_nothing_else(self, demo: Path, tmp_path: Path) -> None:
        page = write_report(read_records([demo]), tmp_path / "new" / "report.html", title="One")
        write_report(read_records([demo]), page, title="Two")
        assert "<title>Two</title>" in page.read_text() and not list(page.parent.glob(f"*{UNFINISHED}"))
        mine = tmp_path / "mine.html"
        mine.write_text("<p>mine")
        with pytest.raises(OutputError, match="is not a report of vlmtune and will not be overwritten"):
            write_report(read_records([demo]), mine, title="Three")
        assert mine.read_text() == "<p>mine"
        with pytest.raises(OutputError, match="is a folder"):
            write_report(read_records([demo]), tmp_path, title="Four")

    def test_the_same_records_give_the_same_page(self, demo: Path) -> None:
        one, other = (re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page_of(demo)) for _ in range(2))
        assert one == other

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(EvaluationError, match=r"holds neither a run .* nor an evaluation"):
            read_records([tmp_path])
        with pytest.raises(EvaluationError, match="nowhere holds neither"):
            read_records([tmp_path / "nowhere"])

    def test_empty_predictions(self, tmp_path: Path) -> None:
        (tmp_path / "predictions.jsonl").write_text("")
        with pytest.raises(EvaluationError, match=r"predictions.jsonl is empty"):
            read_records([tmp_path])

    def test_damaged_records_are_named(self, demo: Path) -> None:
        (demo / "tuned" / "scores.json").write_text('{"metrics": ')
        with pytest.raises(EvaluationError, match=r"scores.json cannot be read"):
            read_records([demo])
        (demo / "tuned" / "scores.json").write_text("[]")
        with pytest.raises(EvaluationError, match="is not a JSON object"):
            read_records([demo])

    def test_other_data(self, demo: Path, tmp_path: Path, pictures: Path) -> None:
        write_evaluation(tmp_path / "other", make_predictions(pictures, {1}, references=("cyan",)))
        with pytest.raises(EvaluationError, match=r"other cannot be compared: .* other references"):
            page_of(demo / "base", tmp_path / "other")

    def test_predictions_of_an_older_version_have_no_meta(self, demo: Path) -> None:
        file = demo / "tuned" / "predictions.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "meta"}) + "\n" for row in rows))
        assert "By reference" in text_of(page_of(demo))

    @pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
    def test_without_its_packages(self, package: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'vlmtune\[report\]'"):
            page_of(demo)
