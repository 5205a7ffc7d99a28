"""The families as a table, for people: ``vlmtune families`` and docs/families.md."""

from __future__ import annotations

from vlmtune.models.families import FAMILIES, REFUSED
from vlmtune.models.family import Family
from vlmtune.models.proved import proved

PROVED = ("4-bit", "share_images", "feature cache", "merge")
COLUMNS = ("family", "other names", "LoRA", *PROVED, "refused", "licence")


def row(family: Family) -> dict[str, str]:
    """What the table says of one family, by column; what is supported is what the tests found."""
    found = proved().get(family.name, {}).get("supports", ())
    in_full = [scope for scope, names in family.lora_targets.items() if not names]
    scopes = [f"{scope} (in full)" if scope in in_full else scope for scope in family.lora_targets]
    return {
        "family": family.name,
        "other names": ", ".join(family.aliases),
        "LoRA": ", ".join(scopes) if "LoRA" in found else "no",
        **{what: "yes" if what in found else "no" for what in PROVED},
        "refused": ", ".join(family.refused_dtypes) or "-",
        "licence": family.licence.partition(" (http")[0],
    }


def as_text() -> str:
    """Return an aligned table, and why what is not supported is not."""
    rows = [dict(zip(COLUMNS, COLUMNS, strict=True)), *(row(family) for family in FAMILIES.values())]
    widths = {name: max(len(entry[name]) for entry in rows) for name in COLUMNS}
    lines = ["  ".join(entry[name].ljust(widths[name]) for name in COLUMNS).rstrip() for entry in rows]
    return "\n".join([*lines, "", *_reasons()])


def as_markdown() -> str:
    """Return the table and the facts of each family, for docs/families.md."""
    lines = [" | ".join(COLUMNS), "|".join(["---"] * len(COLUMNS))]
    lines += [" | ".join(row(family).values()) for family in FAMILIES.values()]
    table = [f"| {line} |" if " | " in line else f"|{line}|" for line in lines]
    versions = sorted({found["transformers"] for found in proved().values()})
    said = f"As the tests found it on transformers {', '.join(versions)} (`make families`)."
    return "\n".join([*table, "", said, "", *(f"- {reason}" for reason in _reasons()), "", *_facts()])


def _reasons() -> list[str]:
    without = [family for family in FAMILIES.values() if not family.sharing]
    reasons = [f"{family.name} shares no image between texts: {family.sharing_reason}." for family in without]
    uncached = [family for family in FAMILIES.values() if not family.feature_cache]
    reasons += [f"{family.name} keeps no image features: {family.cache_reason}." for family in uncached]
    refused = [family for family in FAMILIES.values() if family.refused_dtypes]
    for model_type, (why, packages) in REFUSED.items():
        tried = f" With {' and '.join(packages)} installed it is tried as an unknown family." if packages else ""
        reasons.append(f"{model_type} is not taken: {why}.{tried}")
    reasons += [f"{f.name} in {dtype}: {why}." for f in refused for dtype, why in f.refused_dtypes.items()]
    return reasons


def _facts() -> list[str]:
    lines = []
    for family in FAMILIES.values():
        attention = {
            "causal": "causal",
            "image_block": "causal, an image's tokens see each other",
            "prefix": "prompt whole",
        }
        lines += [
            f"## {family.name}",
            "",
            f"- Class: `{family.model_class}`, `{family.processor_class}`; "
            f"`model_type` {', '.join(family.model_types)}.",
            f"- Attention: {attention[family.attention]}.",
            f"- Image tokens: {'by the image size' if family.sized else 'as many for every image'}; "
            f"positions on {'three axes' if family.positions_of else 'one axis'}.",
            f"- An answer ends in `{family.turn_end}`; generation stops at "
            f"{', '.join(f'`{token}`' for token in family.terminators)}.",
            f"- Paper: {family.paper}. Licence: {family.licence}. Facts from `{family.source}`.",
            f"- transformers {family.min_transformers} or newer.",
            "",
        ]
    return lines[:-1]
