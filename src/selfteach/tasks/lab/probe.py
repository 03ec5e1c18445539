"""Measures what a base model knows and which contexts it can read, before any training on it.

    python -m selfteach.tasks.lab.probe src/selfteach/tasks/lab/bases/two_styles

samples answers to validation-split questions, from a stream that no study draws from: once with the
question alone, then, to those answered wrongly, once with each context in view. Results with a context
that a base model cannot read say nothing about what the context teaches. ``--card`` writes the table
into the model card.
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
"""Seed of the probe's questions: base documents and problem sets come from other streams."""
MAX_TOKENS = 40
"""A well-formed answer has 33 tokens."""
BATCH_SIZE = 256
"""Rollouts sampled per batch."""
WRITERS_PER_QUESTION = 4
CONTEXTS = tuple(kind for kind in CONTEXT_SHARES if kind != "none")
"""The contexts that a base model is measured with unless its ``world.json`` lists others."""
PARTLY_ALIGNED = "partly_aligned"
RETRY = "nothing, second answer"
"""The baseline of the contexts: a second answer to the missed questions, without a context."""
SHARED_TEMPLATE = {"shuffled_lines": "step_aligned", "other_answer": "step_aligned"}

CARD_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [selfteach, synthetic, self-distillation]
---

# selfteach lab base: {name}

A Llama of 0.6 M parameters (hidden 128, 3 layers, 4 heads) that answers questions about one random
16 × 16 table, made to study how feedback teaches. It knows most of the table, is confidently wrong
about the rest, and can read every context that a study shows to a self-teacher. It knows no natural
language and has no other use.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

"""
"""The beginning of a base model's card."""


@dataclass(frozen=True, slots=True)
class AnswerShares:
    """Holds shares of a set of answers, from 0 to 1, and their number ``answers``."""

    answers: int
    correct: float
    value: float
    """Share of answers whose first error is a wrong look-up."""
    bookkeeping: float
    """Share of answers whose first error is a node or an operand out of place."""
    form: float
    """Share of answers whose first error is a step that does not parse, or that only lack an answer."""
    reference_lines: float
    """Share of lines in the reference's style, which no solver uses."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Holds the result of `measure`."""

    seed: int
    writers: float
    """Share of right answers among those that the documents' writers give without a context: what a
    perfect student of the documents would reach."""
    without_context: AnswerShares
    """Without a context, all questions."""
    by_context: Mapping[str, AnswerShares]
    """Second answers to the questions answered wrongly: without a context, then with each context."""


def measure(folder: Path, *, questions: int = 1000, seed: int = 0) -> ProbeResult:
    """Sample answers without a context, then, to those it missed, with each. Temperature 1."""
    world, templates = world_of(folder), Templates("lab")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    renderer = Renderer(AutoTokenizer.from_pretrained(folder), templates)
    pool = list(islice(world.questions("validation", seed=QUESTION_STREAM), questions))
    problems = [Problem(f"probe-{q}", " ".join(q), world.truth(q)[ROOT]) for q in pool]
    torch.manual_seed(seed)
    prompts = [renderer.solver_prompt(problem) for problem in problems]
    texts = sample_answers(model, renderer, prompts)
    checked = [check(world, q, text) for q, text in zip(pool, texts, strict=True)]
    missed = [i for i, c in enumerate(checked) if c.answer != problems[i].answer]
    retried = [pool[i] for i in missed]

    def retry(prompts: Sequence[Sequence[int]]) -> AnswerShares:
        second = sample_answers(model, renderer, prompts)
        pairs = zip(retried, second, strict=True)
        return shares(world, retried, [check(world, q, text) for q, text in pairs])

    rng = np.random.default_rng([seed, QUESTION_STREAM])
    by_context = {RETRY: retry([prompts[i] for i in missed])}
    for kind in readable_contexts(folder):
        contexts = [
            context(world, templates, kind, pool[i], pool[j], texts[j], rng)
            for i, j in zip(missed, _subjects(kind, missed), strict=True)
        ]
        pairs = zip((problems[i] for i in missed), contexts, strict=True)
        by_context[kind] = retry([renderer.teacher_prompt(*pair) for pair in pairs])
    repeated = [question for question in pool for _ in range(WRITERS_PER_QUESTION)]
    written = [check(world, q, write(world, q, Believer(world, rng), rng)) for q in repeated]
    return ProbeResult(
        seed=seed,
        writers=shares(world, repeated, written).correct,
        without_context=shares(world, pool, checked),
        by_context=by_context,
    )


def readable_contexts(folder: Path) -> list[str]:
    """Return the context kinds of a base model's documents, the dial's once per position.

    ``partly_aligned 2`` shows two steps of the critique.
    """
    shares = json.loads((folder / "world.json").read_text()).get("context_shares", CONTEXT_SHARES)
    dial = [f"{PARTLY_ALIGNED} {steps}" for steps in range(len(CHILDREN) + 1)]
    kinds = [kind for kind in shares if kind not in ("none", PARTLY_ALIGNED)]
    return kinds + dial if PARTLY_ALIGNED in shares else kinds


def context(
    world: World,
    templates: Templates,
    kind: str,
    question: Sequence[str],
    about: Sequence[str],
    text: str,
    rng: np.random.Generator,
) -> str:
    """Render a context for a question, from the critique of an answer to the question ``about``."""
    critique = lab_oracle.critique_rollout(world, about, text)
    if kind.startswith(PARTLY_ALIGNED):
        keep = rng.permutation(len(critique.steps)) < int(kind.split()[1])
        reference = references(world, question)["reference"]
        critique, kind = partly_aligned(critique, reference, keep.tolist()), "step_aligned"
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
def sample_answers(
    model: PreTrainedModel, renderer: Renderer, prompts: Sequence[Sequence[int]]
) -> list[str]:
    """Sample one answer to each prompt, with transformers' ``generate``."""
    texts: list[str] = []
    pad_id = model.config.pad_token_id
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        width = max(map(len, batch))
        ids_BT = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in batch])
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
) -> AnswerShares:
    """Compute the shares of right answers, of first errors by kind, and of reference lines."""
    kinds = Counter(map(_first_error, checked))
    lines = [step.line for answer in checked for step in answer.steps if step.line is not None]
    count = max(1, len(checked))
    right = sum(c.answer == world.truth(q)[ROOT] for q, c in zip(questions, checked, strict=True))
    return AnswerShares(
        answers=len(checked),
        correct=right / count,
        value=kinds["value"] / count,
        bookkeeping=kinds["bookkeeping"] / count,
        form=kinds["form"] / count,
        reference_lines=sum(line.style == REFERENCE_STYLE for line in lines) / max(1, len(lines)),
    )


def table(result: ProbeResult) -> str:
    """Format a result as a Markdown table, in per cent."""
    rows = [
        "| in view | answers | right | ± | value | bookkeeping | form | reference's lines |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, s in (("nothing", result.without_context), *result.by_context.items()):
        error = (s.correct * (1 - s.correct) / max(1, s.answers)) ** 0.5
        numbers = (s.correct, error, s.value, s.bookkeeping, s.form, s.reference_lines)
        cells = " | ".join(f"{100 * number:.1f}" for number in numbers)
        rows.append(f"| {name} | {s.answers} | {cells} |")
    return "\n".join(rows)


def model_card(base: Mapping[str, Any], result: ProbeResult) -> str:
    """Format the README of a base model from its ``world.json`` and the probe's result."""
    world, training = base["world"], base["training"]
    config = WorldConfig(**{**world, "native_styles": tuple(world["native_styles"])})
    name, command = _rebuilt_by(config, training, base["context_shares"])
    return CARD_HEAD.format(name=name) + "\n".join([
        _card_world(world, config),
        _card_training(training, base["context_shares"], command),
        _card_measured(result),
    ])  # fmt: skip


def _card_world(world: Mapping[str, Any], config: WorldConfig) -> str:
    beliefs = World(config).beliefs
    settings = "\n".join(f"| {k} | {_plain(v)} |" for k, v in world.items())
    return f"""## World

| setting | value |
|---|---|
{settings}

A writer of its documents believes, of each weak fact (`weak_share` of the table), one fixed
misconception with probability {beliefs.misconception:g}, the truth with {beliefs.truth:g}, and
otherwise a random value; any other fact is believed rightly with probability {beliefs.known:g}.
Beliefs are consistent within a document. `pull` is the share of lines in which a writer with a context
in view follows the context's order and phrasing.
"""


def _card_training(training: Mapping[str, Any], shares: Mapping[str, float], command: str) -> str:
    documents = "\n".join(f"| {k} | {100 * v:.0f} |" for k, v in shares.items())
    return f"""## Training

{training["steps"]:,} steps of {training["batch_size"]} documents, AdamW at {training["lr"]:g} with
linear decay, loss on the answer only, weights and documents from seed {training["seed"]}. The documents
hold no question of the validation or test split. Documents by context, in per cent:

| context | share |
|---|---|
{documents}

```
{command}
```

rebuilds it (minutes on one core; floating-point sums differ between CPUs, so the weights need not be
bitwise the same).
"""


def _card_measured(result: ProbeResult) -> str:
    questions = result.without_context.answers
    return f"""## Measured

The documents' writers, without a context, are right on {100 * result.writers:.1f} % of these
questions: what a perfect student of the documents would reach. The first row is the model without a
context. The other rows are second answers to the questions it missed there: without a context, as a
baseline, then with each context in view. One answer each at temperature 1; ± is one standard error
over questions. *value*, *bookkeeping* and *form* are the kinds of an answer's first error; *reference's
lines* is the share of lines in the style that only references use. All but counts in per cent.

{table(result)}

```
python -m selfteach.tasks.lab.probe FOLDER --questions {questions} --seed {result.seed}
```

`other_answer` shows the critique of an answer to another question. Where it beats
*{RETRY}*, any context at all brings out facts that the model does not state without one, and
a study's null control is not quite null.
"""


def _subjects(kind: str, missed: Sequence[int]) -> list[int]:
    """Return whose critique each missed question gets: its own, or the next one's (null control)."""
    return [*missed[1:], *missed[:1]] if kind == "other_answer" else list(missed)


def _first_error(answer: CheckedAnswer) -> str | None:
    if answer.first_error is not None:
        return answer.steps[answer.first_error].error
    return None if answer.answer is not None else "form"


def _rebuilt_by(
    config: WorldConfig, training: Mapping[str, Any], shares: Mapping[str, float]
) -> tuple[str, str]:
    """Return a world's name, and the command that trains a base model for it."""
    matches = [n for n, named in WORLDS.items() if _base_of(named) == _base_of(config)]
    if not matches:
        return "an unnamed world", f"selfteach.tasks.lab.pretrain.pretrain(World({config}), out)"
    name = min(matches, key=lambda n: WORLDS[n].pull != config.pull)
    named = WORLDS[name]
    documents = next((kind for kind, named in DOCUMENTS.items() if named == shares), "study")
    options = "" if config.seed == named.seed else f" --world-seed {config.seed}"
    options += "" if config.pull == named.pull else f" --pull {config.pull:g}"
    options += "" if documents == "study" else f" --documents {documents}"
    out = "FOLDER" if options else f"src/selfteach/tasks/lab/bases/{name}"
    return name, (
        f"python -m selfteach.tasks.lab.pretrain --world {name}{options} --steps {training['steps']} "
        f"--seed {training['seed']} --out {out}"
    )


def _base_of(config: WorldConfig) -> WorldConfig:
    """Reset what the command line can set: the seed and the pull."""
    return replace(config, seed=0, pull=0.0)


def _plain(value: object) -> str:
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)


def write_card(folder: Path, result: ProbeResult) -> None:
    """Write a base model's card beside its weights."""
    base = json.loads((folder / "world.json").read_text())
    (folder / "README.md").write_text(model_card(base, result), encoding="utf-8")


def main() -> None:
    """Command line: measure a base model and print the table."""
    parser = argparse.ArgumentParser(description="Measure what a base model of the lab can read.")
    parser.add_argument("folder", type=Path, help="a base model with its world.json")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampled answers")
    parser.add_argument("--card", action="store_true", help="write the model card, README.md")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(args.folder, questions=args.questions, seed=args.seed)
    if args.card:
        write_card(args.folder, result)
    writers = f"the documents' writers: {100 * result.writers:.1f} %\n\n"
    report = json.dumps(asdict(result), indent=2) if args.json else writers + table(result)
    print(report)  # noqa: T201 - a command-line program


if __name__ == "__main__":
    main()
