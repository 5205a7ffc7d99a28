"""What every benchmark prints first: hardware, versions, date and arguments."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def header(args: argparse.Namespace) -> dict[str, Any]:
    """Describe where and how the figures were taken."""
    from vlmtune.training.run_info import hardware, versions

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }


def in_own_process(script: str, mode: str, arguments: list[str]) -> dict[str, Any]:
    """Run ``script --worker mode`` in a process of its own and return the JSON of its last line."""
    command = [sys.executable, script, "--worker", mode, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{mode} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def peak_memory_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write(name: str, record: dict[str, Any], table: str) -> None:
    """Write ``results/NAME.json`` and ``results/NAME.md`` and print the table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    about = record["about"]
    hardware = about["hardware"]
    machine = ", ".join(hardware.get("gpus", [])) or f"{hardware['processor']}, {hardware['cores']} cores"
    versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    arguments = " ".join(f"{key}={value}" for key, value in about["arguments"].items() if key != "worker")
    text = f"# {name}\n\n{table}\n\n- date: {about['date']}\n- hardware: {machine}\n- versions: {versions}\n"
    (RESULTS / f"{name}.md").write_text(text + f"- arguments: {arguments}\n")
    print(text)
