"""VQA accuracy (Antol et al. 2015, arXiv:1505.00468), by the official code's normalisation.

The contraction table is that of github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py:
Copyright (c) 2014, Aishwarya Agrawal. All rights reserved. Redistribution and use in source and binary forms, with
or without modification, are permitted provided that redistributions of source code retain the copyright notice,
this list of conditions and the following disclaimer (BSD-2-Clause). THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT
HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES ARE DISCLAIMED.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import numpy as np

from vlmtune.evaluation.metrics.base import Metric, Scores

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(\d)(,)(\d)")
# "(?!<=" is a slip for "(?<!" in the official code; it stays, or "2." would not become "2" as there.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
# The official call passes re.UNICODE where the count belongs.
_MOST_PERIODS = int(re.UNICODE)
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
# Without an apostrophe -> with it; words whose official spelling is not made by putting one in stand below.
_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've "
    "mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
).split()


def _contractions() -> dict[str, str]:
    table = {"ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "somebody'd": "somebodyd"}
    for word in _APOSTROPHES:
        pieces = word.split("'")
        # A word with two apostrophes is known with either left out, one with a single one without it.
        if len(pieces) == 2:
            table["".join(pieces)] = word
        else:
            for gap in range(1, len(pieces)):
                table["'".join(pieces[:gap]) + "'".join(pieces[gap:])] = word
    return table


_CONTRACTIONS = _contractions()


def normalize(text: str) -> str:
    """Normalise an answer as the official code does: punctuation, numbers, articles, contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        if mark + " " in text or " " + mark in text or comma_in_number:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = _PERIOD.sub("", out, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answers: Sequence[str], references: Sequence[Sequence[str]], *, strict: bool = False) -> Scores:
    """Score each answer by how many annotators gave it: the mean over annotators of min(others who did / 3, 1).

    A sample with one reference counts as one on which all annotators agree.

    Args:
        answers: generated answers.
        references: each sample's annotators' answers; ten in VQAv2.
        strict: normalise only where annotators disagree, as the official code does. By default answers are
            always normalised, as lmms-eval does.
    """
    values = []
    for answer, given in zip(answers, references, strict=True):
        plain = answer.replace("\n", " ").replace("\t", " ").strip()
        humans = [text.replace("\n", " ").replace("\t", " ").strip() for text in given]
        if not strict or len(set(humans)) > 1:
            plain, humans = normalize(plain), [normalize(text) for text in humans]
        matches = [text == plain for text in humans]
        if len(humans) == 1:
            values.append(float(matches[0]))
            continue
        total = sum(matches)
        values.append(sum(min(1.0, (total - match) / 3) for match in matches) / len(humans) if humans else 0.0)
    return Scores(np.asarray(values, dtype=np.float64))


VQA_ACCURACY = Metric(
    name="vqa_accuracy",
    summary="agreement with the annotators of a visual question, each other annotator counting a third",
    compute=vqa_accuracy,
    paper="arXiv:1505.00468",
    code="GT-Vision-Lab/VQA vqaEval.py, answers always normalised as in lmms-eval",
)
VQA_ACCURACY_STRICT = Metric(
    name="vqa_accuracy_strict",
    summary="the same, answers normalised only where the annotators disagree, as in the official code",
    compute=partial(vqa_accuracy, strict=True),
    paper="arXiv:1505.00468",
    code="GT-Vision-Lab/VQA vqaEval.py",
)
