"""Large bodies: what their parsing costs is bounded, and it stops nobody else."""

from __future__ import annotations

import asyncio
import json
import threading

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueweight.protos.errors import InvalidRequest
from trueweight.router import json_bodies
from trueweight.router.json_bodies import JsonBodies
from trueweight.router.openai_requests import parse_chat

MIB = 1024 * 1024
TEXTS = st.text(st.sampled_from('"\\[]{},:é\n a')) | st.text()
DOCUMENTS = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def counted(document):
    """Nodes and commas, by walking."""
    if isinstance(document, str):
        return 1, 0
    if isinstance(document, list):
        inner, names = document, 0
    elif isinstance(document, dict):
        inner, names = list(document.values()), len(document)
    else:
        return 0, 0
    found = [counted(item) for item in inner]
    commas = max(0, len(inner) - 1)
    return 1 + names + sum(n for n, _ in found), commas + sum(c for _, c in found)


@given(DOCUMENTS, st.booleans())
def test_what_is_outside_strings_is_counted_exactly(document, ascii_only):
    body = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert json_bodies._count(body) == counted(document)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * (8 * MIB // 3 - 1) + b"1]",
        b"[" + b"{}," * (8 * MIB // 3 - 1) + b"1]",
        b"[" + b'"",' * (8 * MIB // 3 - 1) + b"1]",
        b"[" + b"1," * (4 * MIB - 1) + b"1]",
        b"{" + b",".join(b'"%07d":1' % i for i in range(700_000)) + b"}",
        b"[" * 8 * MIB,
    ],
    ids=["lists", "objects", "strings", "numbers", "names", "depth"],
)
async def test_attack_a_body_of_millions_of_values_is_never_parsed(body, monkeypatch):
    parsed = []
    monkeypatch.setattr(json_bodies, "_document", parsed.append)
    with pytest.raises(InvalidRequest, match="more than"):
        await JsonBodies().read(body, lambda document: document)
    assert parsed == []


@pytest.mark.parametrize("text", ['"[{:,\\' * MIB, "[" * 4 * MIB, "\\" * 3 * MIB, "é東🎉\n" * MIB])
async def test_a_long_text_of_any_characters_is_read(text):
    document = {"model": "m", "messages": [{"role": "user", "content": text}]}
    assert await JsonBodies().read(orjson.dumps(document), lambda read: read) == document


async def test_the_longest_chat_that_is_allowed_is_read():
    part = {"type": "text", "text": "x" * 100}
    messages = [{"role": "user", "content": [part, part]}] * 4096
    body = orjson.dumps({"model": "m", "messages": messages})
    request = await JsonBodies().read(body, parse_chat)
    assert [m.content for m in request.messages] == ["x" * 200] * 4096


async def test_attack_large_bodies_are_read_off_the_loop_one_at_a_time():
    bodies, running, most = JsonBodies(), 0, 0
    here, go_on = threading.current_thread(), threading.Event()

    def parse(document):
        nonlocal running, most
        running += 1
        most = max(most, running)
        go_on.wait(10)
        running -= 1
        return threading.current_thread()

    body = b'"' + b"x" * 100_000 + b'"'
    reading = [asyncio.ensure_future(bodies.read(body, parse)) for _ in range(4)]
    # A small one waits for none of them.
    assert await bodies.read(b"1", lambda document: document) == 1
    go_on.set()
    assert here not in await asyncio.gather(*reading)
    assert most == 1


async def test_attack_a_reader_who_left_keeps_no_body_in_memory():
    """Many clients send a large body and leave: no more of them are parsed than have begun."""
    bodies, begun, go_on = JsonBodies(), [], threading.Event()

    def parse(document):
        begun.append(len(document))
        go_on.wait(10)

    reading = [
        asyncio.ensure_future(bodies.read(b'"' + b"x" * 100_000 + b'"', parse)) for _ in range(20)
    ]
    async with asyncio.timeout(10):
        while not begun:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    for task in reading:
        task.cancel()
    await asyncio.wait(reading)
    # Nor does leaving make room: the place is taken until the work has ended.
    late = asyncio.ensure_future(bodies.read(b'"' + b"y" * 70_000 + b'"', parse))
    await asyncio.sleep(0.05)
    assert len(begun) == 1
    go_on.set()
    await late
    assert begun == [100_000, 70_000]
