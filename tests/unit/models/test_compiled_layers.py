"""Compiled layers compute what the others do, in the trainer's passes; else a model runs as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import runs_on_device
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.models.compiled_layers import decoder_layers
from selfteach.models.policy import Policy, Schedule
from selfteach.models.sequences import sequences
from selfteach.models.trainable_model import recompute_activations
from selfteach.trainer.build import build

LAYERS = 2
PROMPTS = [[5, 6, 7, 8], [5, 6, 9, 8]]
COMPLETIONS = [[1, 2, 3], [3, 2]]


def tiny(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


Compiled = list[int]
"""The number of each compiled layer that has run."""


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Compiled]:
    def install(change: Callable[[Tensor], Tensor] = lambda states: states) -> Compiled:
        runs, number = Compiled(), iter(range(sys.maxsize))

        def compiled(function: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
            assert dynamic, "micro-batches have different shapes"
            layer = next(number)

            def run(*args: Any, **kwargs: Any) -> Any:
                runs.append(layer)
                return change(function(*args, **kwargs))

            return run

        monkeypatch.setattr(torch, "compile", compiled)
        return runs

    return install


def compiling(model: PreTrainedModel) -> Policy:
    return Policy(model, Schedule(0.0), compiles=True)


def test_passes_of_the_trainer_run_compiled_and_passes_with_a_cache_do_not(
    compiler: Callable[..., Compiled],
) -> None:
    runs, model = compiler(), tiny()
    policy = compiling(model)
    assert policy.compiles_layers and runs
    for side in (
        sequences(PROMPTS, COMPLETIONS, 0),
        sequences([PROMPTS[0], PROMPTS[0]], COMPLETIONS, 0),  # a tree
    ):
        runs.clear()
        policy.score(side)
        assert runs == [0, 1], "each layer once"
    runs.clear()
    policy.score(sequences(PROMPTS, COMPLETIONS, 0, 2))
    assert not runs, "a shared prefix is a cache"
    ids = torch.tensor(PROMPTS)
    model(input_ids=ids)
    generate: Any = model.generate
    generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert not runs, "nobody scores"


def test_without_the_key_nothing_is_compiled(compiler: Callable[..., Compiled]) -> None:
    runs = compiler()
    policy = Policy(tiny(), Schedule(0.0))
    policy.score(sequences(PROMPTS, COMPLETIONS, 0))
    assert not policy.compiles_layers and not runs


def fails(states: Tensor) -> Tensor:
    raise RuntimeError("no compiler\nis found")


class WrongGradient(torch.autograd.Function):
    """Passes its input on, and twice its gradient back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda states: states + 0.5, "compiled, they compute other states or gradients"),
        (WrongGradient.apply, "compiled, they compute other states or gradients"),
        (fails, "RuntimeError: no compiler is found"),
    ],
)
def test_a_model_whose_compiled_layers_disagree_runs_as_it_is(
    compiler: Callable[..., Compiled], caplog: pytest.LogCaptureFixture, change: Any, reason: str
) -> None:
    runs, model = compiler(change), tiny()
    expected = Policy(tiny(), Schedule(0.0)).score(side := sequences(PROMPTS, COMPLETIONS, 0))
    policy = compiling(model)
    assert caplog.messages == [
        f"model.compile: the layers of LlamaForCausalLM run uncompiled: {reason}"
    ]
    runs.clear()
    scores = policy.score(side)
    assert not policy.compiles_layers and not runs
    assert torch.equal(scores.logits(slice(None)), expected.logits(slice(None)))


def test_recomputed_layers_and_other_attention_run_as_they_are(
    compiler: Callable[..., Compiled], caplog: pytest.LogCaptureFixture
) -> None:
    runs, model = compiler(), tiny()
    recompute_activations(model)
    assert not compiling(model).compiles_layers
    assert "activations are computed again (model.gradient_checkpointing)" in caplog.messages[-1]
    assert not compiling(tiny(attn_implementation="eager")).compiles_layers
    assert "its attention does not run along paths" in caplog.messages[-1]
    assert not runs


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"distributed": {"shard": "full"}}, 'set distributed.shard = "none"'),
        ({"train": {"deterministic": True}}, "remove train.deterministic"),
        ({"model": {"gradient_checkpointing": True}}, "remove model.gradient_checkpointing"),
    ],
)
def test_a_recipe_refuses_what_excludes_compiled_layers(
    changes: dict[str, Any], advice: str
) -> None:
    values = {"model": {"compile": True}, "objective": {"type": "grpo"}}
    assert Recipe.model_validate(values).model.compile
    with pytest.raises(ValueError, match=rf"model\.compile: .*{advice}"):
        Recipe.model_validate(merge(values, changes))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["step_aligned", "lora"])
def test_loss_and_gradients_are_those_of_uncompiled_layers(arm: str) -> None:
    """Student and teacher of the lab, with PyTorch's own compiler."""
    torch._dynamo.reset()
    counters.clear()
    values = runs_on_device.ARMS[arm]
    plain = build(runs_on_device.recipe("cpu", values))
    compiled = build(runs_on_device.recipe("cpu", values, {"model": {"compile": True}}))
    policy: Any = compiled.components.policy
    assert policy.compiles_layers
    layers = decoder_layers(policy.model)
    assert layers is not None and all(layer._compiled_call_impl for layer in layers)
    samples = runs_on_device.training_samples(plain)
    loss, gradients, _ = runs_on_device.loss_and_gradients(plain, samples)
    other, others, _ = runs_on_device.loss_and_gradients(compiled, samples)
    assert other == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == others.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).abs().max()) <= 1e-4 * largest, name
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 16, "all layers share graphs, of which there are a few kinds"
    assert not counters["graph_break"]
