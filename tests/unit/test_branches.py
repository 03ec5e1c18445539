"""No beginning is run twice, and no state notices."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from selfteach import branches, prefixes
from selfteach.branches import understood_by
from selfteach.collate import sequences
from selfteach.policy import Policy, Schedule

TOKEN = st.integers(1, 3)  # few, so that beginnings meet
TOKENS = st.lists(TOKEN, min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TOKENS, TOKENS, st.integers(1, 4)), min_size=1, max_size=5), st.data())
def test_every_path_holds_its_sequence_and_sees_itself_alone(groups, data) -> None:
    pairs = [(p, [*a, n]) for p, a, more in groups for n in range(1, more + 1)]
    order = data.draw(st.permutations(pairs))
    prompts, answers = [p for p, _ in order], [a for _, a in order]
    found = branches.branches(prompts, answers, 0, 0)
    if found is None:
        return
    at = 0
    for prompt, answer in order:
        row, last = int(found.rows_N[at]), int(found.columns_N[at + len(answer) - 1])
        seen = found.sees_RWK[row, last].nonzero()[:, 0]
        by_place = seen[found.positions_RW[row, seen].argsort()]
        assert found.ids_RW[row, by_place].tolist() == [*prompt, *answer[:-1]]
        assert found.positions_RW[row, by_place].tolist() == list(range(len(by_place)))
        predicted_from = found.columns_N[at : at + len(answer)].tolist()
        assert predicted_from == by_place.tolist()[len(prompt) - 1 :]
        at += len(answer)


def test_a_question_and_a_common_start_are_laid_out_once() -> None:
    prompts, answers = [[1, 2, 3, 4]] * 3, [[5, 6, 7], [5, 6, 8], [5, 9, 8]]
    found = branches.branches(prompts, answers, 0, 0)
    assert found is not None
    assert found.ids_RW.tolist() == [[1, 2, 3, 4, 5, 6, 9]]
    assert found.positions_RW.tolist() == [[0, 1, 2, 3, 4, 5, 5]]


def test_nothing_is_folded_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert branches.branches([[1, 2], [3, 4]], [[5, 6], [7, 8]], 0, 0) is None
    alike = [[1] * 20] * 4, [[2, 3], [3, 4], [4, 5], [5, 6]]
    assert branches.branches(*alike, 0, 0) is not None
    monkeypatch.setattr(branches, "MASK_ENTRIES", 100)
    assert branches.branches(*alike, 0, 0) is None


@pytest.mark.parametrize("common", [0, prefixes.MIN_SHARED + 2], ids=["", "behind a prefix"])
def test_scores_and_gradients_are_those_of_the_plain_pass(
    tiny_llama: LlamaForCausalLM, common: int
) -> None:
    policy = Policy(tiny_llama.double(), Schedule(1e-3))
    behind = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 9], [7]]
    prompts = [[*(2 + i % 7 for i in range(common)), *own] for own in behind]
    answers = [[5, 6, 7], [5, 6, 8, 2], [3], [3, 3], [1, 2]]
    side = sequences(prompts, answers, pad_id=0)
    assert side.branches is not None and side.branches.ids_RW.numel() < side.ids_BT.numel()
    found = []
    assert side.shared == common
    for way in (side, dataclasses.replace(side, branches=None, shared=0)):
        logits = policy.score(way).logits(slice(None))
        (logits.sin() * torch.arange(logits.shape[1])).sum().backward()
        found.append((logits.detach(), [w.grad for w in policy.trainable.values()]))
        policy.optimizer.zero_grad(set_to_none=True)
    (folded, folded_grads), (plain, plain_grads) = found
    torch.testing.assert_close(folded, plain, rtol=0, atol=1e-6 * float(plain.abs().max()))
    for one, other in zip(folded_grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_a_model_that_looks_through_a_window_is_left_alone(tiny_llama: LlamaForCausalLM) -> None:
    assert understood_by(tiny_llama)
    own = tiny_llama.config
    config = MistralConfig(
        vocab_size=own.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    assert not understood_by(MistralForCausalLM(config).eval())
