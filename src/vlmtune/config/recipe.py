"""One YAML file and any flags to argument objects, with every problem reported at once.

A recipe is a flat YAML mapping of option names to values; ``--option value`` overrides it. Relative paths
count from the current directory, in a recipe as in a flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from vlmtune.config.convert import Raw, Unconvertible, convert, is_bool, is_list
from vlmtune.config.data import VLMDataArguments
from vlmtune.config.evaluation import EvaluationArguments
from vlmtune.config.model import ModelWithLoRAArguments
from vlmtune.config.options import OptionsError, field_types, raise_problems
from vlmtune.config.training_options import TrainingOptions
from vlmtune.errors import ConfigError, nearest

if TYPE_CHECKING:
    from vlmtune.config.training import TrainingArguments

PATHS_THAT_EXIST = ("dataset_path", "eval_dataset_path", "image_dir")
PATHS = (
    *PATHS_THAT_EXIST,
    *("model_name_or_path", "output_dir", "cache_dir", "resume_from_checkpoint"),
    *("adapter", "evaluation_dir", "predictions", "compare_to"),
)
FULL_FINETUNING_LEARNING_RATE = 2e-5


class Recipe(NamedTuple):
    """The arguments of one training run."""

    model: ModelWithLoRAArguments
    data: VLMDataArguments
    training: TrainingArguments
    evaluation: EvaluationArguments


@dataclass(frozen=True)
class Given:
    """One option as a person wrote it: its name there, its text, and where that stands."""

    written: str
    value: Raw
    place: str


@dataclass
class Gathered:
    """Options as written, by field name, and what was wrong with reading them."""

    values: dict[str, Given] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def parse_recipe(argv: Sequence[str] = (), recipe_path: str | Path | None = None) -> Recipe:
    """Read a training run's options from a YAML file and flags.

    Args:
        argv: flags such as ``["--learning_rate", "1e-4"]``; they override the file.
        recipe_path: the YAML file, if there is one.

    Raises:
        ConfigError: the file cannot be read, an option is unknown (the message offers the nearest name), a
            required one is missing, or a value is of the wrong type or out of range; all in one message.
    """
    # Its import takes seconds, and whoever reads a run's options needs it next.
    from vlmtune.config.training import TrainingArguments

    classes = (ModelWithLoRAArguments, VLMDataArguments, TrainingArguments, EvaluationArguments)
    return Recipe(*parse_arguments(classes, argv, recipe_path, required=("output_dir",)))


def parse_arguments(
    classes: Sequence[type],
    argv: Sequence[str] = (),
    recipe_path: str | Path | None = None,
    *,
    required: Sequence[str] = (),
    ignored: Sequence[type] = (),
) -> tuple[Any, ...]:
    """Read options of any argument classes from a YAML file and flags; see :func:`parse_recipe`.

    Args:
        classes: argument dataclasses to make.
        argv: flags.
        recipe_path: a YAML file.
        required: options that must be given although their class has a default.
        ignored: classes whose options may stand in the file without being used.

    Returns:
        An instance of each class, in order.
    """
    gathered, values = _read((*ignored, *classes), argv, recipe_path)
    problems = gathered.problems
    problems += _misplaced_paths(gathered.values, values, recipe_path)
    if values.get("use_lora") is False and any(issubclass(cls, TrainingOptions) for cls in classes):
        values.setdefault("learning_rate", FULL_FINETUNING_LEARNING_RATE)
    made = []
    for cls in classes:
        needed = _without_default(cls) | {name for name in required if name in field_types(cls)}
        missing = sorted(needed - gathered.values.keys())
        problems += [f"{name} is not set: {_help(cls, name)}" for name in missing]
        # A stand-in lets the class check its other values too.
        own = {name: values[name] for name in field_types(cls) if name in values}
        own |= {name: "-" for name in needed if name not in own}
        try:
            made.append(cls(**own))
        except OptionsError as error:
            problems += error.problems
    raise_problems(problems)
    return tuple(made)


def peek(
    classes: Sequence[type], argv: Sequence[str] = (), recipe_path: str | Path | None = None
) -> tuple[Any, ...] | None:
    """Read the options of some classes before those of others can be; faults are :func:`parse_arguments`'s to name.

    Returns:
        An instance of each class, of what could be read; ``None`` where that makes none.
    """
    try:
        _, values = _read(classes, argv, recipe_path)
        if any(_without_default(cls) - values.keys() for cls in classes):
            return None
        return tuple(cls(**{name: values[name] for name in field_types(cls) if name in values}) for cls in classes)
    except ConfigError:
        return None


def _read(
    classes: Sequence[type], argv: Sequence[str], recipe_path: str | Path | None
) -> tuple[Gathered, dict[str, Any]]:
    """Return the options as they were written, what was wrong with them, and their values."""
    annotations = {name: kind for cls in classes for name, kind in field_types(cls).items()}
    gathered = Gathered()
    if recipe_path is not None:
        _gather(read_yaml(Path(recipe_path)), str(recipe_path), annotations, gathered)
    _gather_flags(argv, annotations, gathered)
    values: dict[str, Any] = {}
    for name, given in gathered.values.items():
        try:
            values[name] = convert(given.value, annotations[name])
        except Unconvertible as error:
            gathered.problems.append(
                f"{given.place}: {given.written} is {_shown(given.value)}; {error}{_full_stop(error)}"
            )
    for name in PATHS:
        if isinstance(values.get(name), str) and values[name].startswith("~"):
            values[name] = str(Path(values[name]).expanduser())
    return gathered, values


def read_yaml(path: Path) -> dict[str, Raw]:
    """Return a recipe's options as the texts that stand in the file.

    Raises:
        ConfigError: the file is absent, no UTF-8 text, no YAML, or no mapping, or names an option twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_TextLoader)
    except FileNotFoundError:
        raise ConfigError(f"There is no recipe {path}. Name a YAML file.") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a folder, and a recipe is a YAML file. Name a model or an adapter by --model_name_or_path, "
            "data by --dataset_path."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} cannot be read ({error}). Name a YAML file in UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "it is not YAML"
        raise ConfigError(f"The recipe {path} cannot be read: {what}{line}.") from error
    if content in ("", None):
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"The recipe {path} holds no options. Write one 'option: value' a line.")
    return content


class _TextLoader(yaml.BaseLoader):
    """Reads every scalar as its text, and refuses a key that stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is set a second time", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _gather(content: Mapping[str, Raw], place: str, annotations: Mapping[str, Any], gathered: Gathered) -> None:
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in annotations:
            gathered.values[name] = Given(key, value, place)
        elif isinstance(value, dict):
            gathered.problems.append(
                f"{place}: {key} is not an option. Options stand at the top level of a recipe, not in sections."
            )
        else:
            gathered.problems.append(f"{place}: {key} is not an option.{nearest(name, annotations)}")


def _gather_flags(argv: Sequence[str], annotations: Mapping[str, Any], gathered: Gathered) -> None:
    place = "command line"
    for flag, texts in _split_flags(argv):
        name = flag.removeprefix("--").replace("-", "_")
        positive = name.removeprefix("no_")
        if not flag:
            gathered.problems.append(f"{place}: {texts[0]!r} stands alone; write --option value.")
        elif name not in annotations:
            if positive in annotations and is_bool(annotations[positive]) and not texts:
                gathered.values[positive] = Given(flag, "false", place)
            else:
                hint = nearest(name, annotations).replace("'", "'--", 1)
                gathered.problems.append(f"{place}: {flag} is not an option.{hint}")
        elif len(texts) == 1:
            gathered.values[name] = Given(flag, texts[0], place)
        elif texts and is_list(annotations[name]):
            gathered.values[name] = Given(flag, list(texts), place)
        elif not texts and is_bool(annotations[name]):
            gathered.values[name] = Given(flag, "true", place)
        elif not texts:
            gathered.problems.append(f"{place}: {flag} needs a value.")
        else:
            misplaced = texts[-1].endswith((".yaml", ".yml"))
            hint = "A recipe stands before the options." if misplaced else "Put a text with spaces in quotes."
            gathered.problems.append(
                f"{place}: {flag} takes one value but has {len(texts)} ({' '.join(texts)}). {hint}"
            )


def _split_flags(argv: Sequence[str]) -> Iterable[tuple[str, list[str]]]:
    """Yield each flag with the texts after it; texts before the first flag come one by one under ``""``."""
    flag, texts = "", list[str]()
    for token in argv:
        if not token.startswith("--"):
            if flag:
                texts.append(token)
            else:
                yield "", [token]
            continue
        if flag:
            yield flag, texts
        flag, equals, text = token.partition("=")
        texts = [text] if equals else []
    if flag:
        yield flag, texts


def _misplaced_paths(
    gathered: Mapping[str, Given], values: Mapping[str, Any], recipe_path: str | Path | None
) -> list[str]:
    """Find paths of a recipe that were meant to count from the recipe's own folder."""
    problems = []
    for name in PATHS_THAT_EXIST:
        text = values.get(name)
        if recipe_path is None or not text or gathered[name].place != str(recipe_path):
            continue
        beside = Path(recipe_path).parent / text
        if not Path(text).exists() and beside.exists():
            problems.append(
                f"{recipe_path}: {name} is {text!r}, which is not in the current directory ({Path.cwd()}) but lies "
                f"beside the recipe. Paths count from the current directory: write {str(beside)!r}."
            )
    return problems


def _without_default(cls: type) -> set[str]:
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing}


def _help(cls: type, name: str) -> str:
    return next(str(f.metadata.get("help", "")) for f in dataclasses.fields(cls) if f.name == name)


def _shown(value: Raw) -> str:
    return repr(value) if isinstance(value, str) else "a mapping" if isinstance(value, dict) else f"{value}"


def _full_stop(error: Exception) -> str:
    return "" if str(error).endswith(("?", ".")) else "."
