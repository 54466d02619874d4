"""Free ports for servers that must keep their address over a restart."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable

from trueweight.protos.errors import Unavailable

# Below the range that the kernel takes for outgoing connections, so that nothing grabs one between
# the look and the start of the server that it is meant for.
FIRST, LAST = 15_000, 31_000
_ATTEMPTS = 2_000


def is_free(port: int) -> bool:
    """True if a server could listen there now (loopback)."""
    with contextlib.closing(socket.socket()) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


_draw = random.SystemRandom().randint


def pick_ports(count: int, draw: Callable[[int, int], int] = _draw) -> list[int]:
    """Distinct free ports. Raises Unavailable if there seem to be none."""
    found: list[int] = []
    for _ in range(_ATTEMPTS):
        if len(found) == count:
            return found
        port = draw(FIRST, LAST)
        if port not in found and is_free(port):
            found.append(port)
    raise Unavailable(f"no {count} free ports between {FIRST} and {LAST}")
