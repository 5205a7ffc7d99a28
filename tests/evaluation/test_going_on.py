"""An evaluation goes on after a kill, and never takes answers of another origin for its own."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from evaluation.scripted import Scripted, lines, make_dataset, run

from vlmtune.config import GenerationArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import EvaluationError, OutputError
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.runner import evaluate
from vlmtune.files import UNFINISHED


class TestGoingOn:
    """A killed evaluation goes on where it was."""

    def test_a_finished_one_asks_nothing(self, tmp_path) -> None:
        first = run(Scripted(), make_dataset(), tmp_path)
        again = Scripted()
        assert run(again, make_dataset(), tmp_path).predictions == first.predictions
        assert not again.asked
        # Other metrics of answers that are there.
        evaluate(again, make_dataset(), ["token_f1", "exact_match"], tmp_path, name="tiny")
        assert not again.asked
        assert list(json.loads((tmp_path / "scores.json").read_text())["metrics"]) == ["token_f1", "exact_match"]

    def test_killed_between_blocks(self, tmp_path) -> None:
        whole = run(Scripted(), make_dataset(), tmp_path / "whole")
        killed = Scripted()
        killed.stop_after = 8
        with pytest.raises(KeyboardInterrupt):
            run(killed, make_dataset(), tmp_path / "killed")
        assert len(lines(tmp_path / "killed")) == 8
        rest, shown = Scripted(), []
        found = run(rest, make_dataset(), tmp_path / "killed", progress=lambda *numbers: shown.append(numbers))
        assert rest.asked == [str(number) for number in range(8, 20)]
        assert shown == [(16, 20), (20, 20)]
        assert found.predictions == whole.predictions
        for name in ("predictions.jsonl", "scores.json", "settings.json"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def test_cut_anywhere(self, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cut after any byte of the last lines, in the middle of a character too."""
        monkeypatch.setattr("vlmtune.evaluation.runner.interval", lambda scores: (0.0, 1.0))
        dataset = make_dataset(5)
        run(Scripted(), dataset, tmp_path / "whole")
        path = tmp_path / "whole" / "predictions.jsonl"
        whole = path.read_bytes()
        third_line, last_line = whole.split(b"\n")[3:5]
        assert b"\xd0" in third_line, "the line must hold a character of several bytes"
        first = len(whole) - len(last_line) - len(third_line) - 2
        # Every third byte hits both halves of a character of two; the ends are taken one by one.
        for cut in (*range(first, len(whole) - 3, 3), *range(len(whole) - 3, len(whole) + 1)):
            path.write_bytes(whole[:cut])
            again = Scripted()
            run(again, dataset, tmp_path / "whole")
            # A line that lacks nothing but its end is an answer all the same.
            there = whole[:cut].count(b"\n") + (whole[cut : cut + 1] == b"\n")
            assert again.asked == [str(number) for number in range(there, 5)], cut
            assert path.read_bytes() == whole

    def test_a_damaged_line_in_the_middle_is_an_error(self, tmp_path) -> None:
        run(Scripted(), make_dataset(5), tmp_path)
        path = tmp_path / "predictions.jsonl"
        rows = path.read_bytes().split(b"\n")
        rows[1] = rows[1][:20]
        path.write_bytes(b"\n".join(rows))
        with pytest.raises(EvaluationError, match="line 2, is not a prediction"):
            run(Scripted(), make_dataset(5), tmp_path)

    def test_killed_before_the_first_file_was_whole(self, tmp_path) -> None:
        (tmp_path / f"settings.json{UNFINISHED}").write_text('{"mod')
        run(Scripted(), make_dataset(3), tmp_path)
        assert len(lines(tmp_path)) == 3

    def test_real_generator(self, tiny_model, processor, image_folder, tmp_path) -> None:
        import datasets

        refs = [ImageRef(str(image_folder / f"{number}.jpg")) for number in range(3)]
        messages = (Message.make("user", "What?", images=1), Message.make("assistant", "red"))
        samples = [Sample(str(number), (ref,), messages, ("red",)) for number, ref in enumerate(refs)]
        dataset = datasets.Dataset.from_list([sample.to_row() for sample in samples])
        generator = AnswerGenerator(tiny_model, processor, GenerationArguments(max_new_tokens=2))
        first = run(generator, dataset, tmp_path)
        path = tmp_path / "predictions.jsonl"
        path.write_bytes(path.read_bytes()[:-30])
        again = run(generator, dataset, tmp_path)
        untimed = [dataclasses.replace(prediction, seconds=0) for prediction in first.predictions]
        assert [dataclasses.replace(prediction, seconds=0) for prediction in again.predictions] == untimed
        with torch.no_grad():
            tiny_model.model.vision_tower.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
        with pytest.raises(OutputError, match="another weights"):
            run(generator, dataset, tmp_path)


class TestOtherSettings:
    """Answers of another origin are never taken for this one's."""

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"name": "other"}, "model"),
            ({"dataset": make_dataset(19)}, "data"),
            ({"generator": Scripted(max_new_tokens=5)}, "generation"),
            ({"generator": Scripted(temperature=0.5)}, "generation"),
        ],
    )
    def test_refused(self, change, named, tmp_path) -> None:
        run(Scripted(), make_dataset(), tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        arguments = {"generator": Scripted(), "dataset": make_dataset(), "folder": tmp_path} | change
        with pytest.raises(OutputError, match=f"another {named}, .*nothing in it will be overwritten"):
            run(**arguments)
        assert not arguments["generator"].asked
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("change", ["value", "dtype", "name"])
    def test_other_weights(self, change, tmp_path) -> None:
        run(Scripted(), make_dataset(), tmp_path)
        other = Scripted()
        if change == "value":
            torch.nn.init.constant_(other.model.bias, 2.0)
        elif change == "dtype":
            other.model.half()
        else:
            other.model = torch.nn.Sequential(other.model)
        with pytest.raises(OutputError, match="another weights"):
            run(other, make_dataset(), tmp_path)

    def test_batch_size_and_metrics_are_free(self, tmp_path) -> None:
        run(Scripted(), make_dataset(), tmp_path)
        again = Scripted(eval_batch_size=7)
        run(again, make_dataset(), tmp_path)
        assert not again.asked

    @pytest.mark.parametrize("content", [None, "", "[1]", "{not json"])
    def test_other_files(self, content, tmp_path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        if content is not None:
            (tmp_path / "settings.json").write_text(content)
        with pytest.raises(OutputError, match="other files"):
            run(Scripted(), make_dataset(), tmp_path)
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert not (tmp_path / "predictions.jsonl").exists()
