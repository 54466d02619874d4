"""Incremental text equals the whole text, never half a character, stops at the exact token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from trueweight.router.detokenizer import ByteLevelDecoder, TextStream, WindowDecoder, held_back
from trueweight.router.tokenizer import ModelFiles, ModelTokenizer

TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("é東京🎉👩‍👩‍👧 \n"), max_size=40)


STOPS = st.lists(st.text("ab\n é", min_size=1, max_size=3), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json):
    return ModelTokenizer(ModelFiles(tokenizer_json, None), 4096)


def ids_of(tokenizer, text):
    return tokenizer._plain.encode(text, add_special_tokens=False).ids


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text):
    decoder = tokenizer.decoder()
    assert isinstance(decoder, ByteLevelDecoder)
    pieces = [decoder.push(i) for i in ids_of(tokenizer, text)]
    assert all("\ufffd" not in p for p in pieces if "\ufffd" not in text)
    assert "".join(pieces) + decoder.finish() == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 419), max_size=60))
def test_any_ids_decode_as_the_tokenizer_decodes_them_at_once(tokenizer, ids):
    decoder = tokenizer.decoder()
    text = "".join(decoder.push(i) for i in ids) + decoder.finish()
    assert text == tokenizer.decode(ids)


def test_ids_without_a_token_give_no_text(tokenizer):
    assert tokenizer.decoder().push(10**6) == ""


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_window_decoder_joins_to_the_text(tokenizer, text):
    decoder = WindowDecoder(tokenizer.decode)
    pieces = [decoder.push(i) for i in ids_of(tokenizer, text)]
    assert "".join(pieces) + decoder.finish() == text


def test_window_decoder_keeps_leading_blanks_of_metaspace_and_byte_fallback():
    vocabulary = {"<unk>": 0, "▁hi": 1, "▁there": 2, "!": 3}
    vocabulary |= {f"<0x{b:02X}>": 4 + b for b in range(256)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = ModelTokenizer(ModelFiles(raw.to_str(), None), 4096)
    decoder = tokenizer.decoder()
    assert isinstance(decoder, WindowDecoder)
    ids = [1, 2, *(4 + b for b in "京".encode()), 3, 2]
    pieces = [decoder.push(i) for i in ids]
    assert pieces == ["hi", " there", "", "", "京", "!", " there"]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_window_stays_short_when_tokens_give_no_text(tokenizer):
    decoder = WindowDecoder(tokenizer.decode)
    for _ in range(500):
        decoder.push(1)  # <|eos|>, no text
    assert len(decoder._ids) < 5


@settings(max_examples=200, deadline=None)
@given(TEXTS, STOPS, st.data())
def test_stop_cuts_the_text_at_the_exact_token(tokenizer, text, stops, data):
    ids = ids_of(tokenizer, text)
    stream, shown, at = TextStream(tokenizer.decoder(), stops), "", None
    position = 0
    while position < len(ids) and at is None:
        size = data.draw(st.integers(1, 5))
        piece = stream.push(ids[position : position + size])
        position += size
        shown += piece.text
        at = piece.stopped_at
    shown += stream.finish().text
    found = [text.find(s) for s in stops if s in text]
    if not found:
        assert at is None
        assert shown == text
        return
    assert at is not None
    # k is the least number of tokens whose text contains a stop string.
    assert any(s in tokenizer.decode(ids[:at]) for s in stops)
    assert not any(s in tokenizer.decode(ids[: at - 1]) for s in stops)
    assert text.startswith(shown)
    assert not any(s in shown for s in stops)


def test_stop_across_token_borders_is_found_and_held_back(tokenizer):
    ids = [i for c in "one END two" for i in ids_of(tokenizer, c)]
    stream = TextStream(tokenizer.decoder(), ["END"])
    shown = []
    for index, token_id in enumerate(ids, 1):
        piece = stream.push([token_id])
        shown.append(piece.text)
        if piece.stopped_at is not None:
            assert piece.stopped_at == index == len("one END")
            break
    assert "".join(shown) == "one "


def test_what_only_looked_like_a_stop_is_given_out_at_the_end(tokenizer):
    stream = TextStream(tokenizer.decoder(), ["END"])
    assert stream.push(ids_of(tokenizer, "the EN")).text == "the "
    assert stream.finish().text == "EN"


@settings(deadline=None)
@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_held_back_is_the_longest_beginning_of_a_stop(text, stops):
    expected = max((n for s in stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
    assert held_back(text, stops) == expected
