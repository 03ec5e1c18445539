"""Write the data card of a selection (README.md, as the Hugging Face hub reads it) from its counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

BAR = 40
"""Width of the histogram's longest bar, in characters."""

VERIFIER_OF_TYPE = {
    "lab": "lab", "chain_sums": "chain_sums", "code_tasks": "code", "reasoning_gym": "reasoning_gym",
}  # fmt: skip
"""Verifier of the problems that come from a generator, by ``data.type``."""


def card_text(card: Mapping[str, Any]) -> str:
    """Return the ``README.md`` of a selection from its ``card.json``."""
    chosen = card["select"]
    splits = "".join(
        f"      - {{split: {name}, path: {name}.jsonl}}\n" for name, n in card["out"].items() if n
    )
    rows = [
        ("problems in", card["in"]),
        (
            f"too easy (Avg@{chosen['samples']} ≥ {chosen['max_solve_rate']:g})",
            card["filters"]["too easy"],
        ),
        (
            f"badly formatted (under {chosen['min_format_rate']:.0%} of the rollouts could be parsed)",
            card["filters"]["badly formatted"],
        ),
        (_critic_filter(chosen["critic_test"]), card["filters"]["critic fails"]),
        ("selected", card["kept"]),
        *((f"of these in {name}", count) for name, count in card["out"].items()),
        ("selected and in no split", card["kept"] - sum(card["out"].values())),
    ]
    read = [(f"source: {name}", count) for name, count in card["reading"].items()]
    table = "\n".join(f"| {name} | {count:,} |" for name, count in [*read, *rows])
    return f"""---
configs:
  - config_name: default
    data_files:
{splits}---

# Problems selected by selfteach

Made with `selfteach select` from `{json.dumps(card["source"])}`.

| | problems |
|---|---|
{table}

- Policy: `{card["solver"]}`, {chosen["samples"]} rollouts per problem ({card["answers"]:,} in all),
  seed {chosen["seed"]}.
- Critic: {_critic(card)}.
- Splits by a hash of the question and seed {chosen["split"]["seed"]}; no question is in two.

`card.json` holds the same and every setting. Each row has `id`, `question`, `answer`, the references of
its source, and `meta`, with the policy's rates under `meta.selection`.

## Problems by number of correct rollouts, of {chosen["samples"]}

```
{_histogram(card["by_right_answers"])}
```

## Training on it

```toml
{_section(card)}
```
"""


def _critic_filter(test: str) -> str:
    if test == "solution":
        return "the critic's own solution is not correct"
    return "no critique ends in the correct answer"


def _critic(card: Mapping[str, Any]) -> str:
    critic = card["critic"]
    if critic is None:
        return "not used"
    name = critic.get("model") or critic.get("path")
    label = f"{critic['type']} `{name}`" if name else f"{critic['type']}"
    if card["select"]["critic_test"] == "solution":
        return f"{label}, asked to solve each question that passed the other filters"
    return (
        f"{label}, given {card['critiques']:,} incorrect rollouts, at most "
        f"{card['select']['critic_answers']} per problem"
    )


def _histogram(counts: list[int]) -> str:
    longest = max(counts) or 1
    bars = ("#" * round(count / longest * BAR) for count in counts)
    rows = zip(range(len(counts)), counts, bars, strict=True)
    return "\n".join(
        f"{correct:>3} correct {count:>8,} {bar}".rstrip() for correct, count, bar in rows
    )


def _section(card: Mapping[str, Any]) -> str:
    """Return the sections of a recipe that trains on the selection, run from its folder."""
    source = card["source"]
    lines = ["[data]", 'type = "files"']
    lines += [f'{name} = "{name}.jsonl"' for name, count in card["out"].items() if count]
    settings = {"verifier": source.get("verifier", VERIFIER_OF_TYPE.get(source["type"]))}
    settings |= {key: source.get(key) for key in ("steps", "answer_in", "world")}
    lines += [f"{key} = {_inline(value)}" for key, value in settings.items() if value]
    if environment := card.get("environment"):  # none in a card of an earlier version
        lines += ["", "[environment]"]
        lines += [f"{key} = {_inline(value)}" for key, value in environment.items()]
    return "\n".join(lines)


def _inline(value: Any) -> str:
    """Return a value of a recipe on one line of TOML; a part without options by its name."""
    if isinstance(value, Mapping) and not value.get("options", True):
        value = value["type"]
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{name} = {_inline(inner)}" for name, inner in value.items()) + " }"
        )
    return json.dumps(value, ensure_ascii=False)
