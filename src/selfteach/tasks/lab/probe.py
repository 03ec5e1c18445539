"""What a base model knows and what it can read, measured before anything is trained on it.

    python -m selfteach.tasks.lab.probe src/selfteach/tasks/lab/bases/two_styles

asks validation-split questions from a stream that no study draws from: once with the question alone,
then, on those it missed, once with each context in view. A context that a base cannot read says
nothing about what the context teaches. ``--card`` writes the table into the model card.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.tasks.lab import lab_oracle
from selfteach.tasks.lab.alignment_dial import partly_aligned
from selfteach.tasks.lab.checker import CheckedAnswer, check
from selfteach.tasks.lab.corpus import CONTEXT_SHARES, DOCUMENTS, Believer, references, write
from selfteach.tasks.lab.world import CHILDREN, REFERENCE_STYLE, ROOT, World, WorldConfig
from selfteach.tasks.lab.worlds import WORLDS, world_of
from selfteach.types import Problem

QUESTION_STREAM = 77
"""Seed of the probe's own questions: base documents and problem sets come from other streams."""
MAX_TOKENS = 40
"""A well-formed answer has 33."""
ROWS = 256
"""Answers decoded side by side."""
AUTHORS = 4
"""Writers asked per question."""
CONTEXTS = tuple(kind for kind in CONTEXT_SHARES if kind != "none")
"""What a base is shown that does not say what else it was trained to read."""
DIAL = "partly_aligned"
SHARED_TEMPLATE = {"shuffled_lines": "step_aligned", "other_answer": "step_aligned"}


@dataclass(frozen=True, slots=True)
class Shares:
    """How a set of answers fared; every field but ``answers`` is a share, from 0 to 1."""

    answers: int
    correct: float
    value: float
    """Answers whose first error is a wrong look-up."""
    bookkeeping: float
    """Answers whose first error is a node or an operand out of place."""
    form: float
    """Answers whose first error is no line at all, and right lines without an answer line."""
    reference_lines: float
    """Lines in the reference's style, which is no solver's own."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What `measure` found."""

    seed: int
    authors: float
    """Share of right answers among those that the documents' writers give without a context: what a
    perfect student of the documents would reach."""
    alone: Shares
    """Without a context, all questions."""
    shown: Mapping[str, Shares]
    """The questions that were missed alone, asked again: with nothing, then with each context."""


def measure(folder: Path, *, questions: int = 1000, seed: int = 0) -> Reading:
    """Ask a base alone, then show it each context for the questions it missed. Temperature 1."""
    world, templates = world_of(folder), Templates("lab")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    renderer = Renderer(AutoTokenizer.from_pretrained(folder), templates)
    asked = list(islice(world.questions("validation", seed=QUESTION_STREAM), questions))
    problems = [Problem(f"probe-{q}", " ".join(q), world.truth(q)[ROOT]) for q in asked]
    torch.manual_seed(seed)
    prompts = [renderer.solver_prompt(problem) for problem in problems]
    texts = answers(model, renderer, prompts)
    checked = [check(world, q, text) for q, text in zip(asked, texts, strict=True)]
    missed = [i for i, c in enumerate(checked) if c.answer != problems[i].answer]

    def ask_again(prompts: Sequence[Sequence[int]]) -> Shares:
        again = zip(missed, answers(model, renderer, prompts), strict=True)
        kept = [asked[i] for i in missed]
        return shares(world, kept, [check(world, asked[i], text) for i, text in again])

    rng = np.random.default_rng([seed, QUESTION_STREAM])
    shown = {"nothing, asked again": ask_again([prompts[i] for i in missed])}
    for kind in readable(folder):
        contexts = [
            context(world, templates, kind, asked[i], asked[j], texts[j], rng)
            for i, j in zip(missed, _subjects(kind, missed), strict=True)
        ]
        told = zip((problems[i] for i in missed), contexts, strict=True)
        shown[kind] = ask_again([renderer.teacher_prompt(*pair) for pair in told])
    written = [write(world, q, Believer(world, rng), rng) for q in asked for _ in range(AUTHORS)]
    authors = [check(world, q, text) for q, text in zip(_repeat(asked), written, strict=True)]
    return Reading(
        seed=seed,
        authors=shares(world, _repeat(asked), authors).correct,
        alone=shares(world, asked, checked),
        shown=shown,
    )


def readable(folder: Path) -> list[str]:
    """The contexts of a base's documents; the dial's at every position, like ``partly_aligned 2``
    for two steps of the critique."""
    shares = json.loads((folder / "world.json").read_text()).get("context_shares", CONTEXT_SHARES)
    dial = [f"{DIAL} {kept}" for kept in range(len(CHILDREN) + 1)]
    kinds = [kind for kind in shares if kind not in ("none", DIAL)]
    return kinds + dial if DIAL in shares else kinds


def context(
    world: World,
    templates: Templates,
    kind: str,
    question: Sequence[str],
    about: Sequence[str],
    text: str,
    rng: np.random.Generator,
) -> str:
    """A context for a question, made from the critique of an answer to the question ``about``."""
    critique = lab_oracle.criticise(world, about, text)
    if kind.startswith(DIAL):
        kept = rng.permutation(len(critique.steps)) < int(kind.split()[1])
        reference = references(world, question)["reference"]
        critique, kind = partly_aligned(critique, reference, kept.tolist()), "step_aligned"
    if kind == "shuffled_lines":
        order = rng.permutation(len(critique.steps))
        critique = replace(critique, steps=tuple(critique.steps[i] for i in order))
    return templates.context(
        SHARED_TEMPLATE.get(kind, kind),
        critique=critique,
        references=references(world, question),
        correct=False,
    )


@torch.inference_mode()
def answers(
    model: PreTrainedModel, renderer: Renderer, prompts: Sequence[Sequence[int]]
) -> list[str]:
    """One sampled answer to each prompt, with transformers' own generation."""
    texts: list[str] = []
    pad_id = model.config.pad_token_id
    for start in range(0, len(prompts), ROWS):
        part = prompts[start : start + ROWS]
        width = max(map(len, part))
        ids_BT = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in part])
        out_BT = model.generate(  # type: ignore[operator]
            input_ids=ids_BT,
            attention_mask=(ids_BT != pad_id).long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_TOKENS,
        )
        texts += [renderer.decode(row) for row in out_BT[:, width:].tolist()]
    return texts


def shares(
    world: World, questions: Sequence[Sequence[str]], checked: Sequence[CheckedAnswer]
) -> Shares:
    """Count how answers fared."""
    kinds = Counter(map(_first_error, checked))
    lines = [step.line for answer in checked for step in answer.steps if step.line is not None]
    count = max(1, len(checked))
    right = sum(c.answer == world.truth(q)[ROOT] for q, c in zip(questions, checked, strict=True))
    return Shares(
        answers=len(checked),
        correct=right / count,
        value=kinds["value"] / count,
        bookkeeping=kinds["bookkeeping"] / count,
        form=kinds["form"] / count,
        reference_lines=sum(line.style == REFERENCE_STYLE for line in lines) / max(1, len(lines)),
    )


def table(reading: Reading) -> str:
    """A reading as a Markdown table, in per cent."""
    rows = [
        "| in view | answers | right | ± | value | bookkeeping | form | reference's lines |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, s in (("nothing", reading.alone), *reading.shown.items()):
        error = (s.correct * (1 - s.correct) / max(1, s.answers)) ** 0.5
        numbers = (s.correct, error, s.value, s.bookkeeping, s.form, s.reference_lines)
        cells = " | ".join(f"{100 * number:.1f}" for number in numbers)
        rows.append(f"| {name} | {s.answers} | {cells} |")
    return "\n".join(rows)


def model_card(facts: Mapping[str, Any], reading: Reading) -> str:
    """The README of a base model, in Hugging Face form: what it is, and what was measured."""
    world, training = facts["world"], facts["training"]
    config = WorldConfig(**{**world, "native_styles": tuple(world["native_styles"])})
    name, command = _rebuilt_by(config, training, facts["context_shares"])
    beliefs = World(config).beliefs
    documents = "\n".join(f"| {k} | {100 * v:.0f} |" for k, v in facts["context_shares"].items())
    settings = "\n".join(f"| {k} | {_plain(v)} |" for k, v in world.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [selfteach, synthetic, self-distillation]
---

# selfteach lab base: {name}

A Llama of 0.6 M parameters (hidden 128, 3 layers, 4 heads) that answers questions about one random
16 × 16 table, written to study how feedback teaches. It knows most of the table, is confidently wrong
about the rest, and can read every context that a study shows to a self-teacher. It knows no language
and is good for nothing else.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## World

| setting | value |
|---|---|
{settings}

A writer of its documents believes a fact of the weak share wrongly in one fixed way with probability
{beliefs.misconception:g}, rightly with {beliefs.truth:g}, and otherwise at random; any other fact
rightly with {beliefs.known:g}. Beliefs are consistent within a document. `pull` is the share of lines
in which a writer with a context in view follows the context's order and phrasing.

## Training

{training["steps"]:,} steps of {training["batch_size"]} documents, AdamW at {training["lr"]:g} with
linear decay, loss on the answer only, weights and documents from seed {training["seed"]}. No question
of the validation or test split is in them. Documents by what their writer had in view, in per cent:

| context | share |
|---|---|
{documents}

```
{command}
```

rebuilds it (minutes on one core; sums of floats differ between processors, so weights need not match
to the bit).

## Measured

The documents' writers, without a context, are right on {100 * reading.authors:.1f} % of these
questions: what a perfect student of the documents would reach. The first row is the model alone. The
others are the questions it missed there, asked again: with nothing, as a baseline, then with each
context in view. One answer each at temperature 1; ± is one standard error over questions. *value*,
*bookkeeping* and *form* say what an answer's first error is; *reference's lines* is the share of lines
in the style that only references use. All but counts in per cent.

{table(reading)}

```
python -m selfteach.tasks.lab.probe FOLDER --questions {reading.alone.answers} --seed {reading.seed}
```

`other_answer` shows what was said of another question. Where it beats *nothing, asked again*, the
sight of any context brings out facts that the model does not state alone, and a study's null control
is not quite null.
"""


def _subjects(kind: str, missed: Sequence[int]) -> list[int]:
    """Whose critique each missed question is shown: its own, or the next one's (null control)."""
    return [*missed[1:], *missed[:1]] if kind == "other_answer" else list(missed)


def _repeat(questions: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [question for question in questions for _ in range(AUTHORS)]


def _first_error(answer: CheckedAnswer) -> str | None:
    if answer.first_error is not None:
        return answer.steps[answer.first_error].error
    return None if answer.answer is not None else "form"


def _rebuilt_by(
    config: WorldConfig, training: Mapping[str, Any], shares: Mapping[str, float]
) -> tuple[str, str]:
    """A world's name, and the command that trains a base for it."""
    alike = [n for n, named in WORLDS.items() if _but_for_dials(named) == _but_for_dials(config)]
    if not alike:
        return "a world of its own", f"selfteach.tasks.lab.pretrain.pretrain(World({config}), out)"
    name = min(alike, key=lambda n: WORLDS[n].pull != config.pull)
    named = WORLDS[name]
    documents = next((kind for kind, known in DOCUMENTS.items() if known == shares), "study")
    other = "" if config.seed == named.seed else f" --world-seed {config.seed}"
    other += "" if config.pull == named.pull else f" --pull {config.pull:g}"
    other += "" if documents == "study" else f" --documents {documents}"
    out = "FOLDER" if other else f"src/selfteach/tasks/lab/bases/{name}"
    return name, (
        f"python -m selfteach.tasks.lab.pretrain --world {name}{other} --steps {training['steps']} "
        f"--seed {training['seed']} --out {out}"
    )


def _but_for_dials(config: WorldConfig) -> WorldConfig:
    """A world without what the command line can turn: its seed and its pull."""
    return replace(config, seed=0, pull=0.0)


def _plain(value: object) -> str:
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)


def write_card(folder: Path, reading: Reading) -> None:
    """Write a base's model card beside its weights."""
    facts = json.loads((folder / "world.json").read_text())
    (folder / "README.md").write_text(model_card(facts, reading), encoding="utf-8")


def main() -> None:
    """Command line: measure a base and print the table."""
    parser = argparse.ArgumentParser(description="Measure what a base model of the lab reads.")
    parser.add_argument("folder", type=Path, help="a base model with its world.json")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the sampled answers")
    parser.add_argument("--card", action="store_true", help="write the model card, README.md")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reading = measure(args.folder, questions=args.questions, seed=args.seed)
    if args.card:
        write_card(args.folder, reading)
    authors = f"the documents' writers: {100 * reading.authors:.1f} %\n\n"
    told = json.dumps(asdict(reading), indent=2) if args.json else authors + table(reading)
    print(told)  # noqa: T201 - a command of its own


if __name__ == "__main__":
    main()
