"""Attacks by a publisher: chat templates that want time, memory or the router's end."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from trueweight.protos.errors import EngineError, InvalidRequest, Unavailable
from trueweight.router.chat_template import ChatTemplate, TemplateVariables
from trueweight.router.template_child import DONE
from trueweight.router.template_pool import POOL, TemplatePool

VARIABLES = TemplateVariables("<s>", "</s>", "2026-11-28")
SECRET = "the-prompt-of-somebody"
DOUBLED = "{% set ns = namespace(x=[1]) %}" + "{% set ns.x = [ns.x, ns.x] %}" * 60
LOOP = (
    "{% set r = range(99999) %}"
    "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
)
HOSTILE = {
    "loops without output": LOOP,
    "doubling text": "{% set s = 'a' * 16 %}" + "{% set s = s ~ s %}" * 40 + "x",
    "doubling lists": DOUBLED + "{{ ns.x|tojson }}",
    "comparing doubled lists": DOUBLED + DOUBLED.replace("ns", "nt") + "{{ ns.x == nt.x }}",
    "percent": "{{ '%0999999999d' % 1 }}",
    "percent of a variable": "{{ '%0999999999d' % (messages|length) }}",
    "format": "{{ '{:>999999999}'.format(messages|length) }}",
    "ljust": "{{ 'x'.ljust(999999999) }}",
    "join": "{% set s = 'a' * 100000 %}{{ range(99999)|join(s) }}",
    "replace": "{% set s = 'a' * 100000 %}{{ s|replace('a', s) }}",
    "power": "{{ (messages|length + 9) ** 1000000000 }}",
    "captured": "{% set x %}"
    + "{% for a in range(99999) %}{{ a }}" * 3
    + "{% endfor %}" * 3
    + ("{% endset %}{{ x }}"),
}


def render(template, content=SECRET):
    return template.render([{"role": "user", "content": content}], VARIABLES)


def memory_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_attack_a_template_cannot_hang_or_fill_the_router(text, capfd):
    before = memory_mib()
    with pytest.raises((EngineError, InvalidRequest)):
        render(ChatTemplate(text))
    assert memory_mib() - before < 200
    # The next chat is as good as any.
    assert render(ChatTemplate("{{ messages[0].content }}")) == SECRET
    assert SECRET not in "".join(capfd.readouterr())


async def test_attack_a_short_chat_with_a_hostile_template_stops_nobody():
    template = ChatTemplate(LOOP)
    with ThreadPoolExecutor(1) as threads:
        loop, turns = asyncio.get_running_loop(), 0
        rendering = loop.run_in_executor(threads, render, template)
        while not rendering.done():
            await asyncio.sleep(0.01)
            turns += 1
        with pytest.raises(InvalidRequest, match="too much time or memory"):
            await rendering
    # Two seconds of such turns; if the loop had waited there would be one.
    assert turns > 10


def test_attack_a_child_that_was_killed_is_replaced():
    template = ChatTemplate("{{ messages[0].content }}")
    assert render(template) == SECRET
    for child in POOL._idle:
        os.kill(child._process.pid, signal.SIGKILL)
        child._process.wait()
    assert render(template) == SECRET


def test_children_are_few_and_end_with_their_pool():
    pool = TemplatePool()
    job = {"messages": None}
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda i: pool.ask(f"{i}", f"{i}", job), range(12)))
    assert answers == [DONE] * 12
    children = list(pool._idle)
    assert 1 <= len(children) <= 4
    pool.close()
    assert all(not child.alive for child in children)


@pytest.mark.parametrize("program", ["/nowhere/python", "/bin/false"])
def test_without_children_the_router_is_unavailable_and_not_wrong(monkeypatch, program):
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(Unavailable):
        TemplatePool().ask("", "", {"messages": None})


def test_well_known_constructs_render_as_transformers_renders_them():
    text = (
        "{%- set ns = namespace(first=true) -%}\n{{- bos_token }}\n"
        "{%- if not date_string is defined %}{%- set date_string = '26 Jul' %}{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message['role'] not in ['user', 'assistant'] %}{% continue %}{% endif %}\n"
        "    {%- if ns.first %}{{- strftime_now('%d %B %Y') + '\\n' }}{% set ns.first = false %}"
        "{%- endif %}\n"
        "    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message['content'] | trim"
        " ~ '<|im_end|>' }}"
        "{{ '\\n' if not loop.last else eos_token }}\n"
        "{%- endfor %}\n"
        "{%- if tools %}{{ tools | tojson(indent=4) }}{% endif %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    messages = [
        {"role": "system", "content": "no"},
        {"role": "user", "content": " hé <b> "},
        {"role": "assistant", "content": "東京 🎉"},
    ]
    assert ChatTemplate(text).render(messages, VARIABLES) == (
        "<s>28 November 2026\n<|im_start|>user\nhé <b><|im_end|>\n"
        "<|im_start|>assistant\n東京 🎉<|im_end|></s><|im_start|>assistant\n"
    )


@pytest.mark.parametrize("text", ["h" * 8_300_000 + "🎉", "é🎉" * 1_400_000, '"\\' * 2_000_000])
def test_the_longest_prompts_render(text):
    assert render(ChatTemplate("{{ messages[0].content }}"), text) == text
