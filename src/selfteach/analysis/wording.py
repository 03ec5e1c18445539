"""Numbers and comparisons of results.json in words, the same in the report and on the terminal.

The shapes (all rates in percent, lengths in tokens):

    Estimate   {"mean": 35.8, "ci95": [31.2, 40.1]}
    Setting    {"arms": {name: Arm}, "paired": {"b-a": {"avg": Estimate, ...}}, "seeds": [0, 1]}
    Results    a Setting with "title", "k", "headline", "variants": {name: Setting}, "made"

A pair ``b-a`` is b minus a, problem by problem and seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Estimate = Mapping[str, Any]
Setting = Mapping[str, Any]
Results = Mapping[str, Any]

MEASURES = {
    "avg": "Avg@{k}, %",
    "pass": "Pass@{k}, %",
    "maj": "Maj@{k}, %",
    "length": "length, tokens",
    "truncated": "truncated, %",
    "format": "well formed, %",
}
"""Column titles of an arm's measures, in order."""

BUDGET = {
    "rollouts_sampled": "answers",
    "tokens_sampled": "tokens sampled",
    "tokens_trained": "tokens trained",
    "teacher_tokens": "teacher tokens",
    "critiques": "critiques",
    "critic_requests": "critic requests",
    "critic_cached": "of these reused",
    "critic_prompt_tokens": "critic tokens read",
    "critic_completion_tokens": "critic tokens written",
    "critic_cost": "critic cost",
    "optimizer_steps": "updates",
    "evaluation_rollouts": "evaluation answers",
    "seconds": "seconds",
}
"""Column titles of an arm's budget, in order."""


def budgets(results: Results) -> dict[str, Mapping[str, Any]]:
    """Each arm's budget as the results have it."""
    return {name: arm["budget"] for name, arm in results["arms"].items()}


def budget_columns(budgets: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Columns in which some arm has spent anything, with their titles."""
    return {k: v for k, v in BUDGET.items() if any(own.get(k) for own in budgets.values())}


def measure(name: str, k: int) -> str:
    """A measure's column title."""
    return MEASURES[name].format(k=k)


def estimate(value: Estimate) -> str:
    """A mean with its interval: ``35.8 [31.2, 40.1]``."""
    low, high = value["ci95"]
    return f"{value['mean']:.1f} [{low:.1f}, {high:.1f}]"


def difference(value: Estimate) -> str:
    """A difference with its interval: ``+16.1 [11.9, 20.2]``."""
    low, high = value["ci95"]
    return f"{value['mean']:+.1f} [{low:.1f}, {high:.1f}]"


def count(value: float | int) -> str:
    """A count, rounded: ``12,345``."""
    return f"{value:,.0f}"


def arms_of(pair: str) -> tuple[str, str]:
    """The arms (b, a) of a pair ``b-a``."""
    b, _, a = pair.partition("-")
    return b, a


def pair_title(pair: str) -> str:
    """A pair as the subtraction that it is: ``step_aligned - grpo``."""
    return " - ".join(arms_of(pair))


def standing(value: Estimate) -> Literal["higher", "lower", "open"]:
    """What the interval supports of a difference; ``open`` where it includes 0."""
    low, high = value["ci95"]
    return "higher" if low > 0 else "lower" if high < 0 else "open"


def verdict(pair: str, value: Estimate) -> str:
    """Whether the interval supports the difference of a pair, in a few plain words."""
    b = arms_of(pair)[0]
    return {
        "higher": f"supported: {b} is higher",
        "lower": f"supported: {b} is lower",
        "open": "not supported: includes 0",
    }[standing(value)]


def order(value: Estimate, main: Estimate) -> str:
    """How a variant's difference compares with the main setting's.

    ``REVERSED`` and ``same order`` are said only where both intervals exclude 0.
    """
    flipped = value["mean"] * main["mean"] < 0
    if "open" not in (standing(value), standing(main)):
        return "REVERSED" if flipped else "same order"
    decided = "undecided" if standing(value) == "open" else "decided here only"
    return f"{decided}, mean reversed" if flipped else decided


def headline(results: Results) -> list[str]:
    """The pairs to speak of first: those the study names, else all without the base, else all."""
    named = [pair for pair in results["headline"] if pair in results["paired"]]
    without_base = [pair for pair in results["paired"] if arms_of(pair)[1] != "base"]
    return named or without_base or list(results["paired"])


def pairs(results: Results, setting: Setting) -> list[str]:
    """A setting's pairs, the headline's first."""
    first = [pair for pair in headline(results) if pair in setting["paired"]]
    return [*first, *(pair for pair in setting["paired"] if pair not in first)]


def settings(results: Results) -> list[tuple[str, Setting]]:
    """The main setting and the variants, each with the title to print."""
    variants = results.get("variants", {})
    return [("main", results), *((v["title"] or name, v) for name, v in variants.items())]


def compared(results: Results) -> list[str]:
    """The measures that every pair of the main setting compares."""
    return [m for m in MEASURES if all(m in pair for pair in results["paired"].values())]


def claims(results: Results, gains: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """What the numbers say, in a sentence each, and whether the intervals support it.

    The headline's pairs, and where nothing is paired what each arm's training changed
    (`comparison.gain`).
    """
    said = [_comparison(results, pair) for pair in headline(results)]
    alone = {} if said else gains
    return [*said, *(_gain(name, own) for name, own in alone.items() if own is not None)]


def pair_lines(results: Results) -> list[str]:
    """Each pair with its difference in Avg@k."""
    pairs = results["paired"].items()
    return [f"{pair_title(pair)} {difference(values['avg'])}" for pair, values in pairs]


def curve_lines(results: Results) -> list[str]:
    """Where each arm's learning curve begins and ends, in percent."""
    curves = {name: arm["curve"]["avg"] for name, arm in results["arms"].items() if "curve" in arm}

    def mean(seeds: Mapping[str, list[float]], at: int) -> float:
        return sum(own[at] for own in seeds.values()) / len(seeds)

    return [f"{n} from {mean(own, 0):.1f} to {mean(own, -1):.1f} %" for n, own in curves.items()]


def advantage_lines(example: Mapping[str, Any]) -> list[str]:
    """The range of the tokens' advantages under each context, in nats."""
    return [
        f"{name} from {min(own['advantage']):+.1f} to {max(own['advantage']):+.1f} nats"
        for name, own in example["contexts"].items()
    ]


def _comparison(results: Results, pair: str) -> dict[str, Any]:
    b, a = arms_of(pair)
    value, arms = results["paired"][pair]["avg"], results["arms"]
    low, high = value["ci95"]
    verdicts = {
        "higher": f"The interval excludes 0: the data support that {b} is better than {a}.",
        "lower": f"The interval excludes 0, the other way: {b} is worse than {a}.",
        "open": f"The interval includes 0: the data do not decide between {b} and {a}.",
    }
    return {
        "numbers": f"{b} answers {arms[b]['avg']['mean']:.1f} % of samples right, "
        f"{a} {arms[a]['avg']['mean']:.1f} %: a difference of {value['mean']:+.1f} points "
        f"of Avg@{results['k']} (95 % interval {low:.1f} to {high:.1f}).",
        "verdict": verdicts[standing(value)],
        "decided": standing(value) != "open",
    }


def _gain(name: str, gain: Mapping[str, Any]) -> dict[str, Any]:
    value = gain["difference"]
    low, high = value["ci95"]
    verdicts = {
        "higher": "The interval excludes 0: the data support that training helped on these problems.",
        "lower": "The interval excludes 0, the other way: training did harm on these problems.",
        "open": "The interval includes 0: the data do not decide whether training helped.",
    }
    return {
        "numbers": f"{name} answers {gain['last']:.1f} % of validation samples right after step "
        f"{gain['steps']}, {gain['first']:.1f} % before: a difference of {value['mean']:+.1f} points "
        f"of Avg@{gain['k']} (95 % interval {low:.1f} to {high:.1f}).",
        "verdict": verdicts[standing(value)],
        "decided": standing(value) != "open",
    }
