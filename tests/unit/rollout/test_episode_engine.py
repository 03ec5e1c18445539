"""Episodes: turns, replies, limits and failures, over a scripted engine and over a real model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from model_families import byte_level, with_tools
from scripted_environment import ScriptedEnvironment, ScriptedTurns, Step, hang
from transformers import LlamaConfig, LlamaForCausalLM

from selfteach.episodes import EnvironmentReply, Turn
from selfteach.errors import EngineError
from selfteach.models.plain_pass import plain_logits
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.rollout.episode_engine import EpisodeEngine, EpisodeLimits
from selfteach.rollout.episode_states import EpisodeStates
from selfteach.rollout.journaled_engine import SamplingInterrupted
from selfteach.rollout.prompt_request import PromptRequest
from selfteach.rollout.transformers_engine import TransformersEngine
from selfteach.tasks.environments.tool_environment import ToolEnvironment
from selfteach.types import Problem, Rollout, Sampling, Verdict

TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}
ONE_ARGUMENT = {
    "type": "function",
    "function": {
        "name": "calculator",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer"}},
            "required": ["x"],
        },
    },
}
P, R = Problem("p", "What is 6 * 7?", "42"), Problem("r", "What is 1 + 1?", "2")
SAMPLING = Sampling(1, 1.0, 200, 3)
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"x": 1}}\n</tool_call>'
FOUR = EnvironmentReply(("4",))


def renderer() -> Renderer:
    return Renderer(with_tools("qwen3"), Templates("lab"), tools=[TOOL])


def run(
    turns: Sequence[str],
    steps: Sequence[Step],
    limits: EpisodeLimits | None = None,
    *,
    max_length: int = 10_000,
    sampling: Sampling = SAMPLING,
    **settings: object,
) -> tuple[Rollout, ScriptedTurns, ScriptedEnvironment]:
    made: list[ScriptedEnvironment] = []

    def make() -> ScriptedEnvironment:
        made.append(ScriptedEnvironment(steps, tools=[TOOL], **settings))  # type: ignore[arg-type]
        return made[-1]

    engine = ScriptedTurns(renderer(), {("p", 0): turns}, max_length=max_length)
    episodes = EpisodeEngine(engine, renderer(), make, limits or EpisodeLimits())
    (rollout,) = episodes.generate([P], sampling)
    return rollout, engine, made[-1]


def events(rollout: Rollout) -> list[str]:
    return [segment.event or "turn" for segment in rollout.segments]


def test_an_episode_by_hand() -> None:
    rollout, engine, environment = run([CALL, "It is 4."], [FOUR])
    here = renderer()
    first, second = here.encode_answer(CALL), here.encode_answer("It is 4.")
    reply = here.reply(["4"], "tool")
    assert rollout.token_ids == (*first, *reply, *second)
    assert rollout.logps == (-0.25,) * len(first) + (0.0,) * len(reply) + (-0.25,) * len(second)
    assert events(rollout) == ["turn", "tool_result", "turn"]
    assert rollout.text == f"{CALL}\n\n[tool result] 4\n\nIt is 4." and rollout.finished
    assert rollout.answer_text == "It is 4." and rollout.length == len(first) + len(second)
    assert [rollout.text[slice(*span)] for span in rollout.turn_spans] == [CALL, "It is 4."]
    assert environment.turns[0].calls[0].arguments == {"x": 1}
    assert environment.turns[1] == Turn("It is 4.")
    requests = [request for batch in engine.requests for request in batch]
    assert requests == [
        PromptRequest(P, rollout.prompt_ids, (0,), 0),
        PromptRequest(P, (*rollout.prompt_ids, *first, *reply), (0,), 1),
    ]


@pytest.mark.parametrize(
    ("steps", "limits", "expected", "finished"),
    [
        ([FOUR] * 3, {"max_turns": 2}, [*["turn", "tool_result"] * 2, "budget"], False),
        ([ValueError("no\nsuch tool")], {}, ["turn", "failed"], False),
        ([lambda _: None], {}, ["turn", "failed"], False),
        ([lambda _: EnvironmentReply("4")], {}, ["turn", "failed"], False),  # type: ignore[arg-type]
        ([lambda _: EnvironmentReply(())], {}, ["turn", "failed"], False),
        ([lambda _: EnvironmentReply(("4",), "budget")], {}, ["turn", "failed"], False),
        ([lambda _: exec("raise SystemExit")], {}, ["turn", "failed"], False),
        ([hang], {"deadline_s": 0.05}, ["turn", "timeout"], False),
        ([EnvironmentReply(("won",), "observation", done=True)], {}, ["turn", "observation"], True),
        ([EnvironmentReply((), done=True)], {}, ["turn"], True),
        (
            [EnvironmentReply(("no",), "tool_error"), FOUR], {},
            ["turn", "tool_error", "turn", "tool_result", "turn"], True,
        ),
    ],
)  # fmt: skip
def test_an_episode_ends_as_a_typed_event(
    steps: list[Step], limits: dict[str, float], expected: list[str], finished: bool
) -> None:
    settings = EpisodeLimits(**limits)  # type: ignore[arg-type]
    rollout, _, _ = run([CALL, CALL, "4"], steps, settings)
    assert (events(rollout), rollout.finished) == (expected, finished)
    if rollout.segments[-1].event in ("failed", "budget", "timeout"):
        assert rollout.answer_text == "", "the last turn waited for a reply"
        assert "\n" not in rollout.segments[-1].text
    assert rollout.model_mask[-1], "what no turn follows is in no token"


def test_a_malformed_call_is_replied_to_and_the_episode_goes_on() -> None:
    """A small model's code fence is no call and no answer; the reply says how a call is written."""
    wrong = f"```json\n{CALL.splitlines()[1]}\n```"
    rollout, engine = run_with_tools([wrong, CALL, "It is 42."])
    assert events(rollout) == ["turn", "malformed_call", "turn", "tool_result", "turn"]
    error = rollout.segments[1]
    assert error.text == (
        "Error: calculator was not called: the call is not in its form; a call is written "
        '<tool_call> {"name": "calculator", "arguments": {"x": "…"}} </tool_call>'
    )
    shown = renderer().shown(rollout.token_ids[error.start : error.stop])
    assert shown.count("<tool_response>") == 1 and error.text in shown
    assert rollout.finished and rollout.answer_text == "It is 42." and len(engine.requests) == 3
    assert f"[malformed call] {error.text}" in rollout.text
    plain, _ = run_with_tools(['```json\n{"answer": 42}\n```'])
    assert events(plain) == ["turn"] and plain.finished


class Doubling(ToolEnvironment):
    tools = (ONE_ARGUMENT,)

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return str(2 * arguments["x"])


def run_with_tools(turns: Sequence[str]) -> tuple[Rollout, ScriptedTurns]:
    here = Renderer(with_tools("qwen3"), Templates("lab"), tools=[ONE_ARGUMENT])
    engine = ScriptedTurns(here, {("p", 0): turns})
    (rollout,) = EpisodeEngine(engine, here, Doubling, EpisodeLimits()).generate([P], SAMPLING)
    return rollout, engine


def test_a_turn_that_is_cut_ends_its_episode() -> None:
    rollout, _, environment = run([CALL], [FOUR], sampling=Sampling(1, 1.0, 5, 3))
    assert events(rollout) == ["turn", "truncated"] and not rollout.finished
    assert environment.turns == [] and rollout.length == 5
    assert rollout.answer_text == rollout.turns[0].text


def test_an_episode_ends_where_no_room_is_left() -> None:
    whole, _, _ = run([CALL, "4"], [FOUR])
    second = whole.turns[1].start + len(whole.prompt_ids)
    rollout, _, _ = run([CALL, "4"], [FOUR], max_length=second)
    assert events(rollout) == ["turn", "tool_result", "budget"] and not rollout.finished
    assert rollout.length == len(rollout.token_ids)
    fits, _, _ = run([CALL, "4"], [FOUR], max_length=second + 1)
    assert events(fits) == events(whole)
    with pytest.raises(EngineError, match="leaves no room for a turn"):
        run([CALL], [], max_length=len(whole.prompt_ids))


def test_a_long_reply_is_shortened_and_says_so() -> None:
    long = EnvironmentReply(("a" * 500 + "b" * 500,))
    rollout, _, _ = run([CALL, "4"], [long], EpisodeLimits(max_reply_chars=100))
    text = rollout.segments[1].text
    assert text == "a" * 50 + "\n[900 characters are left out here]\n" + "b" * 50


@pytest.mark.parametrize("observation", [RuntimeError("down"), 7])
def test_an_environment_that_cannot_begin_loses_no_run(observation: object) -> None:
    broken = ScriptedEnvironment([FOUR], tools=[TOOL], observation=observation)
    made = iter([ScriptedEnvironment(tools=[TOOL]), broken, ScriptedEnvironment(tools=[TOOL])])
    engine = ScriptedTurns(renderer(), {("p", n): ["4"] for n in range(2)})
    episodes = EpisodeEngine(engine, renderer(), lambda: next(made), EpisodeLimits(threads=1))
    rollout, other = episodes.generate([P], Sampling(2, 1.0, 200, 3))
    assert events(rollout) == ["turn", "failed"] and broken.turns == [] and broken.closed == 1
    assert rollout.verdict is not None and other.finished
    assert (rollout.verdict.correct, rollout.verdict.reward) == (False, None), "no advantage"


def test_an_environment_that_cannot_be_made_or_hangs_then_is_an_event_too() -> None:
    made = 0

    def make() -> ScriptedEnvironment:
        nonlocal made
        made += 1
        if made == 2:
            raise OSError("no\nserver")
        if made == 3:
            time.sleep(5)
        return ScriptedEnvironment([], tools=[TOOL])

    engine = ScriptedTurns(renderer(), {("p", n): ["4"] for n in range(3)})
    episodes = EpisodeEngine(engine, renderer(), make, EpisodeLimits(deadline_s=0.2))
    rollouts = episodes.generate([P], Sampling(3, 1.0, 200, 3))
    assert sorted(events(rollout)[-1] for rollout in rollouts) == ["failed", "timeout", "turn"]


def test_what_no_file_takes_is_replaced() -> None:
    rollout, _, _ = run([CALL, "4"], [EnvironmentReply(("a\ud800b",))], observation="\udfff")
    assert rollout.segments[1].text == "a?b" and rollout.observation == "?"


def test_a_verdict_that_raises_is_an_event_and_no_success() -> None:
    class Broken(ScriptedEnvironment):
        def verdict(self) -> Verdict | None:
            raise KeyError("score")

    engine = ScriptedTurns(renderer(), {("p", 0): ["4"]})
    episodes = EpisodeEngine(engine, renderer(), lambda: Broken(tools=[TOOL]), EpisodeLimits())
    (rollout,) = episodes.generate([P], SAMPLING)
    assert events(rollout) == ["turn", "failed"] and rollout.verdict is not None
    assert rollout.verdict.reward is None and not rollout.finished


def test_the_first_observation_is_in_both_prompts() -> None:
    rollout, _, _ = run(["4"], [], observation="The door is shut.")
    here = renderer()
    shown = here.shown(rollout.prompt_ids)
    assert f"{P.question}\n\nThe door is shut.<|im_end|>" in shown
    assert rollout.problem == P and rollout.observation == "The door is shut."


def test_an_environment_s_verdict_is_the_rollout_s() -> None:
    verdict = Verdict(True, True, None, None)
    rollout, _, _ = run(["4"], [], verdict=verdict)
    assert rollout.verdict is verdict


def test_many_episodes_reply_side_by_side() -> None:
    """One that hangs costs its deadline, once, and the others nothing."""

    def slow(turn: Turn) -> EnvironmentReply:
        time.sleep(0.05)
        return EnvironmentReply(("ok",))

    made = 0

    def make() -> ScriptedEnvironment:
        nonlocal made
        made += 1
        return ScriptedEnvironment([hang if made == 3 else slow], tools=[TOOL])

    turns = {("p", n): [CALL, "4"] for n in range(16)}
    engine = ScriptedTurns(renderer(), turns)
    episodes = EpisodeEngine(engine, renderer(), make, EpisodeLimits(deadline_s=0.5))
    began = time.monotonic()
    rollouts = episodes.generate([P], Sampling(16, 1.0, 200, 3))
    assert time.monotonic() - began < 5
    ended = [events(rollout)[-1] for rollout in rollouts]
    assert ended.count("timeout") == 1 and ended.count("turn") == 15
    samples = [[len(request.samples) for request in batch] for batch in engine.requests]
    assert samples == [[16], [15]], "what several share is one request"


def test_an_engine_that_fails_saves_the_complete_groups() -> None:
    class Failing(ScriptedTurns):
        def complete(self, requests: Sequence[PromptRequest], sampling: Sampling) -> list[Rollout]:
            if requests[0].turn == 1:
                raise SamplingInterrupted("down; 0 of 1 are saved", [], bare="down")
            return super().complete(requests, sampling)

    turns = {("p", 0): ["42"], ("p", 1): ["41"], ("r", 0): ["2"], ("r", 1): [CALL]}
    verdict = Verdict(True, True, "x")

    def make() -> ScriptedEnvironment:
        return ScriptedEnvironment([only_calls] * 2, tools=[TOOL], verdict=verdict)

    episodes = EpisodeEngine(Failing(renderer(), turns), renderer(), make, EpisodeLimits())
    with pytest.raises(SamplingInterrupted, match=r"down \(2 of 4 episodes") as failure:
        episodes.generate([P, R], Sampling(2, 1.0, 200, 3))
    assert [rollout.key for rollout in failure.value.received] == [("p", 0), ("p", 1)]
    assert all(rollout.verdict is verdict for rollout in failure.value.received)


def only_calls(turn: Turn) -> EnvironmentReply:
    return FOUR if turn.calls else EnvironmentReply((), done=True)


def test_a_template_that_rewrites_history_is_refused_before_anything_is_sampled() -> None:
    thinking = Renderer(with_tools("qwen3"), Templates("lab"))
    engine = ScriptedTurns(thinking, {})
    with pytest.raises(EngineError, match="rewrites earlier turns"):
        EpisodeEngine(engine, thinking, ScriptedEnvironment, EpisodeLimits())
    EpisodeEngine(engine, thinking, ScriptedEnvironment, EpisodeLimits(max_turns=1))


@pytest.fixture(scope="module")
def real() -> Callable[[], EpisodeEngine]:
    """Return what makes an engine of a random model, whose environment counts the turns."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = byte_level(chat_template=template)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=400,
        initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    ends = range(1, 60)  # many ids end a turn, so that turns are short
    plain = Renderer(tokenizer, Templates("lab"))

    def make() -> EpisodeEngine:
        engine = TransformersEngine(model, plain, end_ids=ends, pad_id=0, max_length=400)

        def counting() -> ScriptedEnvironment:
            return ScriptedEnvironment(
                [EnvironmentReply((f"go on {n}",), "observation") for n in range(3)]
            )

        return EpisodeEngine(engine, plain, counting, EpisodeLimits(max_turns=4))

    return make


def test_an_episode_is_the_same_alone_and_beside_others(real: Callable[[], EpisodeEngine]) -> None:
    sampling = Sampling(4, 1.0, 40, 5)
    together = real().generate([P, R], sampling)
    assert any(len(one.turns) > 1 for one in together)
    alone = [one for p in (P, R) for one in real().generate([p], sampling)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.segments for one in together] == [one.segments for one in alone]
    other = real().generate([P], Sampling(4, 1.0, 40, 6))
    assert [one.token_ids for one in other] != [one.token_ids for one in together[:4]]


def test_sampled_log_probabilities_are_those_of_one_plain_pass(
    real: Callable[[], EpisodeEngine],
) -> None:
    engine = real()
    for rollout in engine.generate([P, R], Sampling(3, 1.0, 40, 5)):
        ids = [*rollout.prompt_ids, *rollout.token_ids]
        causal = engine._engine._causal  # type: ignore[attr-defined]
        logp_TV = plain_logits(causal, ids[:-1]).double().log_softmax(-1)
        start = len(rollout.prompt_ids) - 1
        for i in rollout.model_positions:
            expected = logp_TV[start + i, rollout.token_ids[i]].item()
            assert rollout.logps[i] == pytest.approx(expected, abs=1e-5)


def test_no_token_of_an_episode_is_run_twice(
    real: Callable[[], EpisodeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens_run(sampling: Sampling) -> tuple[int, list[Rollout]]:
        engine, counts = real(), []
        causal = engine._engine._causal  # type: ignore[attr-defined]
        hook = causal.get_input_embeddings().register_forward_hook(
            lambda _module, inputs, _output: counts.append(inputs[0].numel())
        )
        rollouts = engine.generate([P], sampling)
        hook.remove()
        return sum(counts), rollouts

    sampling = Sampling(1, 1.0, 40, 5)
    count, (rollout,) = tokens_run(sampling)
    assert len(rollout.turns) > 2
    assert count == len(rollout.prompt_ids) + len(rollout.token_ids) - 1
    # Where the states take too much memory all of them are run again, with the same result.
    monkeypatch.setattr(EpisodeStates.__init__, "__defaults__", (0,))
    more, (again,) = tokens_run(sampling)
    assert more > 2 * count and again.token_ids == rollout.token_ids
    assert again.logps == pytest.approx(rollout.logps, abs=1e-5)
