"""What a step costs, counted instead of timed: passes, tokens, rows of the head, bytes alive at once.

A change that makes the loop do more work fails here, on any machine.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from covering import covering
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.losses.divergence import Divergence
from selfteach.losses.objectives import Distillation, Grpo
from selfteach.models import matmul
from selfteach.models.lm_head import Head, Scores, chunked_sum
from selfteach.rollout.decoding.llama import LlamaDecoder
from selfteach.trainer.build import Built, build
from selfteach.trainer.step import train_step
from selfteach.types import Batch, Sequences

PROBLEMS, ANSWERS = 3, 4
RECIPE = {
    "data": {"type": "lab", "train": PROBLEMS, "validation": 1, "test": 1, "max_solve_rate": 0.01},
    "sampling": {"max_tokens": 40},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {"steps": 1, "problems_per_step": PROBLEMS, "group_size": ANSWERS},
}
GRPO = {"objective": {"type": "grpo"}, "context": {"type": "none"}, "critic": None}


class Work:
    """Passes through the backbone by kind, and rows that met the head with a loss in view."""

    def __init__(self, built: Built, patch: pytest.MonkeyPatch) -> None:
        self.passes, self.tokens, self.head_rows = Counter[str](), Counter[str](), 0
        built.components.policy.model.model.register_forward_pre_hook(self._pass, with_kwargs=True)
        product, one_token = Head.project, LlamaDecoder.__call__

        def stepped(passes: LlamaDecoder, parent_R: np.ndarray, token_R: Tensor) -> Tensor:
            self.passes["one token"] += 1
            self.tokens["one token"] += len(token_R)
            return one_token(passes, parent_R, token_R)

        def counted(head: Head, hidden: Tensor) -> Tensor:
            self.head_rows += len(hidden)
            return product(head, hidden)

        patch.setattr(Head, "project", counted)
        patch.setattr(LlamaDecoder, "__call__", stepped)

    def _pass(self, _: object, args: tuple, kwargs: dict[str, Any]) -> None:
        rows, width = (kwargs.get("input_ids", args[0] if args else None)).shape
        if torch.is_inference_mode_enabled():
            kind = "prompts"
        else:
            kind = "student" if torch.is_grad_enabled() else "teacher"
        self.passes[kind] += 1
        self.tokens[kind] += rows * width


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def step(ends: tuple[str, ...] = (), **changes: Any) -> tuple[Work, list, dict[str, float]]:
        built = build(Recipe.model_validate(merge(RECIPE, changes)))
        if ends:
            engine: Any = built.components.engine.engine  # type: ignore[attr-defined]
            engine._end_ids = tuple(built.tokenizer.convert_tokens_to_ids(list(ends)))
        work = Work(built, monkeypatch)
        samples, metrics = train_step(built.components, built.task.problems("train"))
        return work, samples, metrics

    yield step


def test_one_pass_of_student_and_teacher_and_no_prompt_token_meets_the_head(counted: Any) -> None:
    work, samples, metrics = counted()
    answers = sum(len(sample.rollout.token_ids) for sample in samples)
    assert work.passes["student"] == work.passes["teacher"] == 1
    assert work.head_rows == 2 * answers
    assert metrics["tokens_trained"] == metrics["teacher_tokens"] == answers


def test_a_question_is_read_once_for_all_its_answers(counted: Any) -> None:
    work, samples, _ = counted()
    prompts = {sample.rollout.problem.id: len(sample.rollout.prompt_ids) for sample in samples}
    assert work.tokens["prompts"] <= PROBLEMS * max(prompts.values())
    longest = max(len(sample.rollout.token_ids) for sample in samples)
    assert work.passes["one token"] == longest - 1


def prefixes_in_need(samples: list) -> int:
    """Different beginnings of answers, by question, that something is drawn behind; questions aside."""
    answers = [(sample.rollout.problem.id, sample.rollout.token_ids) for sample in samples]
    return len({(p, ids[:n]) for p, ids in answers for n in range(1, len(ids))})


def test_no_beginning_of_an_answer_is_computed_twice(counted: Any) -> None:
    work, samples, _ = counted()
    drawn = sum(len(sample.rollout.token_ids) - 1 for sample in samples)
    assert work.tokens["one token"] == prefixes_in_need(samples) < 0.9 * drawn


def test_answers_that_have_ended_leave_the_batch_at_once(counted: Any) -> None:
    work, samples, _ = counted(ends=("a", "b", "c"))
    lengths = [len(sample.rollout.token_ids) for sample in samples]
    assert max(lengths) * len(lengths) > 2 * sum(lengths), (
        "lengths that differ, or nothing is tested"
    )
    assert work.tokens["one token"] == prefixes_in_need(samples)


def test_an_answer_that_teaches_nothing_is_not_scored(counted: Any) -> None:
    work, samples, _ = counted(objective={"train_on": "incorrect"})
    wrong = [sample for sample in samples if not sample.critiqued.verdict.correct]
    assert work.head_rows == 2 * sum(len(sample.rollout.token_ids) for sample in wrong)


def test_grpo_asks_no_teacher_and_passes_over_groups_that_score_alike(counted: Any) -> None:
    work, samples, _ = counted(**GRPO)
    alike = {p: set[bool]() for p in (sample.rollout.problem.id for sample in samples)}
    for sample in samples:
        alike[sample.rollout.problem.id].add(sample.critiqued.verdict.correct)
    shared = [sample for sample in samples if len(alike[sample.rollout.problem.id]) > 1]
    assert work.passes["teacher"] == 0
    assert work.head_rows == sum(len(sample.rollout.token_ids) for sample in shared)


class Alive(TorchDispatchMode):
    """Bytes of storage that operations have made and nobody has let go of; the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._key(tensor) not in self._known | given:
                self._add(tensor)
        return out

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


V, H, CHUNK = 4096, 16, 512
LOGITS = 4 * CHUNK * V
"""Bytes of one chunk's logits."""


def peak(
    tokens: int,
    *,
    trainable_head: bool,
    width: int = H,
    kind: Literal["reverse_kl", "jsd", "grpo", "sampled"] = "jsd",
    dtype: torch.dtype = torch.float32,
) -> int:
    """Most bytes alive in forward and backward of the fused loss, beyond what it was given."""
    torch.manual_seed(0)
    weight_VH = torch.randn(V, width, dtype=dtype, requires_grad=trainable_head)
    hidden_NH = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    teacher_NH, teacher_VH = (torch.randn(n, width, dtype=dtype) for n in (tokens, V))
    teacher = Scores.single(teacher_NH, Head(teacher_VH))
    ids_N, weight_N = torch.randint(V, (tokens,)), torch.full((tokens,), 1 / tokens)

    sequences = Sequences(ids_N[:, None], ids_N, ids_N)  # which a loss does not look at
    batch = Batch(sequences, sequences, ids_N, weight_N, weight_N, weight_N)
    match kind:
        case "grpo":
            objective = Grpo(1.0)
        case "sampled":
            objective = Distillation(Divergence("reverse_kl", support="sampled"), 1.0)
        case _:
            objective = Distillation(Divergence(kind), 1.0)

    def fn(logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_CV = teacher.logits(rows) if objective.needs_teacher else None
        return {"loss": objective.per_token(logits_CV, teacher_CV, batch, rows)["loss"]}

    with Alive() as alive:
        student = Scores.single(hidden_NH, Head(weight_VH))
        total, _ = chunked_sum(fn, student, weight_N, chunk_tokens=CHUNK)
        total.backward()
    return alive.most


@pytest.mark.parametrize(("kind", "trainable_head"), covering(["reverse_kl", "jsd"], [False, True]))
def test_the_fused_loss_holds_a_handful_of_chunks_whatever_the_number_of_tokens(
    trainable_head: bool, kind: Any
) -> None:
    few, many = (peak(n, trainable_head=trainable_head, kind=kind) for n in (1024, 8192))
    head = 4 * V * H if trainable_head else 0  # the accumulator, which becomes the gradient
    assert few <= 2.6 * LOGITS + head, (
        "both sides' logits, the gradient in place of one, and of the rest a few rows"
    )
    assert many - few <= 4 * (8192 - 1024) * (2 * H + 8), "only what is of hidden states' size"
    assert many < 4 * 8192 * V / 4, (
        "less than a quarter of the full logits, of which a plain loss has six"
    )


@pytest.mark.parametrize(("kind", "chunks"), [("grpo", 2.2), ("sampled", 3.2)])
def test_a_loss_of_sampled_tokens_holds_logits_and_their_gradient(kind: Any, chunks: float) -> None:
    few, many = (peak(n, trainable_head=False, kind=kind) for n in (1024, 8192))
    assert few <= chunks * LOGITS, "a teacher's logits are one chunk more"
    assert many - few <= 4 * (8192 - 1024) * (2 * H + 8), "only what is of hidden states' size"


@pytest.mark.parametrize(
    "native", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["widened", "native"]
)
def test_halves_cost_no_more_than_float32(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where they are multiplied in float32 nor where they are multiplied as they are."""
    monkeypatch.setattr(matmul, "has_fast_bf16", lambda _: native)
    few, many = (
        peak(n, trainable_head=False, width=4 * H, dtype=torch.bfloat16) for n in (1024, 2048)
    )
    assert few <= 2.6 * LOGITS
    assert many - few <= 1024 * (2 * 4 * H + 4 * 8), "the gradient is in hidden states' dtype"


def test_a_trainable_head_costs_its_gradient_and_no_copy_of_it() -> None:
    width = 2 * CHUNK  # a head of two chunks' logits: a second one stands out
    frozen, trained = (peak(1024, trainable_head=x, width=width) for x in (False, True))
    assert trained - frozen <= 1.1 * 4 * V * width
