"""Packed sequences give the scores and gradients of padded ones, and compute no padding."""

from __future__ import annotations

import random
from typing import Any

import packed_by_loop
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfteach.models import packed_attention, tree_attention
from selfteach.models.policy import Policy, Schedule
from selfteach.models.sequences import SequenceLayout, sequences
from selfteach.models.trainable_model import add_adapters, recompute_activations
from selfteach.trainer.batching import collate
from selfteach.types import (
    CritiquedRollout,
    Problem,
    Rollout,
    Sequences,
    TokenWeights,
    TrainingSample,
    Verdict,
)

PACKED = SequenceLayout(packed=True)
RAGGED = [3, 9, 4, 17, 6, 30, 2]
"""Completion lengths that pad to several times their sum."""


def tiny(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Build a model with two query heads per key head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def ragged(*, shared: int, same_prompt: bool) -> tuple[list[list[int]], list[list[int]]]:
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(1, 64) for _ in range(count)]

    start, rest = ids(shared), ids(5)
    prompts = [[*start, *(rest if same_prompt else ids(2 + n % 4))] for n in range(len(RAGGED))]
    completions = [ids(length) for length in RAGGED]
    return [*prompts, prompts[0]], [*completions, completions[0]]  # one rollout twice


def gradients(policy: Policy, sides: list[Sequences]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return logits of all tokens and the gradients of a sum over them."""
    rows = []
    for side in sides:
        logits = policy.score(side).logits(slice(None))
        (logits.sin() * torch.arange(logits.shape[1])).sum().backward()
        rows.append(logits.detach())
    grads = [w.grad for w in policy.trainable.values() if w.grad is not None]
    assert len(grads) == len(policy.trainable)
    policy.optimizer.zero_grad(set_to_none=True)
    return torch.cat(rows), grads


@pytest.mark.parametrize("kind", ["float64", "float32", "recomputed", "adapters"])
@pytest.mark.parametrize("same_prompt", [False, True], ids=["prompts", "one prompt"])
def test_packed_is_padded_is_one_by_one(
    monkeypatch: pytest.MonkeyPatch, kind: str, same_prompt: bool
) -> None:
    packed_by_loop.install(monkeypatch)
    model: Any = tiny(torch.float32 if kind == "float32" else torch.float64)
    if kind == "recomputed":
        recompute_activations(model)
    if kind == "adapters":
        model = add_adapters(
            model, rank=2, alpha=4, dropout=0.0, targets=("q_proj", "o_proj"), seed=0
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
    policy = Policy(model, Schedule(1e-3))
    assert policy.packs_sequences
    prompts, completions = ragged(shared=40, same_prompt=same_prompt)
    packed = sequences(prompts, completions, 0, layout=PACKED)
    assert packed.shared == 0 and packed.tree is not None
    padded = sequences(prompts, completions, 0)
    alone = [sequences([p], [c], 0) for p, c in zip(prompts, completions, strict=True)]
    logits, grads = gradients(policy, [packed])
    exact = 1e-4 if kind == "float32" else 1e-6  # norms are float32 in any case
    for other in ([padded], alone):
        other_logits, other_grads = gradients(policy, other)
        scale = float(other_logits.abs().max())
        torch.testing.assert_close(logits, other_logits, rtol=0, atol=exact * scale)
        for one, two in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=exact * float(two.abs().max()))


def matmul_tokens(model: PreTrainedModel) -> list[int]:
    """Return a list to which every pass appends the tokens that go through its linear layers."""
    counts = list[int]()
    layer: Any = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.register_forward_pre_hook(lambda _, args: counts.append(args[0].numel() // 32))
    return counts


def test_as_many_tokens_as_the_sequences_have_go_through_matmuls_and_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention = packed_by_loop.install(monkeypatch)
    model = tiny()
    policy, counts = Policy(model, Schedule(1e-3)), matmul_tokens(model)
    draw = random.Random(1)
    prompts = [[row + 1, *(draw.randrange(64) for _ in range(4))] for row in range(len(RAGGED))]
    completions = [[draw.randrange(64) for _ in range(length)] for length in RAGGED]
    read = sum(5 + length - 1 for length in RAGGED)  # nothing reads a last token's state
    side = sequences(prompts, completions, 0, layout=PACKED)
    counts.clear()
    attention.queries = attention.keys = 0
    with torch.no_grad():
        policy.score(side)
    layers = 2
    assert counts == [read]
    assert (attention.queries, attention.keys) == (layers * read, layers * read)
    padded = len(RAGGED) * (5 + max(RAGGED) - 1)
    assert read < 0.5 * padded


def test_a_group_computes_its_prompt_once_in_attention_too(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = packed_by_loop.install(monkeypatch)
    model = tiny()
    policy, counts = Policy(model, Schedule(1e-3)), matmul_tokens(model)
    side = sequences([[1, 2, 3, 4]] * 3, [[5, 6], [7, 6, 8], [7, 6, 9]], 0, layout=PACKED)
    counts.clear()
    attention.queries = attention.keys = 0
    with torch.no_grad():
        policy.score(side)
    assert counts == [4 + 1 + 2]
    assert attention.queries == 2 * 7
    assert attention.keys == 2 * (5 + 6), "the third reads the states of the second"


def test_padding_without_a_kernel_is_at_most_a_ninth() -> None:
    """A tree runs the tokens of ragged sequences once; where it is not worth it, little is padded."""
    draw = random.Random(2)
    for _ in range(200):
        lengths = [draw.randrange(1, 40) for _ in range(draw.randrange(1, 9))]
        prompts = [[row] for row in range(len(lengths))]
        completions = [[draw.randrange(64) for _ in range(n)] for n in lengths]
        side = sequences(prompts, completions, 0)
        read = sum(lengths)
        if side.tree is not None:
            assert side.tree.ids_1U.numel() == read
        else:
            assert read > tree_attention.MIN_SAVING * len(lengths) * max(lengths)


def sample_of(number: int, length: int) -> TrainingSample:
    problem = Problem(f"q{number}", "", "")
    ids = tuple(1 + (number * 7 + i) % 60 for i in range(length))
    rollout = Rollout(
        problem=problem, sample=0, prompt_ids=(number + 1, 2), token_ids=ids,
        logps=(-1.0,) * length, text="", finished=True, policy_version=0,
    )  # fmt: skip
    critiqued = CritiquedRollout(rollout, Verdict(True, True, "x"), None)
    return TrainingSample(critiqued, context="", teacher_prompt_ids=(number + 1, 3, 4))


def test_a_packed_micro_batch_is_filled_with_tokens_not_with_padding() -> None:
    samples = [sample_of(n, length) for n, length in enumerate(RAGGED)]
    weights = [TokenWeights((1.0,) * length) for length in RAGGED]
    total = sum(2 + 3 + 2 * length for length in RAGGED)
    padded = collate(samples, weights, pad_id=0, micro_batch_tokens=total)
    packed = collate(samples, weights, pad_id=0, micro_batch_tokens=total, layout=PACKED)
    assert len(padded) > 1 and len(packed) == 1
    assert (
        len(collate(samples, weights, pad_id=0, micro_batch_tokens=total - 1, layout=PACKED)) == 2
    )
    ids = [torch.cat([batch.ids_N for batch in way]) for way in (padded, packed)]
    assert torch.equal(*ids)


def fails(*_: Any, scale: Any, window_size: Any) -> Any:
    raise RuntimeError("no kernel image\nis available for execution on the device")


class OneWay(torch.autograd.Function):
    """Returns its input, and has no backward pass."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("_flash_attention_backward has no deterministic implementation")


class WithoutGradients(packed_by_loop.PackedByLoop):
    def attend(self, *args: Any) -> Any:
        return OneWay.apply(super().attend(*args))


class AlignedAtTheBeginning(packed_by_loop.PackedByLoop):
    def attend(self, *args: Any) -> Any:
        return super().attend(*args).flip(0)


class OfOtherGradients(packed_by_loop.PackedByLoop):
    """Returns the same states, with gradients for keys and queries alone."""

    def attend(self, query: Any, key: Any, value: Any, *args: Any) -> Any:
        return super().attend(query, key, value.detach(), *args) + 0 * value.sum()


class OfTorch210(packed_by_loop.PackedByLoop):
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int,
        max_k: int, is_causal: bool = False, return_aux: Any = None,
    ) -> Any:  # fmt: skip
        raise AssertionError


@pytest.mark.parametrize(
    "kernel, reason",
    [
        (fails, "RuntimeError: no kernel image is available for execution"),
        (WithoutGradients(), "RuntimeError: _flash_attention_backward has no deterministic"),
        (AlignedAtTheBeginning(), "with it states or gradients are others"),
        (OfOtherGradients(), "with it states or gradients are others"),
    ],
    ids=["no forward", "no backward", "other states", "other gradients"],
)
def test_a_kernel_that_fails_is_not_used_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernel: Any, reason: str
) -> None:
    packed_by_loop.install(monkeypatch, kernel)
    policy = Policy(tiny(), Schedule(1e-3))
    assert not policy.packs_sequences and not policy.layout.packed
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("sequences of LlamaForCausalLM are padded: ") and reason in line
    assert "\n" not in line and policy.uses_tree_attention


def test_a_proof_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    packed_by_loop.install(monkeypatch)
    policy = Policy(tiny(), Schedule(1e-3))
    assert policy.packs_sequences and not policy.model.training
    assert all(weight.grad is None for weight in policy.model.parameters())


def test_packing_works_with_the_signature_of_torch_2_11(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attention = packed_by_loop.install(monkeypatch, packed_by_loop.PackedByTorch211())
    assert Policy(tiny(), Schedule(1e-3)).packs_sequences, caplog.text
    assert attention.queries > 0 and not caplog.records


def test_torch_2_10_has_no_kernel_that_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for kernel in (OfTorch210(), None):
        monkeypatch.setattr(packed_attention, "OPTIONS", packed_attention.options_of(kernel))
        assert not packed_attention.is_available(gpu, torch.bfloat16)


def test_a_cpu_and_float32_pad() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not Policy(tiny(torch.float32), Schedule(1e-3)).packs_sequences
    assert not packed_attention.is_available(cpu, torch.bfloat16)
    assert not packed_attention.is_available(gpu, torch.float32)
    assert packed_attention.is_available(gpu, torch.bfloat16)


def test_torchs_kernel_takes_what_is_passed_to_it() -> None:
    """Its signature and its fake form, which need no GPU."""
    tree = sequences([[1, 2, 3]] * 2, [[4, 5], [6, 7, 8]], 0, layout=PACKED).tree
    assert tree is not None
    nodes = tree.ids_1U.numel()
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(nodes, 4, 8, dtype=torch.bfloat16, requires_grad=True)
        key, value = (torch.empty(nodes, 2, 8, dtype=torch.bfloat16) for _ in range(2))
        states = packed_attention.attend(query, key, value, tree, scale=0.5)
    assert states.shape == query.shape and states.dtype == torch.bfloat16
