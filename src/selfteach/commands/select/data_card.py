"""The data card of a selection, for people and for the Hugging Face hub, from its counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

BAR = 40
"""Characters of the longest bar of the histogram."""

OWN_KIND = {"lab": "lab", "chain_sums": "chain_sums", "reasoning_gym": "reasoning_gym"}
"""The verifier of problems that come from a generator, by ``data.type``."""


def card_text(card: Mapping[str, Any]) -> str:
    """``README.md`` of a selection from its ``card.json``."""
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
            f"badly formatted (under {chosen['min_format_rate']:.0%} of the answers could be read)",
            card["filters"]["badly formatted"],
        ),
        ("the critic does not end in the right answer", card["filters"]["critic fails"]),
        ("kept", card["kept"]),
        *((f"of these in {name}", count) for name, count in card["out"].items()),
        ("kept by the filters and in no split", card["kept"] - sum(card["out"].values())),
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

- Solver: `{card["solver"]}`, {chosen["samples"]} answers to each problem ({card["answers"]:,} in all),
  seed {chosen["seed"]}.
- Critic: {_critic(card)}.
- Splits by a hash of the question and seed {chosen["split"]["seed"]}; no question stands in two.

`card.json` holds the same and every setting. Each row has `id`, `question`, `answer`, the references of
its source, and `meta`, with the solver's figures under `meta.selection`.

## Right answers, of {chosen["samples"]}, to all problems

```
{_histogram(card["by_right_answers"])}
```

## Reading it back

```toml
{_section(card)}
```
"""


def _critic(card: Mapping[str, Any]) -> str:
    critic = card["critic"]
    if critic is None:
        return "not asked"
    name = critic.get("model") or critic.get("path")
    told = f"{critic['type']} `{name}`" if name else f"{critic['type']}"
    return (
        f"{told}, asked about {card['critiques']:,} wrong answers, at most "
        f"{card['select']['critic_answers']} of a problem"
    )


def _histogram(counts: list[int]) -> str:
    longest = max(counts) or 1
    bars = ("#" * round(count / longest * BAR) for count in counts)
    rows = zip(range(len(counts)), counts, bars, strict=True)
    return "\n".join(f"{right:>3} right {count:>8,} {bar}".rstrip() for right, count, bar in rows)


def _section(card: Mapping[str, Any]) -> str:
    """The ``[data]`` of a recipe that trains on the selection, from its own folder."""
    source = card["source"]
    lines = ["[data]", 'type = "files"']
    lines += [f'{name} = "{name}.jsonl"' for name, count in card["out"].items() if count]
    settings = {"verifier": source.get("verifier", OWN_KIND.get(source["type"]))}
    settings |= {key: source.get(key) for key in ("steps", "answer_in", "world")}
    lines += [f'{key} = "{value}"' for key, value in settings.items() if value]
    return "\n".join(lines)
