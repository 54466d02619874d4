"""Blocking work in threads of its own, so much of it at once and no more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """At most ``threads`` pieces of work at once; belongs to one event loop.

    Whoever leaves while waiting leaves nothing behind. Work that has begun keeps its place until it
    ends, even if nobody wants it any more, so that leaving does not make room for more.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._places = asyncio.Semaphore(threads)

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """What ``work`` returns or raises."""
        await self._places.acquire()
        try:
            running = asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)
        except BaseException:
            self._places.release()
            raise
        running.add_done_callback(lambda _: self._places.release())
        return await asyncio.shield(running)
