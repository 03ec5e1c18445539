"""A model in this process as critic: batches, limits, and which weights it uses."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from selfteach.feedback.critics.chat_model import NoReply, Reply, Request
from selfteach.feedback.critics.local import LocalModel
from selfteach.models.policy import Policy, Schedule
from selfteach.models.trainable_model import add_adapters
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.trainer.build_critic import fingerprint, initial_weights

REQUESTS = [
    Request((("user", text),), 0.0, 8) for text in ("a b c", "d", "a b c d e f a b", "f e", "a a")
]


def local(
    model, tokenizer, *, batch_size: int = 2, max_length: int = 64, weights=None
) -> LocalModel:
    return LocalModel(
        model,
        Renderer(tokenizer, Templates("lab")),
        identity="tiny",
        end_ids=[tokenizer.eos_token_id],
        pad_id=tokenizer.pad_token_id,
        max_length=max_length,
        batch_size=batch_size,
        weights=weights or contextlib.nullcontext,
    )


@pytest.mark.parametrize("num_guessed", [1, 5])
def test_prompt_lookup_changes_no_greedy_reply(
    tiny_llama: LlamaForCausalLM, lab_tokenizer, num_guessed: int
) -> None:
    texts = ("a b c a b c a b", "d d d d", "a b c d e f a b", "f e f e f", "a a")
    requests = [Request((("user", text),), 0.0, 24) for text in texts]
    tiny_llama.generation_config.repetition_penalty = (
        5.0  # as some families set it; replies ignore it
    )
    plain = ask(local(tiny_llama, lab_tokenizer, batch_size=1), requests)
    passes = []
    tiny_llama.register_forward_hook(lambda *_: passes.append(1))
    model = LocalModel(
        tiny_llama, Renderer(lab_tokenizer, Templates("lab")), identity="tiny",
        end_ids=[lab_tokenizer.eos_token_id], pad_id=lab_tokenizer.pad_token_id, max_length=64,
        batch_size=4, weights=contextlib.nullcontext, prompt_lookup=num_guessed,
    )  # fmt: skip
    assert ask(model, requests) == plain
    written = sum(reply.completion_tokens for reply in plain if isinstance(reply, Reply))
    assert len(passes) < written, "some passes decoded more than one token"


def ask(model: LocalModel, requests=REQUESTS) -> list[Reply | NoReply]:
    arrived: dict[int, Reply] = {}
    replies = model.complete(requests, arrived.__setitem__)
    assert arrived == {i: r for i, r in enumerate(replies) if isinstance(r, Reply)}
    return replies


def test_replies_do_not_depend_on_the_batch(tiny_llama: LlamaForCausalLM, lab_tokenizer) -> None:
    together = ask(local(tiny_llama, lab_tokenizer, batch_size=4))
    alone = ask(local(tiny_llama, lab_tokenizer, batch_size=1))
    assert together == alone and len({r.text for r in alone if isinstance(r, Reply)}) > 1
    for reply in alone:
        assert isinstance(reply, Reply)
        assert reply.completion_tokens <= 8 and reply.finished == (reply.completion_tokens < 8)


def test_only_prompts_with_room_for_a_reply_get_one(
    tiny_llama: LlamaForCausalLM, lab_tokenizer
) -> None:
    whole = ask(local(tiny_llama, lab_tokenizer))
    lengths = [reply.prompt_tokens for reply in whole if isinstance(reply, Reply)]
    cramped = ask(local(tiny_llama, lab_tokenizer, max_length=max(lengths) + 7))
    assert isinstance(cramped[2], NoReply) and "exceed the context" in cramped[2].reason
    assert [r for i, r in enumerate(cramped) if i != 2] == [
        r for i, r in enumerate(whole) if i != 2
    ]


def test_each_attempt_is_a_reproducible_draw_of_its_own(
    tiny_llama: LlamaForCausalLM, lab_tokenizer
) -> None:
    model = local(tiny_llama, lab_tokenizer)
    first, second = ([Request((("user", "a b"),), 1.0, 8, attempt)] for attempt in (1, 2))
    before = torch.random.get_rng_state()
    assert ask(model, first) == ask(model, first) != ask(model, second)
    assert torch.equal(before, torch.random.get_rng_state()), "the trainer's generator is unchanged"


def test_a_sampled_reply_does_not_depend_on_the_batch(
    tiny_llama: LlamaForCausalLM, lab_tokenizer
) -> None:
    requests = [dataclasses.replace(request, temperature=1.0) for request in REQUESTS]
    together = ask(local(tiny_llama, lab_tokenizer, batch_size=4), requests)
    assert together == ask(local(tiny_llama, lab_tokenizer, batch_size=1), requests)
    assert together != ask(local(tiny_llama, lab_tokenizer)), "nothing was drawn"


@pytest.mark.parametrize("lora", [False, True])
def test_the_policy_as_critic_uses_its_initial_weights(
    tiny_llama: LlamaForCausalLM, lab_tokenizer, lora: bool
) -> None:
    model = tiny_llama
    if lora:
        targets = ("q_proj", "v_proj", "down_proj")
        model = add_adapters(model, rank=2, alpha=64.0, dropout=0.0, targets=targets, seed=0)
    policy = Policy(model, Schedule(1e-3))
    critic = local(policy.model, lab_tokenizer, weights=initial_weights(policy))
    frozen, initial = ask(critic), fingerprint(policy.model)
    live = local(policy.model, lab_tokenizer)
    assert ask(live) == frozen
    with torch.no_grad():
        for weight in policy.trainable.values():
            weight.add_(torch.randn_like(weight))
    assert ask(critic) == frozen
    assert ask(live) != frozen, "the trained weights are back after a critique"
    assert (fingerprint(policy.model) == initial) == lora
