"""What people see while a simulation runs: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_LINE_EVERY_S = 5.0


class Display:
    """Use as a context manager. All methods may be called at any time."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._is_live = self.console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self._is_live,
        )
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line with the time since the start."""
        elapsed = time.monotonic() - self._started
        self.console.print(f"[dim]{elapsed:6.1f} s[/]  {text}", highlight=False, soft_wrap=True)

    def count(self, name: str, total: int) -> Counter:
        """A bar in a terminal; elsewhere a line now and then."""
        return Counter(self, self._progress, name, total)

    @property
    def is_live(self) -> bool:
        """Whether bars move."""
        return self._is_live


class Counter:
    """Progress of one thing that is done ``total`` times."""

    def __init__(self, display: Display, progress: Progress, name: str, total: int) -> None:
        self._display, self._progress, self._name, self._total = display, progress, name, total
        self._done = 0
        self._last_line = time.monotonic()
        self._task = progress.add_task(name, total=total)

    def advance(self, note: str = "") -> None:
        """One more is done."""
        self.set(self._done + 1, note)

    def set(self, done: int, note: str = "") -> None:
        """``done`` are done in all."""
        self._done = done
        description = f"{self._name} {note}".strip()
        self._progress.update(self._task, completed=done, description=description)
        now = time.monotonic()
        if not self._display.is_live and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            self._display.say(f"{self._name}: {done} of {self._total} {note}".rstrip())

    def close(self) -> None:
        """Takes the bar away."""
        self._progress.remove_task(self._task)
