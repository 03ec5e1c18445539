"""A critic on a device: whose weights write, what they are called, and what they say."""

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
DRAWN = [Request((("user", text),), 1.0, 24) for text in TEXTS]


def local(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **more: object
) -> LocalModel:
    told = {"batch_size": 4, "weights": contextlib.nullcontext, **more}
    return LocalModel(
        model, Renderer(tokenizer, Templates("lab")), identity="tiny",
        end_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id, max_length=64, **told,
    )  # fmt: skip  # pyright: ignore


def ask(model: LocalModel, requests: list[Request]) -> list[str]:
    replies = model.complete(requests, lambda index, reply: None)
    assert all(isinstance(reply, Reply) for reply in replies)
    return [reply.text for reply in replies if isinstance(reply, Reply)]


def moved(model: LlamaForCausalLM, device: str) -> LlamaForCausalLM:
    own = copy.deepcopy(model)
    torch.nn.Module.to(own, device)
    return own


@pytest.mark.parametrize("requests", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_replies_are_the_processors(
    requests: list[Request], tiny_llama: LlamaForCausalLM, lab_tokenizer, device: str
) -> None:
    own = ask(local(moved(tiny_llama, device), lab_tokenizer), requests)
    assert own == ask(local(tiny_llama, lab_tokenizer), requests)
    assert len(set(own)) > 1


def test_guessing_changes_no_greedy_reply(
    tiny_llama: LlamaForCausalLM, lab_tokenizer, device: str
) -> None:
    there = moved(tiny_llama, device)
    guessed = ask(local(there, lab_tokenizer, prompt_lookup=3), GREEDY)
    assert guessed == ask(local(there, lab_tokenizer, batch_size=1), GREEDY)


def test_a_guess_leaves_the_random_stream_alone(
    tiny_llama: LlamaForCausalLM, lab_tokenizer, device: str
) -> None:
    model = local(moved(tiny_llama, device), lab_tokenizer, prompt_lookup=3)
    torch.manual_seed(5)
    expected = torch.rand(3, device=device)
    torch.manual_seed(5)
    ask(model, DRAWN)
    assert torch.equal(torch.rand(3, device=device), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_one_name_on_every_device(
    dtype: torch.dtype, tiny_llama: LlamaForCausalLM, device: str
) -> None:
    tiny_llama.to(dtype)  # pyright: ignore
    there = moved(tiny_llama, device)
    assert fingerprint(there) == fingerprint(tiny_llama)
    with torch.no_grad():
        next(there.parameters())[3, 2] += 0.125
    assert fingerprint(there) != fingerprint(tiny_llama)


def test_the_solver_as_critic_writes_with_its_initial_weights(
    tiny_llama: LlamaForCausalLM, lab_tokenizer, device: str
) -> None:
    policy = Policy(moved(tiny_llama, device), Schedule(1e-2))
    model = local(policy.model, lab_tokenizer, weights=initial_weights(policy))  # pyright: ignore
    before = ask(model, GREEDY)
    for weight in policy.trainable.values():
        weight.data += 0.3 * torch.randn_like(weight)
    assert ask(model, GREEDY) == before
    assert ask(local(policy.model, lab_tokenizer), GREEDY) != before  # pyright: ignore


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recipes_critic_is_where_it_is_asked_to_be(dtype: str, device: str) -> None:
    config = LocalCriticConfig.model_validate(
        {"type": "local", "path": "lab:two_styles", "device": device, "weights_dtype": dtype}
    )
    model = _local(config, Templates("lab"))
    assert isinstance(model, LocalModel)
    assert next(model._model.parameters()).device.type == device
    assert len(ask(model, GREEDY)) == len(GREEDY)
