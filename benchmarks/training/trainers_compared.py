"""Run a training step of ours and of TRL's trainers: same model, problems, rollouts and contexts.

TRL's `train()` runs its steps; after each, ours runs one. On a GPU the last of each is timed by phase,
the others as a whole (`step_clock`). TRL generates as usual (timed), and then both train on the
rollouts that ours has sampled; the teacher prompts are ours, too. With GRPO each trains on its sampled
rollouts, and rewards are the parity of the text, so that nearly every rollout counts. The rest is left
as shipped: TRL's rewards and padding on one side, verdicts, critiques and metrics on the other. The
context is the reference, which a group shares, or (`full, critique`) a critique of each rollout, which
it does not.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import torch
from random_models import MODEL_SIZES, model_of, samples_of
from step_clock import Clock, device_bytes, steps_by_phase, synchronized_time

import vllm_server

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import TrainerCallback

import selfteach.models.loading as loading
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.prompts.chat_messages import MessageRenderer
from selfteach.prompts.template_set import Templates
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
        "model": {"path": str(vllm_server.MODEL)},  # a folder that TRL can also load
        "data": {
            "type": "chain_sums", "seed": 1, "min_terms": 4, "max_terms": 4, "max_digits": 1,
            "train": 16, "validation": 1, "test": 1,
        },
        "sampling": {"max_tokens": 32},
        "train": {"steps": 1, "problems_per_step": 2, "group_size": 4},
    },
}  # fmt: skip

for _name, _size in MODEL_SIZES.items():  # the lab's data and tokenizer are loaded, but unused
    MODELS[_name] = {
        **MODELS["lab"],
        "sampling": {"max_tokens": _size.length},
        "train": {
            "steps": 1, "problems_per_step": _size.rollouts // _size.group_size,
            "group_size": _size.group_size,
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
"""By kind: our objective's settings, and TRL's."""


class OurTrainer:
    """Runs our step on a separate copy of the model."""

    def __init__(self, model: str, kind: str, clock: Clock, changes: Any = None) -> None:
        objective = KINDS[kind][0]
        context = {"grpo": {}, "full, critique": CRITIQUE}.get(kind, REFERENCE)
        values = merge(MODELS[model], {"objective": objective, **context})
        if model in MODEL_SIZES:
            tokens = MODEL_SIZES[model].trl_tokens(with_teacher=kind != "grpo")
            values = merge(values, {"train": {"micro_batch_tokens": tokens}})
        self.built: Built = built_of(model, merge(values, changes or {}))
        self.fixed_samples = samples_of(model) if model in MODEL_SIZES else None
        if self.fixed_samples is not None and kind == "grpo":  # which has no teacher
            self.fixed_samples = [
                dataclasses.replace(sample, teacher_prompt_ids=None)
                for sample in self.fixed_samples
            ]
        self.clock, self.num_sampled = clock, 0
        self.active_clock = clock
        """The clock that phases are counted on at present."""
        components = self.built.components
        if kind == "grpo":
            components = dataclasses.replace(components, verify=by_parity)
        policy: Any = components.policy
        policy.optimizer_step = self._timed("optimizer", policy.optimizer_step)
        teacher: Any = components.teacher
        teacher.score = self._timed("teacher", teacher.score)
        self.components = components

    def _timed(self, phase: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.active_clock(phase):
                return function(*args, **kwargs)

        return timed

    def sample(self) -> list[TrainingSample]:
        """Sample rollouts of the next problems, and critique them."""
        if self.fixed_samples is not None:
            return self.fixed_samples
        count = {4: 2, 8: 4}[self.built.components.sampling.samples]
        problems = self.built.task.problems("train")
        start = self.num_sampled * count % (len(problems) - count + 1)
        self.num_sampled += 1
        with self.clock("sampling"):
            rollouts = self.components.engine.generate(
                problems[start : start + count], self.components.sampling
            )
        critiqued = step.verify_and_critique(self.components, rollouts)
        return step.build_samples(self.components, critiqued)

    def step(self, samples: list[TrainingSample] | None = None) -> None:
        """Run one step, also timed as a whole, from these samples or new ones."""
        before, start = device_bytes(), synchronized_time()
        self.learn(self.sample() if samples is None else samples)
        self.clock.end(synchronized_time() - start)
        self.clock.peak = device_bytes(before)

    def learn(self, samples: list[TrainingSample]) -> None:
        """Run what `step.train_step` does once samples are built."""
        backward = self.clock.timed("student", step._backward)
        with mock.patch.object(step, "_backward", backward):
            step.learn(self.components, samples)
        step.publish_weights(self.components)


def built_of(model: str, values: dict[str, Any]) -> Built:
    """Build a recipe; a model of random weights replaces the loaded one."""
    recipe = validate(Recipe, values, where="benchmark")
    if model not in MODEL_SIZES:
        return build(recipe)

    def random_model(_: object, device: Any, dtype: torch.dtype, **__: object) -> Any:
        return model_of(model, device, dtype)

    with mock.patch.object(loading, "load_model", random_model):
        return build(recipe)


class OtherChunks(OurTrainer):
    """Runs the same step on the same model, with other chunks of logits."""

    def __init__(self, ours: OurTrainer, clock: Clock, entries: int) -> None:
        self.ours, self.built, self.fixed_samples = ours, ours.built, ours.fixed_samples
        self.clock, self.num_sampled = clock, 0
        vocabulary = ours.built.components.policy.model.config.vocab_size
        self.components = dataclasses.replace(
            ours.components, chunk_tokens=max(1, entries // vocabulary)
        )

    def learn(self, samples: list[TrainingSample]) -> None:
        """Run the step with its phases on this clock."""
        self.ours.active_clock = self.clock
        super().learn(samples)
        self.ours.active_clock = self.ours.clock


class OtherMicroBatches(OtherChunks):
    """Runs the same step on the same model, in other micro-batches."""

    def __init__(self, ours: OurTrainer, clock: Clock, tokens: int) -> None:
        super().__init__(ours, clock, 1)
        self.components = dataclasses.replace(ours.components, micro_batch_tokens=tokens)


def by_parity(problem: object, text: str) -> Verdict:
    """Return a verdict by the parity of the text: rewards differ within nearly every group."""
    return Verdict(correct=sum(map(ord, text)) % 2 == 0, formatted=True, parsed=text)


def _trl_policy(
    model: str, kind: str, ours: OurTrainer, device: str, precision: str
) -> tuple[Any, contextlib.AbstractContextManager[object], dict[str, Any]]:
    """Return a copy of the model for TRL, a context in which TRL loads it, and TRL's options for it."""
    options: dict[str, Any] = {"use_cpu": True, "bf16": False}
    if device == "cuda":
        options = {"use_cpu": False, "bf16": precision == "bf16"}
    if model not in MODEL_SIZES:
        copied = OurTrainer(model, kind, Clock(), {"model": {"device": device}})
        return copied.built.components.policy.model, contextlib.nullcontext(), options
    size = MODEL_SIZES[model]
    dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
    on = ours.components.policy.device
    policy = model_of(model, on, dtype)
    loaded = mock.patch(
        "trl.experimental.sdpo.sdpo_trainer.create_model_from_path",
        lambda *_, **__: model_of(model, on, dtype),
    )
    options["gradient_accumulation_steps"] = size.rollouts // size.trl_batch
    options["per_device_train_batch_size"] = size.trl_batch
    return policy, loaded, options


def _trl_arguments(
    model: str, kind: str, steps: int, folder: str, options: dict[str, Any]
) -> tuple[Any, Any]:
    """Return TRL's trainer of a kind and its arguments."""
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    rows = MODELS[model]["train"]
    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps,
        "per_device_train_batch_size": rows["problems_per_step"] * rows["group_size"],
        "gradient_accumulation_steps": 1, "num_generations": rows["group_size"],
        "max_completion_length": MODELS[model]["sampling"]["max_tokens"], "report_to": [],
        "logging_strategy": "no", "save_strategy": "no",
        "gradient_checkpointing": False, "learning_rate": 1e-5, "disable_tqdm": True,
        "temperature": 1.0, "top_k": 0, "shuffle_dataset": False, **options,
    }  # fmt: skip
    if kind == "grpo":
        return GRPOTrainer, GRPOConfig(**common, beta=0.0)
    return SDPOTrainer, SDPOConfig(
        **common, distillation_alpha=1.0, teacher_model_kind="base", distillation_is_clip=None,
        max_prompt_length=None, **KINDS[kind][1],
    )  # fmt: skip


class TrlTrainer:
    """Runs a TRL trainer on a separate copy of the model, with our rollouts and contexts."""

    def __init__(
        self, model: str, kind: str, clock: Clock, ours: OurTrainer, steps: int,
        device: str = "cpu", precision: str = "float32",
    ) -> None:  # fmt: skip
        from datasets import Dataset

        self.clock, self.ours, self.kind = clock, ours, kind
        self.samples: list[TrainingSample] = []
        self.others: list[OurTrainer] = []
        policy, loaded, options = _trl_policy(model, kind, ours, device, precision)
        renderer = MessageRenderer(Templates(ours.built.task.templates))
        prompts = [renderer.solver(problem) for problem in ours.built.task.problems("train")]
        self.folder = tempfile.TemporaryDirectory()
        trainer, args = _trl_arguments(model, kind, steps, self.folder.name, options)
        adapted = getattr(ours.components.policy.model, "peft_config", None)
        with loaded:
            self.trainer: Any = trainer(
                peft_config=copy.deepcopy(adapted["default"]) if adapted else None,
                model=policy, reward_funcs=rewards, args=args,
                processing_class=ours.built.tokenizer,
                train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]),
                callbacks=[_Steps(self)],
            )  # fmt: skip
        self._patch()

    def _patch(self) -> None:
        trainer, clock = self.trainer, self.clock
        trainer.compute_loss = clock.timed("student", trainer.compute_loss)
        accelerator = trainer.accelerator
        accelerator.backward = clock.timed("student", accelerator.backward)
        accelerator.clip_grad_norm_ = clock.timed("optimizer", accelerator.clip_grad_norm_)
        fixed = self.ours.fixed_samples is not None
        if self.kind == "grpo" and fixed:
            trainer._generate_single_turn = lambda *_, **__: (self._rollouts(), None)
            trainer._tokenize_prompts = lambda _: (
                [list(sample.rollout.prompt_ids) for sample in self.samples], None, {}
            )  # fmt: skip
            trainer.reward_funcs = [_every_other]
        elif self.kind == "grpo":
            trainer._generate = clock.timed("sampling", trainer._generate)
        else:
            generate = trainer._generate_transformers

            def generate_ours(prompt_ids: Any) -> Any:
                with clock("sampling"):
                    None if fixed else generate(prompt_ids)
                prompts = [list(sample.rollout.prompt_ids) for sample in self.samples]
                return prompts, self._rollouts()

            trainer._generate = generate_ours
            trainer.teacher_context_builder.build = self._context
            forward = trainer._forward_logits

            def logits(*args: Any, **kwargs: Any) -> Any:
                with contextlib.nullcontext() if torch.is_grad_enabled() else clock("teacher"):
                    return forward(*args, **kwargs)

            trainer._forward_logits = logits

    def _rollouts(self) -> list[list[int]]:
        return [list(sample.rollout.token_ids) for sample in self.samples]

    def _context(self, output: dict, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        prompts = [sample.teacher_prompt_ids or () for sample in self.samples]
        width, pad = max(map(len, prompts)), self.ours.built.tokenizer.pad_token_id
        on = output["completion_ids"].device
        ids = torch.tensor([[pad] * (width - len(t)) + list(t) for t in prompts], device=on)
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in prompts], device=on)
        return {
            "teacher_input_ids": torch.cat([ids, output["completion_ids"]], 1),
            "teacher_attention_mask": torch.cat([mask, output["completion_mask"]], 1),
            "self_distillation_mask": torch.ones(len(prompts), device=on),
        }


def rewards(completions: list, **_: Any) -> list[float]:
    """Return rewards by parity for TRL's rollouts, as `by_parity`."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 2 == 0) for text in texts]


def _every_other(completions: list, **_: Any) -> list[float]:
    """Return rewards that differ in each group, for random tokens."""
    return [float(i % 2 == 0) for i in range(len(completions))]


class _Steps(TrainerCallback):
    """Times TRL's steps, and runs ours between them."""

    def __init__(self, trl: TrlTrainer) -> None:
        self.trl = trl

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trl, ours = self.trl, self.trl.ours
        for clock in (trl.clock, *(trainer.clock for trainer in (ours, *trl.others))):
            clock.by_phase = state.global_step + steps_by_phase() == state.max_steps
        start = synchronized_time()
        self.trl.samples = ours.sample()
        ours.clock.before = synchronized_time() - start
        self._before = device_bytes()
        self._start = synchronized_time()
        self._optimizer = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer = synchronized_time() if self.trl.clock.counts_phases else None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._optimizer is not None:
            self.trl.clock.add("optimizer", synchronized_time() - self._optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trl, ours = self.trl, self.trl.ours
        trl.clock.end(synchronized_time() - self._start)
        trl.clock.peak = device_bytes(self._before)
        for trainer in (ours, *trl.others):
            trainer.step(trl.samples if trainer is ours else None)
