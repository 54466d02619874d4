"""Trees against the recursive definition, published vectors, and forged proofs."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.protos.checkpoint import (
    LogState,
    format_note,
    key_hash,
    log_origin,
    open_note,
    sign_note,
    verifier_key,
)
from trueweight.protos.errors import BadSignature, InvalidRequest, TrueweightError
from trueweight.protos.identity import public_bytes
from trueweight.protos.merkle import (
    EMPTY_ROOT,
    CompactRange,
    consistency_path,
    fetch_from,
    inclusion_path,
    leaf_hash,
    range_at,
    root,
    root_at,
    verify_consistency,
    verify_inclusion,
)

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

LEAVES = [leaf_hash(bytes([i])) for i in range(70)]
FETCH = fetch_from(LEAVES)


def tree_hash(leaves):
    """RFC 6962, section 2.1, word by word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + tree_hash(leaves[:k]) + tree_hash(leaves[k:])).digest()


def split_of(leaves):
    """The largest power of two below their number, on both sides of which RFC 6962 divides."""
    return 1 << (len(leaves) - 1).bit_length() - 1


def audit_path(m, leaves):
    """PATH(m, D[n]) of RFC 6962, section 2.1.1, word by word."""
    if len(leaves) == 1:
        return []
    k = split_of(leaves)
    if m < k:
        return [*audit_path(m, leaves[:k]), tree_hash(leaves[k:])]
    return [*audit_path(m - k, leaves[k:]), tree_hash(leaves[:k])]


def subproof(m, leaves, known=True):
    """SUBPROOF(m, D[n], b) of RFC 6962, section 2.1.2, word by word; PROOF(m, D[n]) by default."""
    if m == len(leaves):
        return [] if known else [tree_hash(leaves)]
    k = split_of(leaves)
    if m <= k:
        return [*subproof(m, leaves[:k], known), tree_hash(leaves[k:])]
    return [*subproof(m - k, leaves[k:], False), tree_hash(leaves[:k])]


# Roots of the first 1, 2, 3, ... 8 leaves in Certificate Transparency's merkletree tests
# (google/certificate-transparency, cpp/merkletree/merkle_tree_test.cc).
PUBLISHED = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
TEXTS = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657"]
TEXTS.append("606162636465666768696a6b6c6d6e6f")


KNOWN = [leaf_hash(bytes.fromhex(text)) for text in TEXTS]
# The same file's known answers: (index from 0, size, path). It counts leaves from 1; its path of no
# leaf in an empty tree is an error here, see below.
PUBLISHED_PATHS = [
    (0, 1, []),
    (
        0,
        8,
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        5,
        8,
        [
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (2, 3, ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
    (
        1,
        5,
        [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
]
# The same file's consistency proofs: (old size, new size, path).
PUBLISHED_PROOFS = [
    (1, 1, []),
    (
        1,
        8,
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        6,
        8,
        [
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (
        2,
        5,
        [
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
]


def hexes(path):
    return [node.hex() for node in path]


def test_published_roots():
    assert [root(KNOWN[:n]).hex() for n in range(1, 9)] == PUBLISHED
    assert [tree_hash(KNOWN[:n]).hex() for n in range(1, 9)] == PUBLISHED


def test_the_published_empty_root():
    assert EMPTY == hashlib.sha256(b"").hexdigest() == EMPTY_ROOT.hex()
    assert (
        root([]).hex() == CompactRange().root().hex() == root_at(0, fetch_from([])).hex() == EMPTY
    )


@pytest.mark.parametrize(("index", "size", "path"), PUBLISHED_PATHS)
def test_published_inclusion_proofs(index, size, path):
    assert hexes(inclusion_path(index, size, fetch_from(KNOWN[:size]))) == path
    assert hexes(inclusion_path(index, size, fetch_from(KNOWN))) == path, "in a log that grew since"
    assert hexes(audit_path(index, KNOWN[:size])) == path
    proof, top = [bytes.fromhex(node) for node in path], bytes.fromhex(PUBLISHED[size - 1])
    verify_inclusion(KNOWN[index], index, size, proof, top)
    # What the reference implementation's verifier must refuse of each.
    empty = bytes.fromhex(EMPTY)
    for leaf, place, many in [
        *((KNOWN[index], other, size) for other in (index - 1, index + 1, index ^ 2)),
        (KNOWN[index], index, size * 2),
        (leaf_hash(b"WrongLeaf"), index, size),
    ]:
        with pytest.raises(BadSignature):
            verify_inclusion(leaf, place, many, proof, top)
    wrong = [[*proof, b""], [*proof, top], [b"", *proof], [top, *proof]]
    wrong += [proof[:-1]] if proof else []
    wrong += [[*proof[:at], empty, *proof[at + 1 :]] for at in range(len(proof))]
    for forged, claimed in [(proof, empty), *((each, top) for each in wrong)]:
        with pytest.raises(BadSignature):
            verify_inclusion(KNOWN[index], index, size, forged, claimed)


@pytest.mark.parametrize(("old", "new", "path"), PUBLISHED_PROOFS)
def test_published_consistency_proofs(old, new, path):
    assert hexes(consistency_path(old, new, fetch_from(KNOWN[:new]))) == path
    assert hexes(consistency_path(old, new, fetch_from(KNOWN))) == path, "in a log that grew since"
    assert hexes(subproof(old, KNOWN[:new])) == path
    proof = [bytes.fromhex(node) for node in path]
    first, last = (bytes.fromhex(PUBLISHED[size - 1]) for size in (old, new))
    verify_consistency(old, first, new, last, proof)
    if not proof:
        return
    # What the reference implementation's verifier must refuse of each.
    empty = bytes.fromhex(EMPTY)
    for earlier, later in [(old - 1, new), (old + 1, new), (old ^ 2, new), (old, new * 2)]:
        with pytest.raises(BadSignature):
            verify_consistency(earlier, first, later, last, proof)
    for one, other in [(first, empty), (empty, last), (last, first)]:
        with pytest.raises(BadSignature):
            verify_consistency(old, one, new, other, proof)
    wrong = [[], [*proof, b""], [*proof, proof[-1]], proof[:-1], [b"", *proof], [proof[0], *proof]]
    wrong += [[*proof[:at], empty, *proof[at + 1 :]] for at in range(len(proof))]
    for forged in wrong:
        with pytest.raises(BadSignature):
            verify_consistency(old, first, new, last, forged)


def test_the_example_of_the_rfc_itself():
    """RFC 6962, section 2.1.3: a tree of seven leaves, its nodes by the letters of the figure."""
    leaves = LEAVES[:7]
    a, b, c, d, e, f, j = leaves
    g, h, i = (tree_hash(pair) for pair in ([a, b], [c, d], [e, f]))
    k, whole = tree_hash(leaves[:4]), tree_hash(leaves)
    right = tree_hash(leaves[4:])  # "l" in the figure
    paths = {0: [b, h, right], 3: [c, g, right], 4: [f, j, k], 6: [i, k]}
    for index, path in paths.items():
        assert inclusion_path(index, 7, FETCH) == path == audit_path(index, leaves)
        verify_inclusion(leaves[index], index, 7, path, whole)
    for old, path in {3: [c, d, g, right], 4: [right], 6: [i, j, k]}.items():
        assert consistency_path(old, 7, FETCH) == path == subproof(old, leaves)
        verify_consistency(old, tree_hash(leaves[:old]), 7, whole, path)


def test_every_size_index_and_proof_up_to_seventy():
    for size in range(1, 71):
        wanted = tree_hash(LEAVES[:size])
        assert root(LEAVES[:size]) == root_at(size, FETCH) == wanted
        for index in range(size):
            path = inclusion_path(index, size, FETCH)
            assert path == audit_path(index, LEAVES[:size])
            verify_inclusion(LEAVES[index], index, size, path, wanted)
        for old in range(1, size + 1):
            path = consistency_path(old, size, FETCH)
            assert path == subproof(old, LEAVES[:size])
            verify_consistency(old, tree_hash(LEAVES[:old]), size, wanted, path)


def test_a_restart_continues_the_same_tree():
    tree = range_at(37, FETCH)
    for leaf in LEAVES[37:]:
        tree, _ = tree.append(leaf)
    assert tree.root() == tree_hash(LEAVES)


def test_appending_says_which_nodes_to_store_and_no_more():
    tree, stored = CompactRange(), {}
    for leaf in LEAVES:
        tree, new = tree.append(leaf)
        for node in new:
            assert (node.level, node.index) not in stored
            stored[node.level, node.index] = node.hash
    for (level, index), value in stored.items():
        assert value == tree_hash(LEAVES[index << level : (index + 1) << level])


@settings(max_examples=200)
@given(st.data())
def test_no_forged_inclusion_passes(data):
    size = data.draw(st.integers(1, 70))
    index = data.draw(st.integers(0, size - 1))
    path = inclusion_path(index, size, FETCH)
    wanted = tree_hash(LEAVES[:size])
    kind = data.draw(st.sampled_from(["leaf", "index", "size", "flip", "cut", "grow", "root"]))
    leaf, place, many, forged, top = LEAVES[index], index, size, list(path), wanted
    if kind == "leaf":
        leaf = leaf_hash(b"forged")
    elif kind == "index":
        place = data.draw(st.integers(-1, 80).filter(lambda i: i != index))
    elif kind == "size":
        # Another size with the same path shape cannot be told apart by the path alone, so the
        # signed checkpoint fixes (size, root) together; here the root is that of the other size.
        many = data.draw(st.integers(0, 70).filter(lambda n: n != size))
        top = tree_hash(LEAVES[:many])
    elif kind == "flip" and path:
        at = data.draw(st.integers(0, len(path) - 1))
        forged[at] = leaf_hash(forged[at])
    elif kind == "cut" and path:
        forged.pop(data.draw(st.integers(0, len(path) - 1)))
    elif kind == "grow":
        forged.insert(data.draw(st.integers(0, len(path))), leaf_hash(b"more"))
    else:
        top = leaf_hash(b"other root")
    with pytest.raises(BadSignature):
        verify_inclusion(leaf, place, many, forged, top)


@settings(max_examples=200)
@given(st.data())
def test_no_rewritten_history_passes(data):
    """The log changes an old leaf and shows a consistency proof anyway."""
    new_size = data.draw(st.integers(2, 70))
    old_size = data.draw(st.integers(1, new_size))
    victim = data.draw(st.integers(0, old_size - 1))
    rewritten = list(LEAVES[:new_size])
    rewritten[victim] = leaf_hash(b"rewritten")
    path = consistency_path(old_size, new_size, fetch_from(rewritten))
    old_root, new_root = tree_hash(LEAVES[:old_size]), tree_hash(rewritten)
    with pytest.raises(BadSignature):
        verify_consistency(old_size, old_root, new_size, new_root, path)


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [(0, 5, []), (6, 5, []), (5, 5, [LEAVES[0]]), (3, 5, []), (3, 5, [b"short"]), (4, 8, [])],
)
def test_malformed_consistency_proofs_are_refused(old, new, path):
    with pytest.raises(BadSignature):
        verify_consistency(old, tree_hash(LEAVES[:old]), new, tree_hash(LEAVES[:new]), path)


def test_impossible_proofs_are_not_made():
    for index, size in ((5, 5), (-1, 5), (0, 0)):
        with pytest.raises(InvalidRequest):
            inclusion_path(index, size, FETCH)
    for old, new in ((0, 5), (6, 5)):
        with pytest.raises(InvalidRequest):
            consistency_path(old, new, FETCH)


# --- checkpoints -----------------------------------------------------------------------------

KEY = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
PUBLIC = public_bytes(KEY)
STATE = LogState(log_origin("market"), 42, LEAVES[0], 1_700_000_000_123)


def test_a_checkpoint_round_trips():
    assert open_note(sign_note(STATE, KEY), STATE.origin, PUBLIC) == STATE


def test_the_note_is_the_c2sp_format():
    lines = sign_note(STATE, KEY).split("\n")
    assert lines[0] == "trueweight/market"
    assert lines[1] == "42"
    assert lines[4] == ""
    assert lines[5].startswith("\u2014 trueweight/market ")
    assert lines[6] == ""


def test_the_published_example_key_has_its_published_hash():
    # The example of C2SP signed-note / golang.org/x/mod/sumdb/note: PeterNeumann+c74f20a3+ARpc...
    import base64

    vkey = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    public = base64.b64decode(vkey.split("+", 2)[2])[1:]
    assert key_hash("PeterNeumann", public).hex() == "c74f20a3"
    assert verifier_key("PeterNeumann", public) == vkey


def test_other_signatures_on_a_checkpoint_are_ignored():
    note = sign_note(STATE, KEY)
    witness = "\u2014 witness AAAAAAAA\n"
    assert open_note(note + witness, STATE.origin, PUBLIC) == STATE
    text, _, signatures = note.rpartition("\n\n")
    assert open_note(f"{text}\n\n{witness}{signatures}", STATE.origin, PUBLIC) == STATE


def test_a_tampered_checkpoint_is_refused():
    note = sign_note(STATE, KEY)
    for index in range(len(note)):
        spoilt = note[:index] + chr(ord(note[index]) ^ 1) + note[index + 1 :]
        with pytest.raises(BadSignature):
            open_note(spoilt, STATE.origin, PUBLIC)


def test_a_checkpoint_by_another_key_or_of_another_log_is_refused():
    other = Ed25519PrivateKey.from_private_bytes(b"\x08" * 32)
    with pytest.raises(BadSignature):
        open_note(sign_note(STATE, other), STATE.origin, PUBLIC)
    with pytest.raises(BadSignature):
        open_note(sign_note(STATE, KEY), log_origin("other"), PUBLIC)


@settings(max_examples=300)
@given(st.text(max_size=300))
def test_hostile_notes_raise_our_errors_only(text):
    for note in (text, text + "\n\n\u2014 trueweight/market AAAA\n", f"{text}\n\n{text}\n"):
        with pytest.raises(TrueweightError):
            open_note(note, STATE.origin, PUBLIC)


@settings(max_examples=200)
@given(st.text(max_size=100))
def test_signed_nonsense_is_refused(text):
    """Even the log's own key cannot make the parser crash."""
    import base64

    body = text + "\n"
    try:
        signature = key_hash(STATE.origin, PUBLIC) + KEY.sign(body.encode())
    except UnicodeEncodeError:
        return
    note = f"{body}\n\u2014 {STATE.origin} {base64.b64encode(signature).decode()}\n"
    with pytest.raises(TrueweightError):
        open_note(note, STATE.origin, PUBLIC)


@pytest.mark.parametrize(
    "state",
    [
        LogState("", 1, LEAVES[0], 1),
        LogState("a b", 1, LEAVES[0], 1),
        LogState("a+b", 1, LEAVES[0], 1),
        LogState("a", -1, LEAVES[0], 1),
        LogState("a", 1, b"short", 1),
    ],
)
def test_absurd_states_are_not_signed(state):
    with pytest.raises(InvalidRequest):
        format_note(state)
