"""Write the pool of word problems: those of gsm_symbolic with a worked solution of few words.

python word_problem_pool.py POOL.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from selfteach.config.data_section import GymData
from selfteach.runtime.atomic_files import write_lines
from selfteach.tasks.sources.reasoning_gym import generate

MAX_WORDS = 40
"""Words of the worked solution, so that rollouts have at most about 120 tokens."""
PER_TEMPLATE = 24
DRAWN = 2400
SEED = 29


def main() -> None:
    """Write the pool and print its counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    config = GymData(
        type="reasoning_gym", task="gsm_symbolic", seed=SEED, train=DRAWN, validation=1, test=1
    )
    by_template: dict[int, list[dict[str, Any]]] = {}
    for problem in generate(config)["train"]:
        reference = problem.references["reference"].split("\n####")[0]
        template = problem.meta["reasoning_gym"]["metadata"]["template"]  # type: ignore[index]
        rows = by_template.setdefault(template, [])
        if len(reference.split()) <= MAX_WORDS and len(rows) < PER_TEMPLATE:
            question = problem.question.split(" Give the result as")[0]
            meta = {"template": template}
            rows.append(
                {
                    "id": f"{template}-{len(rows)}",
                    "question": question,
                    "answer": problem.answer,
                    "reference": f"{reference}\nAnswer: {problem.answer}",
                    "meta": meta,
                }
            )
    rows = [row for template in sorted(by_template) for row in by_template[template]]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(out, rows)
    used = sum(map(bool, by_template.values()))
    print(f"{len(rows)} problems of {used} templates in {out}")


if __name__ == "__main__":
    main()
