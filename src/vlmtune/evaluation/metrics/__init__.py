"""Metrics as pure functions of answers and references; without torch. A new one is a file and a line here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmtune.errors import ConfigError, nearest
from vlmtune.evaluation.metrics.anls import ANLS
from vlmtune.evaluation.metrics.base import Metric, Scores
from vlmtune.evaluation.metrics.captions import BLEU, CIDER, ROUGE_L
from vlmtune.evaluation.metrics.chartqa import RELAXED_ACCURACY
from vlmtune.evaluation.metrics.detection import DETECTION
from vlmtune.evaluation.metrics.error_rates import CER, WER
from vlmtune.evaluation.metrics.exact_match import EXACT_MATCH
from vlmtune.evaluation.metrics.grounding import GROUNDING_ACCURACY, IOU
from vlmtune.evaluation.metrics.meteor import METEOR
from vlmtune.evaluation.metrics.multiple_choice import MULTIPLE_CHOICE
from vlmtune.evaluation.metrics.perplexity import PERPLEXITY
from vlmtune.evaluation.metrics.pope import POPE_ACCURACY, POPE_F1, POPE_PRECISION, POPE_RECALL, POPE_YES_RATIO
from vlmtune.evaluation.metrics.token_f1 import TOKEN_F1
from vlmtune.evaluation.metrics.vqa import VQA_ACCURACY, VQA_ACCURACY_STRICT

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        EXACT_MATCH,
        TOKEN_F1,
        VQA_ACCURACY,
        VQA_ACCURACY_STRICT,
        MULTIPLE_CHOICE,
        POPE_ACCURACY,
        POPE_PRECISION,
        POPE_RECALL,
        POPE_F1,
        POPE_YES_RATIO,
        *BLEU,
        ROUGE_L,
        CIDER,
        METEOR,
        ANLS,
        RELAXED_ACCURACY,
        CER,
        WER,
        IOU,
        GROUNDING_ACCURACY,
        *DETECTION,
        PERPLEXITY,
    )
}
# BLEU without a number is BLEU-4.
METRICS["bleu"] = METRICS["bleu4"]


@dataclass(frozen=True)
class WithArgument:
    """A metric that is named with a file or model, as ``chair_i:objects.txt``.

    Attributes:
        argument: what stands after the colon.
        summary: one line for people.
        paper: where it is defined.
        maker: module and function that make it of its name and argument; imported when it is asked for.
    """

    argument: str
    summary: str
    paper: str
    maker: tuple[str, str]


_CHAIR = ("vlmtune.evaluation.metrics.chair", "make_chair")
WITH_ARGUMENT = {
    "cider": WithArgument(
        "FILE",
        "CIDEr-D by the document frequencies in a file, which vlmtune metrics --save_frequencies writes",
        "arXiv:1411.5726",
        ("vlmtune.evaluation.metrics.captions", "make_cider"),
    ),
    "clip_score": WithArgument(
        "CLIP",
        "how well a caption fits its image, 0 to 2.5, by a CLIP (folder or Hub name)",
        "arXiv:2104.08718",
        ("vlmtune.evaluation.clip_score", "make_clip_score"),
    ),
    "chair_i": WithArgument("FILE", "share of the named objects that the image lacks", "arXiv:1809.02156", _CHAIR),
    "chair_s": WithArgument("FILE", "share of captions that name such an object", "arXiv:1809.02156", _CHAIR),
}


def get_metric(name: str) -> Metric:
    """Return a metric by its name, or a user's own by the dotted path of a function.

    A user's function takes (answers, references of each) and returns :class:`Scores` or a value per sample.

    Raises:
        ConfigError: the name is unknown, the metric's library is not installed, or the path leads to no function.
    """
    if name in METRICS:
        return _installed(METRICS[name])
    base, _, argument = name.partition(":")
    if base in WITH_ARGUMENT:
        if not argument:
            raise ConfigError(f"The metric {base} is named with what it needs: {base}:{WITH_ARGUMENT[base].argument}.")
        place, maker = WITH_ARGUMENT[base].maker
        return _installed(getattr(importlib.import_module(place), maker)(base, argument))
    module, _, function = name.rpartition(".")
    if not module:
        known = list(dict.fromkeys([*METRICS, *WITH_ARGUMENT]))
        raise ConfigError(
            f"There is no metric {name!r}; there are {', '.join(known)}, or your own function by its dotted path."
            f"{nearest(name, known)}"
        )
    # A console script's own folder is searched, but not the one it is called in.
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        compute = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The metric {name!r} cannot be imported ({error}). Name a function as module.name."
        ) from error
    finally:
        sys.path.remove(here)
    return Metric(
        name=name, summary="a function of yours", compute=_scored(compute), paper="", code=name, percent=False
    )


def _installed(metric: Metric) -> Metric:
    libraries, extra = metric.needs or ((), "")
    if missing := [library for library in libraries if importlib.util.find_spec(library) is None]:
        raise ConfigError(f"The metric {metric.name} needs {' and '.join(missing)}: pip install 'vlmtune[{extra}]'.")
    return metric


def _scored(compute: Callable[..., Scores | Sequence[float]]) -> Callable[..., Scores]:
    def scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        import numpy as np

        found = compute(answers, references)
        return found if isinstance(found, Scores) else Scores(np.asarray(found, dtype=np.float64))

    return scores


__all__ = ["METRICS", "WITH_ARGUMENT", "Metric", "Scores", "get_metric"]
