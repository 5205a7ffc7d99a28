"""Metrics as pure functions of answers and references; without torch. A new one is a file and a line here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
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
from vlmtune.evaluation.metrics.vqa import VQA_ACCURACY

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        EXACT_MATCH,
        TOKEN_F1,
        VQA_ACCURACY,
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


def get_metric(name: str) -> Metric:
    """Return a metric by its name, or a user's own by the dotted path of a function.

    A user's function takes (answers, references of each) and returns :class:`Scores` or a value per sample.

    Raises:
        ConfigError: the name is unknown, the metric's library is not installed, or the path leads to no function.
    """
    if name in METRICS:
        libraries, extra = METRICS[name].needs or ((), "")
        if missing := [library for library in libraries if importlib.util.find_spec(library) is None]:
            raise ConfigError(f"The metric {name} needs {' and '.join(missing)}: pip install 'vlmtune[{extra}]'.")
        return METRICS[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise ConfigError(
            f"There is no metric {name!r}; there are {', '.join(METRICS)}, or your own function by its dotted path."
            f"{nearest(name, METRICS)}"
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


def _scored(compute: Callable[..., Scores | Sequence[float]]) -> Callable[..., Scores]:
    def scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        import numpy as np

        found = compute(answers, references)
        return found if isinstance(found, Scores) else Scores(np.asarray(found, dtype=np.float64))

    return scores


__all__ = ["METRICS", "Metric", "Scores", "get_metric"]
