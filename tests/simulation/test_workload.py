"""The demo's mix of requests, its ports and its run directory."""

from __future__ import annotations

import socket

import pytest

from trueweight.protos.errors import InvalidRequest, Unavailable
from trueweight.router.openai_requests import parse_chat, parse_completion
from trueweight.simulation.ports import FIRST, LAST, is_free, pick_ports
from trueweight.simulation.run_directory import MARKER, fresh_directory, link_or_copy
from trueweight.simulation.workload import make_plans


def test_the_mix_is_reproducible_and_covers_what_it_says():
    plans = make_plans(60, ["alice", "bob"], "m", seed=1)
    assert plans == make_plans(60, ["alice", "bob"], "m", seed=1)
    assert plans != make_plans(60, ["alice", "bob"], "m", seed=2)
    assert {p.kind for p in plans} == {
        "chat",
        "completion",
        "chat, streamed",
        "completion, streamed",
    }
    assert {p.client for p in plans} == {"alice", "bob"}
    assert sum("stop" in p.parameters for p in plans) == 12
    assert 20 <= sum("seed" in p.parameters for p in plans) <= 55
    assert any(p.parameters.get("temperature") == 0 for p in plans)
    assert any("extra_body" in p.parameters for p in plans)
    # Enough tokens to convict a third of the traffic if it cheats.
    assert sum(p.parameters["max_tokens"] for p in plans) > 60 * 120


def test_more_requests_go_on_where_the_first_ended():
    more = make_plans(5, ["alice"], "m", seed=1, first_number=61)
    assert [p.number for p in more] == [61, 62, 63, 64, 65]


def test_the_router_takes_every_planned_request():
    for plan in make_plans(200, ["alice"], "m", seed=3):
        body = {k: v for k, v in plan.parameters.items() if k != "extra_body"}
        body |= plan.parameters.get("extra_body", {})
        body["stream"] = plan.stream
        parsed = parse_chat(body) if plan.is_chat else parse_completion(body)
        assert parsed.stream == plan.stream


def test_picked_ports_are_free_distinct_and_outside_the_kernels_own_range():
    ports = pick_ports(20)
    assert len(set(ports)) == 20
    assert all(FIRST <= port <= LAST and is_free(port) for port in ports)


def test_a_taken_port_is_not_picked():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        with pytest.raises(Unavailable):
            pick_ports(1, lambda _first, _last: port)


def test_only_a_run_directory_is_emptied(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("precious")
    with pytest.raises(InvalidRequest):
        fresh_directory(mine)
    assert (mine / "file").read_text() == "precious"
    run = fresh_directory(tmp_path / "run")
    (run / "old").write_text("")
    assert sorted(p.name for p in fresh_directory(run).iterdir()) == [MARKER]


def test_links_lead_to_the_file_itself(tmp_path):
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "link").symlink_to("blob")
    link_or_copy(str(tmp_path / "link"), str(tmp_path / "out"))
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").samefile(tmp_path / "blob")
