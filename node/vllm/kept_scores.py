"""Scores that wait in a worker until the node takes them: by key, bounded, whatever the runner."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

MAX_KEPT = 1024


class Task(Protocol):
    """One request being scored."""

    def packed(self) -> list[bytes] | str:
        """Its scores (``wire.pack_score``), or why there are none."""
        ...


T = TypeVar("T", bound=Task)


class KeptScores(Generic[T]):
    """Tasks by score key; the oldest goes when there are too many."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[str, T] = OrderedDict()

    def get(self, key: str) -> T | None:
        return self._tasks.get(key)

    def put(self, key: str, task: T) -> None:
        self._tasks[key] = task
        if len(self._tasks) > MAX_KEPT:
            self._tasks.popitem(last=False)

    def __len__(self) -> int:
        return len(self._tasks)

    def take(self, keys: list[str]) -> list[list[bytes] | str]:
        """Scores by key, forgotten here; a reason instead where there are none."""
        tasks = [self._tasks.pop(key, None) for key in keys]
        return [task.packed() if task else "unknown score key" for task in tasks]
