"""Plans as text and as JSON."""

from __future__ import annotations

import json
from typing import Any

from ..terminal import plain


class Account:
    """What says what it would do: in rows, in a summary, and for JSON."""

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of the table."""
        raise NotImplementedError

    def summary(self) -> str:
        """The rest, in a few lines."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        raise NotImplementedError

    def table(self) -> str:
        """All of it as text; names that differ by a number share a row."""
        return f"{plain(*self.rows())}\n\n{self.summary()}"

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """All that is known about it."""
        return json.dumps(self.to_dict(), indent=2)
