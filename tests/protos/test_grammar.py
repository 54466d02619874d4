"""Sources of grammars: what is well-formed, what is signed, and what hostile bytes do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueweight.protos.errors import InvalidRequest, UnsupportedParameter
from trueweight.protos.grammar import (
    COMPILER,
    KINDS,
    MAX_DEPTH,
    MAX_SOURCE_BYTES,
    check_grammar,
    digest_of_source,
    parse_source,
    source_of,
    with_grammar,
)
from trueweight.protos.sampling_parameters import Sampling, parameter_class, resolve

PLAIN = Sampling(stop_token_ids=(2,))


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"items": value}
    return value


def test_a_source_is_compact_and_keeps_the_order_of_keys():
    source = source_of("json_schema", {"b": 1, "a": [True]})
    assert source == b'{"json_schema":{"b":1,"a":[true]}}'
    assert parse_source(source) == ("json_schema", {"b": 1, "a": [True]})


def test_a_resolved_request_with_a_grammar_has_its_class_and_checks():
    source = source_of("regex", "a+")
    sampling = resolve(with_grammar(PLAIN, source))
    assert parameter_class(sampling) == "grammar"
    assert sampling.grammar_compiler == COMPILER
    assert Sampling.from_proto(sampling.to_proto()) == sampling
    check_grammar(sampling, source)
    check_grammar(PLAIN, b"")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", []),
        ("json_schema", nested(MAX_DEPTH)),
        ("json_schema", nested(2000)),
        ("json_schema", {"x": 2**70}),
        ("json_schema", {"x": "\ud800"}),
        ("regex", ""),
        ("regex", "a\0"),
        ("regex", 5),
        ("regex", "a" * MAX_SOURCE_BYTES),
        ("choice", []),
        ("choice", ["a", "a"]),
        ("choice", ["a", ""]),
        ("choice", [str(i) for i in range(257)]),
        ("choice", "ab"),
        ("lark", "start: x"),
    ],
)
def test_malformed_grammars_are_refused(kind, value):
    with pytest.raises(InvalidRequest):
        source_of(kind, value)


def test_attack_another_source_than_the_signed_one():
    source, other = source_of("regex", "a+"), source_of("regex", "b+")
    sampling = with_grammar(PLAIN, source)
    for wrong in (other, b"", source + b" "):
        with pytest.raises(InvalidRequest, match="signed"):
            check_grammar(sampling, wrong)
    with pytest.raises(InvalidRequest, match="without"):
        check_grammar(PLAIN, source)
    with pytest.raises(InvalidRequest, match="stop id"):
        check_grammar(replace(sampling, stop_token_ids=()), source)
    with pytest.raises(UnsupportedParameter):
        check_grammar(replace(sampling, grammar_compiler="other-1"), source)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.one_of(st.none(), st.text(max_size=5), st.integers()),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(st.sampled_from([*KINDS, "x"]), inner, max_size=2),
            ),
        ).map(lambda value: repr(value).replace("'", '"').encode()),
    )
)
def test_hostile_sources_are_refused_or_parsed_and_never_crash(source):
    sampling = replace(PLAIN, grammar_sha256=digest_of_source(source), grammar_compiler=COMPILER)
    try:
        check_grammar(sampling, source)
    except InvalidRequest:
        return
    kind, _ = parse_source(source)
    assert kind in KINDS
