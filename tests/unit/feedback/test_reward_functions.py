"""Reward functions of TRL's signature get what TRL gives them, and are checked."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState

from selfteach.config.reward_section import CustomRewardConfig
from selfteach.errors import PartError
from selfteach.feedback.rewards.combined_reward import CombinedReward, VerdictReward
from selfteach.feedback.rewards.reward_function import RewardFunction
from selfteach.feedback.rewards.trl_arguments import columns_of, prompt_of
from selfteach.losses.grpo import Grpo
from selfteach.types import CritiquedRollout, Problem, Rewards, Rollout, TrainingSample, Verdict

TEXTS = {1: "one", 2: "two words", 3: "<think> hm </think> three"}
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2 ?"}]


def completion(ids: Sequence[int]) -> str:
    return " ".join(TEXTS[i] for i in ids)


def rollout(problem: Problem, sample: int, *ids: int) -> Rollout:
    return Rollout(problem, sample, (7,), ids, (-1.0,) * len(ids), "text", True, 0)


def problem(id_: str, prompt: Any, **columns: Any) -> Problem:
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return Problem(id_, question, "4", columns={"prompt": prompt, **columns})


def group(*problems: Problem) -> list[Rollout]:
    return [rollout(p, n, *ids) for p in problems for n, ids in enumerate(((1,), (2, 1), (3,)))]


def function(call: Callable[..., Any], name: str = "f", weight: float = 1.0) -> RewardFunction:
    return RewardFunction(call, f"reward m:{name}", name, weight)


def combined(*sources: Any, success: float | None = None) -> CombinedReward:
    state = TrainerState(global_step=5, max_steps=9)
    return CombinedReward(sources, success, completion, lambda update: state)


def judged(rollouts: Sequence[Rollout], correct: bool = False) -> list[tuple[Rollout, Verdict]]:
    return [(r, Verdict.of_final(correct, "4")) for r in rollouts]


def totals(verdicts: Sequence[Verdict]) -> list[float | None]:
    return [verdict.reward for verdict in verdicts]


# -- functions as people have them for TRL ---------------------------------------------------------


def by_length(completions: Any, **kwargs: Any) -> list[float]:
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def by_prompt(
    prompts: Any, completions: Any, completion_ids: Any, level: Any, **kwargs: Any
) -> Any:
    steps = kwargs["trainer_state"].global_step
    kwargs["log_metric"]("level", sum(level))
    return [
        len(str(p)) + len(ids) * x + steps if x < 3 else None
        for p, ids, x in zip(prompts, completion_ids, level, strict=True)
    ]


async def slowly(completions: Any, answer: Any, **kwargs: Any) -> list[float | None]:
    await asyncio.sleep(0.01)
    return [0.5 if "three" in str(c) else None for c in completions]


class Scorer:
    """An object whose call is async, as TRL accepts it too."""

    async def __call__(
        self, completion_ids: Any, scale: float = 1.0, **kwargs: Any
    ) -> torch.Tensor:
        await asyncio.sleep(0)
        return torch.tensor([scale * sum(ids) for ids in completion_ids])


FUNCTIONS: list[tuple[Callable[..., Any], float]] = [
    (by_length, 0.25), (by_prompt, 1.0), (slowly, -2.0), (functools.partial(Scorer(), scale=0.1), 3.0),
]  # fmt: skip
PROBLEMS = {
    "texts": [
        problem("a", "1 + 1 ?", level=1, answer="2"),
        problem("b", "2 + 2 ?", level=4, answer="4"),
    ],
    "chats": [problem("a", CHAT, level=2, answer="4"), problem("b", CHAT[1:], level=3, answer="4")],
}


def trl_rewards(monkeypatch: pytest.MonkeyPatch, rollouts: Sequence[Rollout]) -> torch.Tensor:
    """Return what TRL's own code computes for the same rows and completions, [rollouts, functions]."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    monkeypatch.setattr(grpo_trainer, "profiling_context", lambda *_: nullcontext())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), state=TrainerState(global_step=5, max_steps=9),
        reward_funcs=[call for call, _ in FUNCTIONS], reward_processing_classes=[None] * len(FUNCTIONS),
        reward_func_names=[str(i) for i in range(len(FUNCTIONS))], environments=None, async_loop=loop,
        _log_completion_extra=lambda *_: None, _log_metric=lambda *_: None,
    )  # fmt: skip
    inputs = [dict(r.problem.columns) for r in rollouts]
    prompts = [row["prompt"] for row in inputs]
    texts = [completion(r.token_ids) for r in rollouts]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    calculate = grpo_trainer.GRPOTrainer._calculate_rewards.__wrapped__
    try:
        return calculate(
            trainer, inputs, prompts, completions, [list(r.token_ids) for r in rollouts]
        )
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_same_functions_give_the_numbers_that_trl_gets(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = group(*PROBLEMS[kind])
    expected = trl_rewards(monkeypatch, rollouts)
    sources = [function(call, str(i), weight) for i, (call, weight) in enumerate(FUNCTIONS)]
    verdicts = combined(*sources)(judged(rollouts))
    ours = [
        [
            float("nan") if v.rewards.values[str(i)] is None else v.rewards.values[str(i)]
            for i in range(4)
        ]
        for v in verdicts
        if v.rewards is not None
    ]
    assert torch.tensor(ours).isnan().any() and not torch.tensor(ours).isnan().all()
    torch.testing.assert_close(torch.tensor(ours), expected, equal_nan=True)
    weights = torch.tensor([weight for _, weight in FUNCTIONS])
    torch.testing.assert_close(torch.tensor(totals(verdicts)), (expected * weights).nansum(1))


def test_a_recipe_can_name_the_rewards_that_trl_ships() -> None:
    pytest.importorskip("trl.rewards", reason="TRL is not installed")
    names = ["accuracy_reward", "think_format_reward"]
    configs = [CustomRewardConfig.model_validate({"type": f"trl.rewards:{name}"}) for name in names]
    chat = problem("a", CHAT, solution=r"\boxed{4}")
    texts = {1: r"so \boxed{4}", 2: "<think>\nhm\n</think>\n" + r"\boxed{5}", 3: "none"}
    rollouts = [rollout(chat, n, n + 1) for n in range(3)]
    reward = CombinedReward(
        [RewardFunction.build(config) for config in configs], None,
        lambda ids: texts[ids[0]], lambda update: TrainerState(),
    )  # fmt: skip
    verdicts = reward(judged(rollouts))
    values = [dict(v.rewards.values) for v in verdicts if v.rewards is not None]
    assert [value["accuracy_reward"] for value in values] == [1.0, 0.0, 0.0]
    assert [value["think_format_reward"] for value in values] == [0.0, 1.0, 0.0]


def test_weights_and_functions_that_do_not_apply_by_hand() -> None:
    rollouts = group(PROBLEMS["texts"][0])
    sources = [
        function(lambda completions, **_: [1.0, None, None], "a", 2.0),
        function(lambda completions, **_: [0.5, 0.25, None], "b", -1.0),
    ]
    verdicts = combined(*sources)(judged(rollouts))
    assert totals(verdicts) == [1.5, -0.25, None]
    assert verdicts[1].rewards == Rewards(-0.25, {"a": None, "b": 0.25})


def test_success_is_the_total_at_or_above_the_threshold() -> None:
    rollouts = group(PROBLEMS["texts"][0])
    values = function(lambda completions, **_: [0.5, 0.49, None])
    verdicts = combined(values, success=0.5)(judged(rollouts, correct=True))
    assert [v.correct for v in verdicts] == [True, False, False]
    assert verdicts[0].feedback is None and verdicts[0].parsed == "4"
    assert verdicts[1].feedback == "The answer's reward is 0.49; a good one has at least 0.5."
    untouched = combined(values)(judged(rollouts, correct=True))
    assert [v.correct for v in untouched] == [True] * 3


def test_the_verdict_is_a_reward_too() -> None:
    rollouts = group(PROBLEMS["texts"][0])
    reward = combined(VerdictReward("verifier", 3.0))
    assert totals(reward(judged(rollouts, correct=True))) == [3.0] * 3


def test_advantages_leave_out_what_has_no_reward() -> None:
    """By hand: 1, 0.5 and 0 have the mean 0.5 and the deviation 0.5; TRL's epsilon is 1e-4."""
    p = Problem("p", "q", "a")
    samples = [
        TrainingSample(
            CritiquedRollout(rollout(p, n, 1), Verdict(False, True, None, rewards=r), None)
        )
        for n, r in enumerate(Rewards(x, {}) for x in (1.0, 0.5, None, 0.0))
    ]
    advantages = Grpo(1.0).advantages(samples)
    assert advantages == pytest.approx([0.5 / 0.5001, 0.0, 0.0, -0.5 / 0.5001])


def test_columns_are_those_of_the_rows_and_the_gold_answer() -> None:
    a, b = problem("a", "1 ?", level=1, completion="x"), problem("b", "2 ?", extra=[1])
    assert columns_of([a, b]) == {"answer": ["4", "4"], "level": [1, None], "extra": [None, [1]]}
    made = Problem("m", "q", "a", {"reference": "r"}, {"terms": 3})
    assert columns_of([made]) == {"id": ["m"], "answer": ["a"], "reference": ["r"], "terms": [3]}
    with_history = Problem("h", "and now?", "a", history=(("user", "hi"), ("assistant", "ho")))
    assert prompt_of(with_history) == [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "and now?"},
    ]  # fmt: skip
    assert prompt_of(made) == "q"


def test_a_function_gets_the_arguments_that_it_names() -> None:
    def narrow(completions: list[str], level: list[int]) -> list[float]:
        return [float(x) for x in level]

    rollouts = group(*PROBLEMS["texts"])
    assert totals(combined(function(narrow))(judged(rollouts))) == [1.0] * 3 + [4.0] * 3
    # An option keeps its value where a column has its name.
    bound = functools.partial(narrow, level=[9] * 6)
    assert totals(combined(function(bound))(judged(rollouts))) == [9.0] * 6


def test_columns_are_found_missing_in_one_line() -> None:
    def wants(completions: Any, solution: Any, **_: Any) -> list[float]:
        return [1.0 for _ in solution]

    message = "takes 'solution', and the problems have no such column: they have answer, level"
    with pytest.raises(PartError, match=message):
        combined(function(wants))(judged(group(PROBLEMS["texts"][0])))


async def _raises(**_: Any) -> list[float]:
    raise KeyError("quota")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda completions, **_: [1.0], "returned 1 rewards for 3 completions: return one for each"),
        (lambda completions, **_: 3.0, "returned a float and not a list of rewards"),
        (lambda completions, **_: None, "returned None and not a list of rewards"),
        (lambda completions, **_: "abc", "returned a str and not a list of rewards"),
        (lambda completions, **_: [1, 2, float("inf")], "returned 'inf' for sample 2 of problem 'a'"),
        (lambda completions, **_: [1, 2, "3"], "returned '3' for sample 2 of problem 'a'"),
        (lambda completions, **_: [1, 2, torch.ones(2)], "for sample 2 of problem 'a'"),
        (lambda completions, **_: _raises(), "define it with async def"),
        (lambda completions, log_metric, **_: log_metric("x", float("nan")), "log a finite number"),
        (lambda completions, log_extra, **_: log_extra("x", [1]), "got 1 values for 3 completions"),
        (_raises, "its call with 3 completions raised KeyError: 'quota'"),
    ],
)  # fmt: skip
def test_what_is_no_reward_is_refused_in_one_line(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(PartError) as error:
        combined(function(call))(judged(group(PROBLEMS["texts"][0])))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("reward m:f: ")


def test_async_functions_run_at_the_same_time() -> None:
    """Each waits for the other, so that one after the other would never end."""
    events: Mapping[str, asyncio.Event] = {"a": asyncio.Event(), "b": asyncio.Event()}

    def waits(name: str, other: str) -> Callable[..., Any]:
        async def call(completions: Any, **_: Any) -> list[float]:
            events[name].set()
            await asyncio.wait_for(events[other].wait(), 10)
            return [1.0] * len(completions)

        return call

    reward = combined(function(waits("a", "b"), "a"), function(waits("b", "a"), "b"))
    assert totals(reward(judged(group(PROBLEMS["texts"][0])))) == [2.0] * 3


def test_synchronous_functions_run_in_the_calling_thread() -> None:
    seen = []

    def call(completions: Any, **_: Any) -> list[bool]:
        seen.append(threading.current_thread())
        return [True] * len(completions)

    reward = combined(function(call))
    assert totals(reward(judged(group(PROBLEMS["texts"][0])))) == [1.0] * 3
    assert seen == [threading.current_thread()] and reward.in_main_thread
    assert not combined(function(_raises)).in_main_thread
