"""Format the numbers and comparisons of results.json as text, for the report and the terminal.

The shapes (all rates in percent, lengths in tokens):

    Estimate   {"mean": 35.8, "ci95": [31.2, 40.1], "seeds": 2}
    Setting    {"arms": {name: Arm}, "paired": {"b-a": {"avg": Estimate, ...}}, "seeds": [0, 1]}
    Results    a Setting with "title", "k", "headline", "variants": {name: Setting}, "made"

``seeds`` of an estimate is how many training runs (of each arm) it is over. With one, no difference
between arms is decided, whatever its interval: two runs of the same arm differ too. A pair ``b-a`` is
b minus a, problem by problem and seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Estimate = Mapping[str, Any]
Setting = Mapping[str, Any]
Results = Mapping[str, Any]

MEASURE_TITLES = {
    "avg": "Avg@{k}, %",
    "pass": "Pass@{k}, %",
    "maj": "Maj@{k}, %",
    "length": "length, tokens",
    "truncated": "truncated, %",
    "format": "format, %",
}
"""Column titles of `results_table.MEASURES`, in order."""

BUDGET_TITLES = {
    "rollouts_sampled": "rollouts",
    "tokens_sampled": "tokens sampled",
    "tokens_trained": "tokens trained",
    "teacher_tokens": "teacher tokens",
    "critiques": "critiques",
    "critic_requests": "critic requests",
    "critic_cached": "of these cached",
    "critic_prompt_tokens": "critic prompt tokens",
    "critic_completion_tokens": "critic completion tokens",
    "critic_cost": "critic cost",
    "optimizer_steps": "updates",
    "evaluation_rollouts": "evaluation rollouts",
    "seconds": "seconds",
}
"""Column titles of an arm's budget, in order."""


def budgets(results: Results) -> dict[str, Mapping[str, Any]]:
    """Return each arm's budget from the results."""
    return {name: arm["budget"] for name, arm in results["arms"].items()}


def budget_columns(budgets: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the columns in which some arm has spent anything, with their titles."""
    return {k: v for k, v in BUDGET_TITLES.items() if any(b.get(k) for b in budgets.values())}


def measure_title(name: str, k: int) -> str:
    """Return a measure's column title."""
    return MEASURE_TITLES[name].format(k=k)


def estimate(value: Estimate) -> str:
    """Format a mean with its interval: ``35.8 [31.2, 40.1]``."""
    low, high = value["ci95"]
    return f"{value['mean']:.1f} [{low:.1f}, {high:.1f}]"


def difference(value: Estimate) -> str:
    """Format a difference with its interval: ``+16.1 [11.9, 20.2]``."""
    low, high = value["ci95"]
    return f"{value['mean']:+.1f} [{low:.1f}, {high:.1f}]"


def count(value: float | int) -> str:
    """Format a count, rounded: ``12,345``."""
    return f"{value:,.0f}"


def arms_of(pair: str) -> tuple[str, str]:
    """Return the arms (b, a) of a pair ``b-a``."""
    b, _, a = pair.partition("-")
    return b, a


def pair_title(pair: str) -> str:
    """Format a pair as a subtraction: ``step_aligned - grpo``."""
    return " - ".join(arms_of(pair))


ONE_SEED = (
    "One seed: the intervals cover other problems, not other training runs. How much two runs of the "
    "same arm differ cannot be known from one, so no difference is decided."
)
"""What a table of one seed cannot say."""
TWO_SEEDS = (
    "Two seeds: the spread between training runs is known poorly, so intervals of differences are wide "
    "(Student's t with one degree of freedom)."
)
MOST_CLAIMS = 8
"""Comparisons that are stated in a sentence each; of more, only how many are decided."""
Decision = Literal["higher", "lower", "open", "one seed"]


def decision(value: Estimate) -> Decision:
    """Return what the interval supports of a difference.

    ``open`` where it includes 0; ``one seed`` where it is over one training run of each arm.
    """
    if value.get("seeds") == 1:
        return "one seed"
    low, high = value["ci95"]
    return "higher" if low > 0 else "lower" if high < 0 else "open"


def pair_decision(pair: str, value: Estimate) -> str:
    """State in a few words whether the interval supports the difference of a pair."""
    b = arms_of(pair)[0]
    return {
        "higher": f"supported: {b} is higher",
        "lower": f"supported: {b} is lower",
        "open": "not supported: includes 0",
        "one seed": "not decided: one seed",
    }[decision(value)]


def seeds_caveat(seeds: Sequence[int]) -> str | None:
    """Return what so few seeds cannot say; None for three or more."""
    return {1: ONE_SEED, 2: TWO_SEEDS}.get(len(seeds))


def variant_order(value: Estimate, main: Estimate) -> str:
    """State how a variant's difference compares with the main setting's.

    ``REVERSED`` and ``same order`` need both intervals to exclude 0, and two seeds or more in both.
    """
    flipped = value["mean"] * main["mean"] < 0
    here, there = (decision(v) in ("higher", "lower") for v in (value, main))
    if here and there:
        return "REVERSED" if flipped else "same order"
    if decision(value) == "one seed":
        decided = "one seed, undecided"
    else:
        decided = "decided here only" if here else "undecided"
    return f"{decided}, mean reversed" if flipped else decided


def headline_pairs(results: Results) -> list[str]:
    """Return the pairs to show first: those the study names, else all without the base, else all."""
    named = [pair for pair in results["headline"] if pair in results["paired"]]
    without_base = [pair for pair in results["paired"] if arms_of(pair)[1] != "base"]
    return named or without_base or list(results["paired"])


def ordered_pairs(results: Results, setting: Setting) -> list[str]:
    """Return a setting's pairs, the headline's first."""
    first = [pair for pair in headline_pairs(results) if pair in setting["paired"]]
    return [*first, *(pair for pair in setting["paired"] if pair not in first)]


def settings(results: Results) -> list[tuple[str, Setting]]:
    """Return the main setting and the variants, each with its printed title."""
    variants = results.get("variants", {})
    return [("main", results), *((v["title"] or name, v) for name, v in variants.items())]


def compared_measures(results: Results) -> list[str]:
    """Return the measures that every pair of the main setting compares."""
    return [m for m in MEASURE_TITLES if all(m in pair for pair in results["paired"].values())]


def claims(results: Results, gains: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """State what the numbers show, in a sentence each, and whether the intervals support it.

    The headline's pairs; where nothing is paired, what each arm's training changed
    (`run_comparison.training_gain`).
    """
    if (pairs := headline_pairs(results)) and len(pairs) > MOST_CLAIMS:
        return [_many_comparisons(results, pairs)]
    if pairs:
        return [_comparison(results, pair) for pair in pairs]
    return [_gain(name, gain) for name, gain in gains.items() if gain is not None]


def pair_lines(results: Results) -> list[str]:
    """Describe each pair with its difference in Avg@k."""
    pairs = results["paired"].items()
    return [f"{pair_title(pair)} {difference(values['avg'])}" for pair, values in pairs]


def curve_lines(results: Results) -> list[str]:
    """Describe where each arm's learning curve begins and ends, in percent."""
    curves = {name: arm["curve"]["avg"] for name, arm in results["arms"].items() if "curve" in arm}

    def mean(seeds: Mapping[str, list[float]], at: int) -> float:
        return sum(values[at] for values in seeds.values()) / len(seeds)

    return [f"{name} from {mean(c, 0):.1f} to {mean(c, -1):.1f} %" for name, c in curves.items()]


def advantage_lines(example: Mapping[str, Any]) -> list[str]:
    """Describe the range of the tokens' advantages under each context, in nats."""
    return [
        f"{name} from {min(context['advantage']):+.1f} to {max(context['advantage']):+.1f} nats"
        for name, context in example["contexts"].items()
    ]


def _many_comparisons(results: Results, pairs: Sequence[str]) -> dict[str, Any]:
    decided = [p for p in pairs if decision(results["paired"][p]["avg"]) in ("higher", "lower")]
    best = max(results["arms"], key=lambda name: results["arms"][name]["avg"]["mean"])
    return {
        "numbers": f"{len(results['arms'])} rows make {len(pairs)} pairs; {best} has the highest "
        f"Avg@{results['k']}, {results['arms'][best]['avg']['mean']:.1f} %. "
        f"{len(decided)} of the differences have an interval that excludes 0.",
        "conclusion": f"About {0.05 * len(pairs):.0f} of so many would exclude it by chance alone, "
        "and the highest of many rows is a lucky one: compare the few pairs that a question was "
        "asked about.",
        "decided": False,
    }


def _comparison(results: Results, pair: str) -> dict[str, Any]:
    b, a = arms_of(pair)
    value, arms = results["paired"][pair]["avg"], results["arms"]
    low, high = value["ci95"]
    conclusions = {
        "higher": f"The interval excludes 0: the data support that {b} is better than {a}.",
        "lower": f"The interval excludes 0: the data support that {b} is worse than {a}.",
        "open": f"The interval includes 0: the data do not decide between {b} and {a}.",
        "one seed": f"One seed: another run of {b} or {a} may differ by as much, so the data do not "
        "decide between them.",
    }
    return {
        "numbers": f"{b} answers {arms[b]['avg']['mean']:.1f} % of samples right, "
        f"{a} {arms[a]['avg']['mean']:.1f} %: a difference of {value['mean']:+.1f} points "
        f"of Avg@{results['k']} (95 % interval {low:.1f} to {high:.1f}).",
        "conclusion": conclusions[decision(value)],
        "decided": decision(value) in ("higher", "lower"),
    }


def _gain(name: str, gain: Mapping[str, Any]) -> dict[str, Any]:
    value = gain["difference"]
    low, high = value["ci95"]
    conclusions = {
        "higher": "The interval excludes 0: the data support that training helped on these problems.",
        "lower": "The interval excludes 0: the data support that training did harm on these problems.",
        "open": "The interval includes 0: the data do not decide whether training helped.",
        "one seed": "One seed: this run changed by so much on these problems; what another run "
        "would do is not known.",
    }
    return {
        "numbers": f"{name} answers {gain['last']:.1f} % of validation samples right after step "
        f"{gain['steps']}, {gain['first']:.1f} % before: a difference of {value['mean']:+.1f} points "
        f"of Avg@{gain['k']} (95 % interval {low:.1f} to {high:.1f}).",
        "conclusion": conclusions[decision(value)],
        "decided": decision(value) in ("higher", "lower"),
    }
