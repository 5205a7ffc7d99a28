"""Errors for users. Each names the file, row or option, says what was found and what to do.

The command line prints them as one paragraph without a traceback (``--debug`` adds it).

::

    VlmtuneError
    ├── ConfigError            a recipe, flag or argument that cannot be used
    ├── MissingDependencyError an optional package that a chosen feature needs
    ├── DataError              files on disk that cannot become samples
    │   ├── FormatError        no format, or several, recognise the data
    │   ├── ImageError         one image that cannot be used
    │   └── QuarantineError    more bad rows than ``max_bad_fraction`` allows
    ├── EncodingError          a sample that cannot become tokens
    │   ├── NothingSupervisedError  nothing in it to learn from
    │   └── TooLongError       more tokens than ``max_length``
    ├── ModelError             a model that cannot be loaded, trained or saved
    │   ├── UnsupportedModelError
    │   └── AdapterError       an adapter that does not fit its model
    ├── OutputError            an output directory that must not be written
    ├── TrainingError          a run that cannot go on
    │   ├── NonFiniteError     a loss or gradient that is NaN or infinite
    │   ├── ResumeError        a checkpoint that cannot be continued from
    │   └── StoppedBySignal    a run that SIGTERM or SIGINT ended after its step, saved
    └── EvaluationError        predictions that cannot be scored
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmtuneError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(VlmtuneError):
    """A recipe, flag or argument that cannot be used."""


class MissingDependencyError(VlmtuneError):
    """An optional package that the chosen feature needs is not installed."""


class DataError(VlmtuneError):
    """Files on disk that cannot become samples."""


class FormatError(DataError):
    """No known format, or more than one, recognises the data."""


class ImageError(DataError):
    """One image that cannot be used; the message begins with the image's name."""


class QuarantineError(DataError):
    """More rows were set aside than ``max_bad_fraction`` allows."""


class EncodingError(VlmtuneError):
    """A sample that cannot become tokens; the message names the sample."""


class NothingSupervisedError(EncodingError):
    """A sample without a single token to learn from."""


class TooLongError(EncodingError):
    """A sample with more tokens than ``max_length``."""


class ModelError(VlmtuneError):
    """A model that cannot be loaded, trained or saved."""


class UnsupportedModelError(ModelError):
    """The model is no vision-language model that vlmtune knows."""


class AdapterError(ModelError):
    """An adapter that does not fit its model."""


class OutputError(VlmtuneError):
    """An output directory that must not be written to."""


class TrainingError(VlmtuneError):
    """A training run that cannot go on."""


class NonFiniteError(TrainingError):
    """A loss or gradient became NaN or infinite; the message names the step and the samples."""


class ResumeError(TrainingError):
    """A checkpoint that training cannot continue from."""


class StoppedBySignal(TrainingError):
    """SIGTERM or SIGINT ended a run after its step; the same command goes on from there."""


class EvaluationError(VlmtuneError):
    """Predictions that cannot be made or scored."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
