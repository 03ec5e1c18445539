"""The dispatcher of a fleet: who gets a request, and what it remembers of members."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from selfteach.runtime.dispatcher import Dispatcher, member_metrics, prefix_blocks


def fleet(size: int, capacity: int = 64) -> Dispatcher:
    return Dispatcher([f"member {i}" for i in range(size)], capacity, clock=lambda: 0.0)


def test_prompts_share_as_many_blocks_as_they_have_in_common() -> None:
    long, other = prefix_blocks("a" * 10 + "b", 4), prefix_blocks("a" * 8 + "cc", 4)
    assert len(long) == 3 and long[:2] == other[:2] and long[2] != other[2]
    assert prefix_blocks((1, 2, 3), 2)[0] == prefix_blocks((1, 2), 2)[0]
    assert prefix_blocks("", 4) == ()


def test_a_request_goes_to_the_least_loaded_member() -> None:
    requests = fleet(3)
    assert [requests.assign() for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    requests.finish(1, 1.0)
    assert requests.assign() == 1


def test_a_member_with_the_prompt_is_preferred_unless_it_is_much_busier() -> None:
    requests = fleet(2)
    group, other = prefix_blocks("question one", 4), prefix_blocks("another text", 4)
    assert requests.assign(group) == 0
    assert requests.assign(group) == 0  # the other one has none in flight
    assert requests.assign(other) == 1
    assert [requests.assign(group) for _ in range(12)].count(1) > 0
    requests.forget_prefixes()
    least = requests.assign(group)
    assert least == 1


def test_the_beginning_that_all_members_have_decides_nothing() -> None:
    requests = fleet(2)
    first, second = prefix_blocks("rules rules one", 6), prefix_blocks("rules rules two", 6)
    requests.assign(first), requests.assign((), {0})
    requests.finish(0, 1.0), requests.finish(1, 1.0)
    requests.assign(first, {0})
    assert requests.assign(second) == 0


def test_slow_members_get_fewer_requests() -> None:
    requests = fleet(2)
    for member, seconds in ((0, 1.0), (1, 10.0)):
        assert requests.assign((), {1 - member}) == member
        requests.finish(member, seconds)
    counts = Counter(requests.assign() for _ in range(33))
    assert counts == {0: 30, 1: 3}


def test_a_member_gets_no_more_than_it_may_have() -> None:
    requests = fleet(2, capacity=1)
    assert [requests.assign() for _ in range(3)] == [0, 1, None]
    assert requests.assign((), {0}, hedge=True) == 1
    assert requests.take_out(0, "down") and not requests.take_out(0, "still down")
    requests.finish(0, 1.0, failed=True)
    assert requests.assign() is None and requests.out == {0: "down"}
    requests.put_back(0)
    assert requests.assign() == 0


def test_members_to_avoid_are_used_where_there_is_no_other() -> None:
    requests = fleet(2)
    assert requests.assign((), {0}) == 1
    requests.take_out(1, "down")
    assert requests.assign((), {0}, hedge=True) is None
    assert requests.assign((), {0}) == 0
    requests.take_out(0, "down")
    assert requests.assign() is None and not requests.any_available


def test_a_busy_member_rests() -> None:
    now = [0.0]
    requests = Dispatcher(["a", "b"], 4, clock=lambda: now[0])
    requests.rest(0, 5.0)
    requests.rest(0, 1.0)
    assert requests.assign() == 1 and requests.assign() == 1
    now[0] = 5.0
    assert requests.assign() == 0


def test_counts_are_read_once() -> None:
    requests = fleet(2)
    for seconds, failed in ((1.0, False), (2.0, True)):
        requests.assign((), {1})
        requests.finish(0, seconds, failed=failed)
    metrics = member_metrics("critic_member", requests.read_counts())
    assert metrics == {
        "critic_member/0/requests": 2, "critic_member/0/seconds": 3.0,
        "critic_member/0/failures": 1, "critic_member/1/requests": 0,
        "critic_member/1/seconds": 0.0, "critic_member/1/failures": 0,
    }  # fmt: skip
    assert requests.read_counts()[0].requests == 0


def test_only_replies_make_up_the_median() -> None:
    requests = fleet(1)
    for seconds in (1.0, 2.0, 3.0, 4.0):
        requests.assign()
        requests.finish(0, seconds)
    for outcome in ({"failed": True}, {"unused": True}):
        requests.assign()
        requests.finish(0, 99.0, **outcome)
    assert requests.median_seconds is None
    requests.assign()
    requests.finish(0, 5.0)
    assert requests.median_seconds == 3.0


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["assign", "finish", "fail", "take out", "put back"]),
        st.integers(0, 3),
        st.text("ab", max_size=6),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 4), capacity=st.integers(1, 3), actions=ACTIONS)
def test_no_member_has_more_than_its_share_and_none_that_is_out_gets_a_request(
    size: int, capacity: int, actions: list[tuple[str, int, str]]
) -> None:
    requests, in_flight, out = fleet(size, capacity), Counter[int](), set[int]()
    for action, number, prompt in actions:
        member = number % size
        if action == "assign":
            chosen = requests.assign(prefix_blocks(prompt, 2))
            free = [i for i in range(size) if i not in out and in_flight[i] < capacity]
            assert (chosen in free) if free else (chosen is None)
            if chosen is not None:
                in_flight[chosen] += 1
        elif action in ("finish", "fail") and in_flight[member]:
            requests.finish(member, 1.0, failed=action == "fail")
            in_flight[member] -= 1
        elif action == "take out":
            requests.take_out(member, "down")
            out.add(member)
        elif action == "put back":
            requests.put_back(member)
            out.discard(member)
        assert requests.out.keys() == out
