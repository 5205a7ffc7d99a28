"""Rows set aside while data is read: named, counted, and an error when there are too many."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from vlmtune.errors import QuarantineError

logger = logging.getLogger("vlmtune.data")


@dataclass(frozen=True)
class BadRow:
    """One row that was set aside.

    Attributes:
        id: the sample's id, or the file and line it stands in.
        kind: what is wrong in two or three words, the same for rows alike: ``missing image``.
        reason: what was found, with the file's name.
    """

    id: str
    kind: str
    reason: str


@dataclass
class Quarantine:
    """Every row that was set aside, in the order they were met."""

    rows: list[BadRow] = field(default_factory=list)

    def add(self, id: str, kind: str, reason: str) -> None:
        """Set a row aside."""
        self.rows.append(BadRow(id, kind, reason))

    def __len__(self) -> int:
        return len(self.rows)

    def summary(self) -> str:
        """One line for people: how many of each kind."""
        kinds = Counter(row.kind for row in self.rows)
        return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())

    def listed(self) -> str:
        """The first ten rows and why, a line each."""
        more = [f"  and {len(self.rows) - 10:,} more"] if len(self.rows) > 10 else []
        return "\n".join([f"  {row.id}: {row.reason}" for row in self.rows[:10]] + more)

    def require_below(self, fraction: float, total: int, source: str) -> None:
        """Log what was set aside, and refuse too much of it.

        Args:
            fraction: largest share of all rows that may be set aside.
            total: rows read, the good and the bad.
            source: the data's name, for the message.

        Raises:
            QuarantineError: more rows are bad than ``fraction`` allows.
        """
        if not self.rows:
            return
        listed = self.listed()
        if len(self.rows) > fraction * total:
            raise QuarantineError(
                f"{len(self.rows):,} of {total:,} rows of {source} cannot be used ({self.summary()}), more than "
                f"max_bad_fraction {fraction:g} allows:\n{listed}\n"
                "Mend or remove them, or raise max_bad_fraction to go on without them."
            )
        logger.warning("%d of %d rows were set aside (%s):\n%s", len(self.rows), total, self.summary(), listed)
