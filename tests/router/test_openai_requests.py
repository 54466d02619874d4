"""Bodies: what is accepted, what is refused by name, and that nothing crashes the parser."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.protos.errors import InvalidRequest, UnsupportedParameter
from trueweight.protos.grammar import parse_source
from trueweight.router.openai_requests import parse_chat, parse_completion

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def chat(**more):
    return parse_chat({**CHAT, **more})


def completion(**more):
    return parse_completion({**TEXT, **more})


def test_defaults_are_neutral():
    request = chat()
    assert (request.max_tokens, request.seed, request.stop) == (None, None, ())
    assert not request.stream
    assert request.sampling.temperature == 1.0
    assert request.messages[0].content == "hi"


def test_what_load_clients_send_is_accepted():
    request = completion(
        repetition_penalty=1.0,
        logprobs=None,
        ignore_eos=True,
        n=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": False},
        user="someone",
        metadata={"a": "b"},
        best_of=1,
        echo=False,
        suffix=None,
        stop=None,
        max_tokens=128,
    )
    assert request.ignore_eos
    assert request.stream
    assert request.include_usage
    assert request.max_tokens == 128


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 5),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("echo", True),
        ("modalities", ["audio"]),
        ("guided_json", {}),
        ("made_up", 1),
        ("n", True),
    ],
)
def test_unsupported_is_refused_by_name(name, value):
    with pytest.raises(UnsupportedParameter) as caught:
        chat(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 10**30),
        ("max_tokens", "12"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.0),
        ("stop", ""),
        ("stop", [1]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 300),
        ("stream", "yes"),
        ("stream", 1),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": 1, "01": 2}),
        ("logit_bias", []),
        ("stop_token_ids", [-1]),
        ("ignore_eos", 1),
        ("model", ""),
        ("model", 5),
        ("messages", []),
        ("messages", "hi"),
        ("messages", [1]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "robot", "content": "x"}]),
        ("messages", [{"content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": "x", "tool_calls": [{}]}]),
        ("provider", {"max_price": {"input": -1}}),
        ("provider", {"max_price": {"input": "cheap"}}),
        ("provider", {"only": "n"}),
        ("provider", {"sort": "price"}),
    ],
)
def test_wrong_values_name_their_parameter(name, value):
    with pytest.raises(InvalidRequest) as caught:
        chat(**{name: value})
    assert caught.value.param
    assert caught.value.param.split(".")[0].split("[")[0] == name


@pytest.mark.parametrize("body", [None, 1, "x", [], [CHAT], True])
def test_body_must_be_an_object(body):
    with pytest.raises(InvalidRequest):
        parse_chat(body)


def test_prompt_forms():
    assert completion(prompt="x").text == "x"
    assert completion(prompt=["x"]).text == "x"
    assert completion(prompt=[1, 2]).token_ids == (1, 2)
    assert completion(prompt=[[1, 2]]).token_ids == (1, 2)
    for bad in (["a", "b"], [[1], [2]], [], [True], [-1], [1, "a"], [2**40], None, {"a": 1}, [[]]):
        with pytest.raises(InvalidRequest) as caught:
            completion(prompt=bad)
        assert caught.value.param == "prompt"


def test_content_parts_are_joined_and_developer_is_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts, "name": None}])
    assert (request.messages[0].role, request.messages[0].content) == ("system", "ab")


def test_stream_options_need_stream():
    with pytest.raises(InvalidRequest) as caught:
        chat(stream_options={"include_usage": True})
    assert caught.value.param == "stream_options"


def test_both_limits_must_agree():
    assert chat(max_completion_tokens=7).max_tokens == 7
    assert chat(max_completion_tokens=7, max_tokens=7).max_tokens == 7
    with pytest.raises(InvalidRequest):
        chat(max_completion_tokens=7, max_tokens=8)


def test_prices_are_exact_nanocredits():
    request = chat(provider={"max_price": {"input": 0.1, "output": "0.3"}, "ignore": ["n"]})
    assert request.preferences.max_input_nano_per_mtok == 100_000_000
    assert request.preferences.max_output_nano_per_mtok == 300_000_000
    assert request.preferences.ignore == ("n",)


NAMES = [
    "model", "messages", "prompt", "max_tokens", "temperature", "top_k", "stop", "seed", "stream",
    "stream_options", "logit_bias", "n", "provider", "stop_token_ids", "user",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), JSON, max_size=8), st.booleans()
)
def test_any_json_is_parsed_or_refused_clearly(body, is_chat):
    merged = {**(CHAT if is_chat else TEXT), **body}
    try:
        request = (parse_chat if is_chat else parse_completion)(merged)
    except InvalidRequest as error:
        assert error.http_status == 400
        assert len(str(error)) < 500
    else:
        assert request.model
        assert request.max_tokens is None or request.max_tokens > 0


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_schema", {"type": "object"})),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            ("json_schema", SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ("json_schema", SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", ["a", "b"])),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", {"type": "object"})),
    ],
)
def test_structured_output_becomes_the_source_of_a_grammar(body, grammar):
    source = chat(**body).grammar_source
    assert (parse_source(source) if source else None) == grammar


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a" * 40_000}}, "structured_outputs.regex"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
    ],
)
def test_bad_structured_output_is_refused_by_name(body, param):
    with pytest.raises(InvalidRequest) as caught:
        chat(**body)
    assert caught.value.param == param
