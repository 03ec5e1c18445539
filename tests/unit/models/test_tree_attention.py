"""Tree attention computes each shared prefix once and leaves scores and gradients unchanged."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from selfteach.models import prefix_cache, tree_attention
from selfteach.models.policy import Policy, Schedule
from selfteach.models.sequences import sequences
from selfteach.models.trainable_model import recompute_activations
from selfteach.models.tree_attention import enable_tree_attention

TOKEN = st.integers(1, 3)  # few, so that beginnings meet
TOKENS = st.lists(TOKEN, min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(TOKENS, TOKENS, st.integers(1, 4)), min_size=1, max_size=5),
    st.integers(0, 3),
    st.data(),
)
def test_every_path_holds_its_sequence_and_no_prefix_is_repeated(groups, shared, data) -> None:
    start = [1] * shared
    pairs = [([*start, *p], [*a, n]) for p, a, more in groups for n in range(1, more + 1)]
    order = data.draw(st.permutations(pairs))
    prompts, answers = [p for p, _ in order], [a for _, a in order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "MIN_SAVING", 1.0)
        tree = tree_attention.build_token_tree(prompts, answers, shared)
    assert tree is not None
    ids_U, positions_U = tree.ids_1U[0], tree.positions_1U[0]
    whole = [[*p, *a[:-1]][shared:] for p, a in order]
    predicting = list[int]()
    for path_L, sequence, answer in zip(tree.path_BL, whole, answers, strict=True):
        path_T = path_L[: len(sequence)]
        assert ids_U[path_T].tolist() == sequence
        assert positions_U[path_T].tolist() == list(range(shared, shared + len(sequence)))
        predicting += path_T[len(sequence) - len(answer) :].tolist()
    assert tree.columns_N.tolist() == predicting
    beginnings = {
        tuple(sequence[:end]) for sequence in whole for end in range(1, len(sequence) + 1)
    }
    assert len(ids_U) == len(beginnings)
    assert tree.path_BL.flatten()[tree.first_U].tolist() == list(range(len(ids_U)))
    column_U = tree.first_U % tree.path_BL.shape[1]
    assert torch.equal(column_U + shared, positions_U)  # a token, never a path's padding


def test_a_shared_prompt_and_common_start_have_one_node_per_token() -> None:
    prompts, answers = [[1, 2, 3, 4]] * 3, [[5, 6, 7], [5, 6, 8], [5, 9, 8]]
    tree = tree_attention.build_token_tree(prompts, answers, 0)
    assert tree is not None
    assert tree.ids_1U.tolist() == [[1, 2, 3, 4, 5, 6, 9]]
    assert tree.positions_1U.tolist() == [[0, 1, 2, 3, 4, 5, 5]]
    assert tree.path_BL.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6]]


def test_no_tree_is_built_where_it_saves_too_little() -> None:
    assert tree_attention.build_token_tree([[1, 2], [3, 4]], [[5, 6], [7, 8]], 0) is None
    assert tree_attention.build_token_tree([[1] * 20] * 2, [[2, 3], [3, 4]], 0) is not None


@pytest.mark.parametrize("common", [0, prefix_cache.MIN_SHARED + 2], ids=["", "behind a prefix"])
@pytest.mark.parametrize("kind", ["llama", "grouped", "recomputed", "gpt2"])
def test_scores_and_gradients_are_those_of_the_plain_pass(
    tiny_llama: LlamaForCausalLM, common: int, kind: str
) -> None:
    if kind == "recomputed" and common:
        pytest.skip("nothing is shared where activations are recomputed")
    model = MODELS[kind](tiny_llama).double()
    if kind == "recomputed":
        recompute_activations(model)
    policy = Policy(model, Schedule(1e-3))
    behind = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 9], [7]]
    prompts = [[*(2 + i % 7 for i in range(common)), *rest] for rest in behind]
    answers = [[5, 6, 7], [5, 6, 8, 2], [3], [3, 3], [1, 2]]
    side = sequences(prompts, answers, pad_id=0)
    assert side.tree is not None and side.tree.ids_1U.numel() < side.ids_BT.numel()
    results, passed = [], list[torch.Size]()
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: passed.append(args[0].shape))
    assert side.shared == common
    for way in (side, dataclasses.replace(side, tree=None, shared=0)):
        logits = policy.score(way).logits(slice(None))
        (logits.sin() * torch.arange(logits.shape[1])).sum().backward()
        grads = [w.grad for w in policy.trainable.values() if w.grad is not None]
        assert len(grads) == len(policy.trainable)
        results.append((logits.detach(), grads))
        policy.optimizer.zero_grad(set_to_none=True)
    assert side.tree.ids_1U.shape in passed, "the tree was not run"
    (with_tree, tree_grads), (plain, plain_grads) = results
    torch.testing.assert_close(with_tree, plain, rtol=0, atol=1e-6 * float(plain.abs().max()))
    for one, other in zip(tree_grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def grouped(like: LlamaForCausalLM) -> LlamaForCausalLM:
    """Build a model with two query heads per key head."""
    torch.manual_seed(3)
    plain = {**like.config.to_dict(), "num_key_value_heads": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**plain)).eval()


def gpt2(like: LlamaForCausalLM) -> GPT2LMHeadModel:
    """Build a model with learned, added positions."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=like.config.vocab_size, n_positions=96, n_embd=16, n_layer=2, n_head=2,
        initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


MODELS = {
    "llama": lambda model: model, "grouped": grouped, "recomputed": lambda model: model,
    "gpt2": gpt2,
}  # fmt: skip


def test_a_saved_config_does_not_name_our_attention(tiny_llama: LlamaForCausalLM, tmp_path) -> None:
    assert enable_tree_attention(tiny_llama) and enable_tree_attention(tiny_llama)
    tiny_llama.save_pretrained(tmp_path)
    assert tree_attention.ATTENTION not in (tmp_path / "config.json").read_text()
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_a_model_whose_attention_ignores_paths_is_left_unchanged(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention, "forward", lambda *args, paths=None, **more: forward(*args, **more)
    )
    assert not enable_tree_attention(tiny_llama)
    assert tiny_llama.config._attn_implementation == "sdpa"


def test_a_model_with_a_sliding_window_is_left_unchanged(tiny_llama: LlamaForCausalLM) -> None:
    assert enable_tree_attention(tiny_llama)
    base = tiny_llama.config
    config = MistralConfig(
        vocab_size=base.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    assert not enable_tree_attention(MistralForCausalLM(config).eval())
