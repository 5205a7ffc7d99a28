"""LoRA on the parts of a model that were asked for, and on nothing else."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from vlmtune.errors import ConfigError, ModelError
from vlmtune.models.families import get_family
from vlmtune.models.family import Family, Scope
from vlmtune.models.lora_init import finish_start, peft_start

ALL_LINEAR = "all-linear"
_WITHOUT_LINEAR_LAYERS = " Add another scope, or train the part in full without LoRA (use_lora: false, train_parts)."


def setup_lora(
    model: nn.Module,
    *,
    lora_r: int = 16,
    lora_alpha: float = 32,
    vision_lora_r: int | None = None,
    vision_lora_alpha: float | None = None,
    projector_lora_r: int | None = None,
    projector_lora_alpha: float | None = None,
    lora_dropout: float = 0.05,
    lora_scopes: Sequence[Scope] = ("language",),
    train_parts: Sequence[Scope] = (),
    lora_target_modules: Sequence[str] | None = None,
    lora_init: str = "default",
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: str = "none",
    modules_to_save: Sequence[str] | None = None,
    **ignored: Any,
) -> PeftModel:
    """Put adapters beside the linear layers of the chosen parts and freeze everything else.

    Args:
        model: from :func:`~vlmtune.models.loading.load_model_for_training`.
        lora_r: rank.
        lora_alpha: scale; an adapter's output is multiplied by ``lora_alpha / lora_r`` (arXiv:2106.09685).
        vision_lora_r: rank in the vision tower; ``lora_r`` by default. Likewise the three that follow.
        vision_lora_alpha: scale in the vision tower.
        projector_lora_r: rank in the projector.
        projector_lora_alpha: scale in the projector.
        lora_dropout: share of an adapter's inputs set to zero.
        lora_scopes: parts that get adapters. A part without linear layers is trained in full instead.
        train_parts: parts trained in full and saved with the adapter; a head tied to the token embedding, or the
            model's own, goes with ``language``.
        lora_target_modules: names of layers inside those parts, or ``all-linear``; all of the family by default.
        lora_init: first weights: ``default``, ``gaussian``, ``pissa`` (arXiv:2404.02948) or ``loftq``
            (arXiv:2310.08659); see :mod:`~vlmtune.models.lora_init`.
        use_rslora: scale by ``lora_alpha / sqrt(lora_r)`` (arXiv:2312.03732).
        use_dora: train magnitudes too (arXiv:2402.09353).
        lora_bias: bias vectors trained too: ``none``, ``all`` or ``lora_only``.
        modules_to_save: further modules trained in full. Of tied modules one tensor is trained.
        **ignored: other fields of ``ModelWithLoRAArguments``, so that ``setup_lora(model, **vars(args))`` works.

    Raises:
        ConfigError: a scope, a target or a module to save matches nothing, or the first weights cannot be had.
        ModelError: the model has an adapter already, or PEFT placed adapters elsewhere than asked.
    """
    if hasattr(model, "peft_config"):
        raise ModelError("The model has an adapter already. Load the base model anew before setup_lora.")
    family = get_family(model)
    names = None if list(lora_target_modules or ()) == [ALL_LINEAR] else lora_target_modules
    in_full = [module for part in train_parts for module in part_in_full(model, family, part)]
    in_full += [module for name in modules_to_save or () for module in _modules_named(model, name)]
    found: dict[Scope, set[str]] = {}
    for scope in lora_scopes:
        if scope not in family.lora_targets:
            raise ConfigError(f"lora_scopes has {scope!r}; {family.name} has {', '.join(family.lora_targets)}.")
        if family.lora_targets[scope]:
            found[scope] = linear_layers(model, family.parts[scope], names or family.lora_targets[scope])
        else:
            in_full += part_in_full(model, family, scope)
    _require_layers(family, found, names)
    expected = {name for layers in found.values() for name in layers}
    ranks = {"vision": vision_lora_r, "projector": projector_lora_r}
    alphas = {"vision": vision_lora_alpha, "projector": projector_lora_alpha}
    # PEFT warns of its own way to make PiSSA plain, which is not taken.
    warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA with rank_pattern")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_r,
        lora_alpha=lora_alpha,
        rank_pattern={place_pattern(family, part): rank for part, rank in ranks.items() if part in found and rank},
        alpha_pattern={place_pattern(family, part): scale for part, scale in alphas.items() if part in found and scale},
        lora_dropout=lora_dropout,
        target_modules="|".join(
            _pattern(model, family.parts[scope], names or family.lora_targets[scope], layers)
            for scope, layers in found.items()
        ),
        init_lora_weights=peft_start(lora_init, model, expected, max(lora_r, *(rank or 0 for rank in ranks.values()))),
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias=lora_bias,
        modules_to_save=list(dict.fromkeys(in_full)) or None,
        ensure_weight_tying=ties_saved_modules(model, in_full),
    )
    # A folder's name is kept whole, so that the adapter finds its base from any working directory.
    name = str(getattr(model, "name_or_path", "") or "")
    if name and Path(name).is_dir():
        model.name_or_path = str(Path(name).resolve())  # type: ignore[assignment]
    adapted = get_peft_model(model, config)
    placed = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    if placed != expected:
        wrong = sorted(placed ^ expected)
        raise ModelError(f"Adapters are not where they were asked for: {len(wrong)} differ, such as {wrong[0]}.")
    finish_start(adapted, lora_init)
    return adapted


def prepare_full_finetuning(model: nn.Module, parts: Iterable[str] = ("language", "projector")) -> nn.Module:
    """Make the weights of the chosen parts trainable and freeze the others.

    Args:
        model: from :func:`~vlmtune.models.loading.load_model_for_training`; changed in place and returned.
        parts: names of parts; a head tied to the token embedding goes with ``language``.

    Raises:
        ConfigError: a part is unknown.
    """
    family = get_family(model)
    chosen = list(parts)
    model.requires_grad_(False)
    for part in chosen:
        if part not in family.lora_targets:
            raise ConfigError(f"train_parts has {part!r}; {family.name} has {', '.join(family.lora_targets)}.")
    # The longest place last: one part may lie inside another, as the projector does in some towers.
    for part in sorted(family.lora_targets, key=lambda scope: len(family.parts[scope])):
        model.get_submodule(family.parts[part]).requires_grad_(part in chosen)
    for name in family.projector_parameters:
        model.get_parameter(name).requires_grad_("projector" in chosen)
    for name in family.unused(model.config):
        model.get_submodule(name).requires_grad_(False)
    if "language" in chosen and "head" in family.parts:
        model.get_submodule(family.parts["head"]).requires_grad_(True)
    return model


def linear_layers(model: nn.Module, part: str, names: Iterable[str]) -> set[str]:
    """Full names of the linear layers of these names inside a part, quantised ones too, that reach the loss."""
    wanted = set(names)
    family = get_family(model)
    # A part that lies inside this one is not of it.
    others = [place for place in family.parts.values() if place.startswith(part + ".")]
    left_out = tuple(name + "." for name in [*others, *family.unused(model.config)])
    return {
        name
        for name, module in model.named_modules()
        if name.startswith(part + ".") and name.rpartition(".")[2] in wanted and isinstance(module, nn.Linear)
        if not name.startswith(left_out)
    }


def part_in_full(model: nn.Module, family: Family, part: str) -> list[str]:
    """Names of the modules that hold a part's weights, for PEFT to train whole and save beside adapters.

    They are as large as can be: a part that lies inside this one is left out, and so is what the loss does not depend
    on. The token embedding stands alone, so that a head tied to it stays so.

    Raises:
        ConfigError: the family has no such part.
    """
    if part not in family.lora_targets:
        raise ConfigError(f"train_parts has {part!r}; {family.name} has {', '.join(family.lora_targets)}.")
    place = family.parts[part]  # type: ignore[index]
    left_out = {*family.unused(model.config), *(p for p in family.parts.values() if p.startswith(place + "."))}
    embedding = _name_of(model, model.get_input_embeddings())  # type: ignore[operator]
    inside = tuple({*left_out, embedding})
    found = []

    def gather(name: str, module: nn.Module) -> None:
        if name in left_out or not any(True for _ in module.parameters()):
            return
        if isinstance(module, nn.ModuleList) or any(one.startswith(name + ".") for one in inside):
            for child, inner in module.named_children():
                gather(f"{name}.{child}", inner)
        else:
            found.append(name)

    gather(place, model.get_submodule(place))
    if part == "language" and "head" in family.parts:
        found.append(family.parts["head"])
    return found


def ties_saved_modules(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether modules trained in full share one tensor with the token embedding or the head tied to it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not embedding.weight:
        return False
    return not {_name_of(model, embedding), _name_of(model, head)}.isdisjoint(names)


def place_pattern(family: Family, part: str) -> str:
    """A regular expression, as PEFT's ``rank_pattern`` takes them, for all modules of a part and of no part inside."""
    place = family.parts[part] + "."  # type: ignore[index]
    inner = [other.removeprefix(place) for other in family.parts.values() if other.startswith(place)]
    # PEFT sorts the patterns when it saves them, so that each must fit its own part alone.
    others = "".join(rf"(?!{re.escape(name)}\.)" for name in inner)
    return f"^{re.escape(place)}{others}.*"


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: Iterable[str] = (name for name, module in model.named_modules() if module is wanted)
    return next(iter(names))


def _modules_named(model: nn.Module, name: str) -> list[str]:
    found = [full for full, _ in model.named_modules() if full == name or full.endswith("." + name)]
    if not found or not name:
        raise ConfigError(f"modules_to_save has {name!r}, which is the name of no module in {type(model).__name__}.")
    return found


def _pattern(model: nn.Module, part: str, names: Iterable[str], found: set[str]) -> str:
    """A regular expression that matches the found layers, and no other module."""
    pattern = rf"{re.escape(part)}\..*\.({'|'.join(names)})"
    if {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == found:
        return pattern
    return "|".join(re.escape(name) for name in sorted(found))


def _require_layers(family: Family, found: Mapping[Scope, set[str]], asked: Sequence[str] | None) -> None:
    """Refuse a part without a layer to adapt, and a name that no layer has."""
    what = f"lora_target_modules {', '.join(asked)}" if asked else "lora_scopes"
    empty = [scope for scope, layers in found.items() if not layers]
    if empty or not found:
        available = sorted({name for scope in empty for name in family.lora_targets[scope]})
        raise ConfigError(
            f"{what} matches no linear layer in {', '.join(empty) or 'the chosen lora_scopes'} of {family.name}. "
            f"Linear layers there: {', '.join(available) or 'none'}.{'' if available else _WITHOUT_LINEAR_LAYERS}"
        )
    last_names = {name.rpartition(".")[2] for layers in found.values() for name in layers}
    absent = [name for name in asked or () if name not in last_names]
    if absent:
        raise ConfigError(
            f"lora_target_modules has {', '.join(absent)}, which match no linear layer in the chosen lora_scopes of "
            f"{family.name}; these match: {', '.join(sorted(last_names))}."
        )
