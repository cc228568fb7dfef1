"""Notice that data have changed since their loader was created."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Change = Literal["data", "length"]


class Source:
    """The data that a loader was created from: which objects they were, and how long.

    Args:
        data: a dataset, a ready loader, or a dict of them.
    """

    def __init__(self, data: Any) -> None:
        self._named = dict(data) if isinstance(data, Mapping) else {None: data}
        self.lengths = [length_of(one) for one in self._named.values()]

    def change(self, data: Any) -> Change | None:
        """How `data` differ: they are other objects, or have another length; None if neither.

        >>> letters = ["a"]
        >>> source = Source(letters)
        >>> source.change(["a"])
        'data'
        >>> letters.append("b")
        >>> source.change(letters)
        'length'
        """
        other = Source(data)
        if self._named.keys() != other._named.keys() or any(
            one is not other._named[name] for name, one in self._named.items()
        ):
            return "data"
        return "length" if self.lengths != other.lengths else None

    def describe_lengths(self, data: Any) -> str | None:
        """How the lengths of the same data have changed; None if they haven't.

        >>> letters = ["a"]
        >>> source = Source(letters)
        >>> letters.append("b")
        >>> source.describe_lengths(letters)
        '1 → 2'
        """
        if self.change(data) != "length":
            return None
        pairs = zip(self._named, self.lengths, Source(data).lengths, strict=True)
        return ", ".join(
            f"{before} → {now}" if name is None else f"{name}: {before} → {now}"
            for name, before, now in pairs
            if before != now
        )


def length_of(data: Any) -> int | None:
    """The length of data; None if they have none, as a stream."""
    try:
        return len(data)
    except TypeError:
        return None
