"""Who stops and frees a node, against the obvious definition."""

from hypothesis import given
from hypothesis import strategies as st

from trueweight.protos.suspension import Suspensions

WHO = st.sampled_from(["", "a", "b", "c"])
STEPS = st.lists(st.tuples(st.sampled_from(["suspend", "lift", "convict"]), WHO), max_size=30)


def test_attack_one_verifier_of_several_stops_or_frees_a_node():
    node = Suspensions(2)
    for _ in range(3):
        node.suspend("a")
    assert not node.stopped
    node.suspend("b")
    assert node.stopped
    for _ in range(3):
        node.lift("a")
    assert node.stopped
    node.lift("c")
    assert not node.stopped


def test_a_voice_that_changes_its_mind_does_not_count_on():
    node = Suspensions(2)
    node.suspend("a")
    node.lift("a")
    node.suspend("b")
    assert not node.stopped
    node.suspend("a")
    node.lift("a")
    node.suspend("a")
    node.lift("b")
    assert node.stopped


def test_attack_lifting_frees_nobody_who_is_convicted():
    node = Suspensions(2)
    node.convict("a")
    assert not node.stopped
    node.convict("b")
    for who in ("", "a", "b"):
        node.lift(who)
    assert node.stopped
    node.reinstate()
    assert not node.stopped
    node.convict("a")
    assert not node.stopped, "what was said before counts no more"


@given(STEPS)
def test_with_one_verifier_the_last_word_counts_unless_it_convicts(steps):
    node, stopped, convicted = Suspensions(1), False, False
    for step, who in steps:
        if step == "convict" and not who:
            continue
        getattr(node, step)(who)
        convicted = convicted or step == "convict"
        stopped = step == "suspend" if step != "convict" else stopped
        assert node.stopped == (stopped or convicted)


@given(STEPS)
def test_with_two_needed_one_verifier_alone_changes_nothing(steps):
    node = Suspensions(2)
    for step, _ in steps:
        getattr(node, step)("a")
        assert not node.stopped
    node.suspend()
    for step, _ in steps:
        getattr(node, step)("a")
        assert node.stopped
