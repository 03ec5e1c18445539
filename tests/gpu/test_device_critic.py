"""A local critic on a device: its weights, their fingerprint, and its replies."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from selfteach.config.critic_section import LocalCriticConfig
from selfteach.feedback.critics.chat_model import Reply, Request
from selfteach.feedback.critics.local import LocalModel
from selfteach.models.policy import Policy, Schedule
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.trainer.build_critic import _local, fingerprint, initial_weights

pytestmark = pytest.mark.gpu

TEXTS = ("a b c a b c a b", "d d d d", "a b c d e f a b", "f e f e f", "a a")
GREEDY = [Request((("user", text),), 0.0, 24) for text in TEXTS]
SAMPLED = [Request((("user", text),), 1.0, 24) for text in TEXTS]


def local(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **more: object
) -> LocalModel:
    options = {"batch_size": 4, "weights": contextlib.nullcontext, **more}
    return LocalModel(
        model, Renderer(tokenizer, Templates("lab")), identity="tiny",
        end_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id, max_length=64, **options,
    )  # fmt: skip  # pyright: ignore


def ask(model: LocalModel, requests: list[Request]) -> list[str]:
    replies = model.complete(requests, lambda index, reply: None)
    assert all(isinstance(reply, Reply) for reply in replies)
    return [reply.text for reply in replies if isinstance(reply, Reply)]


def copy_to(model: LlamaForCausalLM, device: str) -> LlamaForCausalLM:
    copied = copy.deepcopy(model)
    torch.nn.Module.to(copied, device)
    return copied


@pytest.mark.parametrize("requests", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_replies_equal_those_on_a_cpu(
    requests: list[Request], tiny_llama: LlamaForCausalLM, lab_tokenizer, device: str
) -> None:
    replies = ask(local(copy_to(tiny_llama, device), lab_tokenizer), requests)
    assert replies == ask(local(tiny_llama, lab_tokenizer), requests)
    assert len(set(replies)) > 1


def test_prompt_lookup_changes_no_greedy_reply(
    tiny_llama: LlamaForCausalLM, lab_tokenizer, device: str
) -> None:
    on_device = copy_to(tiny_llama, device)
    replies = ask(local(on_device, lab_tokenizer, prompt_lookup=3), GREEDY)
    assert replies == ask(local(on_device, lab_tokenizer, batch_size=1), GREEDY)


def test_prompt_lookup_leaves_the_random_stream_alone(
    tiny_llama: LlamaForCausalLM, lab_tokenizer, device: str
) -> None:
    model = local(copy_to(tiny_llama, device), lab_tokenizer, prompt_lookup=3)
    torch.manual_seed(5)
    expected = torch.rand(3, device=device)
    torch.manual_seed(5)
    ask(model, SAMPLED)
    assert torch.equal(torch.rand(3, device=device), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_one_fingerprint_on_every_device(
    dtype: torch.dtype, tiny_llama: LlamaForCausalLM, device: str
) -> None:
    tiny_llama.to(dtype)  # pyright: ignore
    on_device = copy_to(tiny_llama, device)
    assert fingerprint(on_device) == fingerprint(tiny_llama)
    with torch.no_grad():
        next(on_device.parameters())[3, 2] += 0.125
    assert fingerprint(on_device) != fingerprint(tiny_llama)


def test_the_policy_as_critic_uses_its_initial_weights(
    tiny_llama: LlamaForCausalLM, lab_tokenizer, device: str
) -> None:
    policy = Policy(copy_to(tiny_llama, device), Schedule(1e-2))
    model = local(policy.model, lab_tokenizer, weights=initial_weights(policy))  # pyright: ignore
    before = ask(model, GREEDY)
    for weight in policy.trainable.values():
        weight.data += 0.3 * torch.randn_like(weight)
    assert ask(model, GREEDY) == before
    assert ask(local(policy.model, lab_tokenizer), GREEDY) != before  # pyright: ignore


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recipes_critic_is_on_its_device(dtype: str, device: str) -> None:
    config = LocalCriticConfig.model_validate(
        {"type": "local", "path": "lab:two_styles", "device": device, "weights_dtype": dtype}
    )
    model = _local(config, Templates("lab"))
    assert isinstance(model, LocalModel)
    assert next(model._model.parameters()).device.type == device
    assert len(ask(model, GREEDY)) == len(GREEDY)
