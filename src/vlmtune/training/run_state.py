"""What a checkpoint must hold besides transformers' own files for a resumed run to equal an uninterrupted one."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from vlmtune.errors import ResumeError

RUN_STATE = "vlmtune_state.json"


@dataclass
class RunState:
    """The figures of a run that go on over its interruptions.

    Attributes:
        loss_since_log: sum of the steps' losses since the last log line.
        loss_before: sum of those before it.
        logged_step: the step of the last log line.
        skipped: steps left out because they were not finite.
        skipped_since_log: of these, since the last log line.
        seconds_before: spent in training by processes that have ended.
        evaluation_due: the step's evaluation was cut short, and comes before the next step.
        device_batch: samples a device takes at once.
        accumulation: batches of a device in one step.
        streamed: of each rank, the step at which its window began, and the window's number; with streaming alone.
    """

    loss_since_log: float = 0.0
    loss_before: float = 0.0
    logged_step: int = 0
    skipped: int = 0
    skipped_since_log: int = 0
    seconds_before: float = 0.0
    evaluation_due: bool = False
    device_batch: int = 0
    accumulation: int = 0
    streamed: list[list[int]] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def seconds(self) -> float:
        """Seconds of training in all, by a clock that is never put back."""
        return self.seconds_before + time.perf_counter() - self._started

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        values = asdict(self) | {"seconds_before": round(self.seconds(), 3)}
        del values["_started"]
        (folder / RUN_STATE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read it from a checkpoint.

        Raises:
            ResumeError: it is missing or of another form.
        """
        path = folder / RUN_STATE
        known = {one.name for one in fields(cls)} - {"_started"}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: value for name, value in values.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ResumeError(
                f"{folder} cannot be resumed from: {path.name} cannot be read ({error}). Name another checkpoint."
            ) from error
