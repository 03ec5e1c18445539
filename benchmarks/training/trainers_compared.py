"""A training step as ours and as TRL's trainers take it: same model, questions, answers and contexts.

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
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import torch
from random_models import SIZED, lessons_of, model_of
from step_clock import Clock, held_bytes, instant

import vllm_server

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import TrainerCallback

import selfteach.trainer.build as building
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.trainer import step
from selfteach.trainer.build import Built, build
from selfteach.types import TrainingSample, Verdict

BF16: dict[str, Any] = {"model": {"autocast": "bfloat16"}}

MODELS: dict[str, dict[str, Any]] = {
    "lab": {
        "model": {"path": "lab:two_styles"},
        "data": {"type": "lab", "max_solve_rate": 0.01, "train": 64, "validation": 1, "test": 1},
        "sampling": {"max_tokens": 40},
        "train": {"steps": 1, "problems_per_step": 4, "group_size": 8},
    },
    "SmolLM2-135M": {
        "model": {"path": str(vllm_server.MODEL)},  # a folder that TRL can load, too
        "data": {
            "type": "chain_sums", "seed": 1, "min_terms": 4, "max_terms": 4, "max_digits": 1,
            "train": 16, "validation": 1, "test": 1,
        },
        "sampling": {"max_tokens": 32},
        "train": {"steps": 1, "problems_per_step": 2, "group_size": 4},
    },
}  # fmt: skip

for _name, _sized in SIZED.items():  # the lab's data and tokenizer are there, and not looked at
    MODELS[_name] = {
        **MODELS["lab"],
        "sampling": {"max_tokens": _sized.length},
        "train": {
            "steps": 1, "problems_per_step": _sized.answers // _sized.each,
            "group_size": _sized.each, "micro_batch_tokens": _sized.micro_batch_tokens,
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
        components = self.built.components
        if kind == "grpo":
            components = dataclasses.replace(components, verify=by_coin)
        policy: Any = components.policy
        policy.optimizer_step = self._timed("optimizer", policy.optimizer_step)
        teacher: Any = components.teacher
        teacher.score = self._timed("teacher", teacher.score)
        self.components = components

    def _timed(self, phase: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(phase):
                return function(*args, **kwargs)

        return timed

    def sample(self) -> list[TrainingSample]:
        """The next problems, answered and marked."""
        if self.given is not None:
            return self.given
        count = self.built.components.sampling.samples
        asked = {4: 2, 8: 4}[count]
        problems = self.built.task.problems("train")
        start = self.taken * asked % (len(problems) - asked + 1)
        self.taken += 1
        with self.clock("sampling"):
            rollouts = self.components.engine.generate(
                problems[start : start + asked], self.components.sampling
            )
        return step.teach(self.components, step.mark(self.components, rollouts))

    def step(self, samples: list[TrainingSample] | None = None) -> None:
        """One step, timed as a whole, too; from samples that have been sampled already, or others."""
        before, began = held_bytes(), instant()
        self.learn(self.sample() if samples is None else samples)
        self.clock.end(instant() - began)
        self.clock.peak = held_bytes(before)

    def learn(self, samples: list[TrainingSample]) -> None:
        """What `step.take_in` does after teaching."""
        backward = self.clock.around("student", step._backward)
        with mock.patch.object(step, "_backward", backward):
            {**step.describe(samples), **step.learn(self.components, samples)}
        self.components.engine.load_weights(
            self.components.policy.trainable.items(), self.components.policy.version
        )


def built_of(model: str, values: dict[str, Any]) -> Built:
    """A recipe's components; a model of random weights takes the place of the one that is loaded."""
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
        vocabulary = ours.built.components.policy.model.config.vocab_size
        self.components = dataclasses.replace(
            ours.components, chunk_tokens=max(1, entries // vocabulary)
        )

    def learn(self, samples: list[TrainingSample]) -> None:
        """With the phases timed as its own."""
        self.ours.timing = self.clock
        super().learn(samples)
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
        self.samples: list[TrainingSample] = []
        self.others: list[Ours] = []
        components = ours.built.components
        rows = MODELS[model]["train"]
        batch = rows["problems_per_step"] * rows["group_size"]
        more: dict[str, Any] = {"use_cpu": True, "bf16": False}
        if device == "cuda":
            more = {"use_cpu": False, "bf16": precision == "bf16"}
        if model in SIZED:
            sized = SIZED[model]
            dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
            where = ours.components.policy.device
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
            ).built.components.policy.model
            loaded = contextlib.nullcontext()
        renderer = components.renderer
        prompts = [
            renderer._messages("solver", question=p.question)
            for p in ours.built.task.problems("train")
        ]
        place = self.place = tempfile.TemporaryDirectory()
        common: dict[str, Any] = {
            "output_dir": place.name, "per_device_train_batch_size": batch, "max_steps": steps,
            "gradient_accumulation_steps": 1, "num_generations": rows["group_size"],
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
                [list(sample.rollout.prompt_ids) for sample in self.samples], None, {}
            )  # fmt: skip
            trainer.reward_funcs = [_every_other]
        elif self.kind == "grpo":
            trainer._generate = clock.around("sampling", trainer._generate)
        else:
            generate = trainer._generate_transformers

            def given(prompt_ids: Any) -> Any:
                with clock("sampling"):
                    None if given_too else generate(prompt_ids)
                prompts = [list(sample.rollout.prompt_ids) for sample in self.samples]
                return prompts, self._answers()

            trainer._generate = given
            trainer.teacher_context_builder.build = self._context
            forward = trainer._forward_logits

            def logits(*args: Any, **kwargs: Any) -> Any:
                with contextlib.nullcontext() if torch.is_grad_enabled() else clock("teacher"):
                    return forward(*args, **kwargs)

            trainer._forward_logits = logits

    def _answers(self) -> list[list[int]]:
        return [list(sample.rollout.token_ids) for sample in self.samples]

    def _context(self, output: dict, prompts: Any, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        told = [sample.teacher_prompt_ids or () for sample in self.samples]
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
        self.theirs.samples = ours.sample()
        ours.clock.begun = instant() - began
        self._held = held_bytes()
        self._began = instant()
        self._optimizer = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer = instant()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._optimizer is not None:
            self.theirs.clock.add("optimizer", instant() - self._optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        theirs, ours = self.theirs, self.theirs.ours
        theirs.clock.end(instant() - self._began)
        theirs.clock.peak = held_bytes(self._held)
        for one in (ours, *theirs.others):
            one.step(theirs.samples if one is ours else None)
