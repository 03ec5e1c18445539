"""The transformers engine: its distribution, and rollouts that do not depend on their batch."""

from __future__ import annotations

import pytest
import torch

from selfteach.config.recipe import Recipe
from selfteach.errors import EngineError
from selfteach.losses.policy_gradient import token_logp
from selfteach.models.sequences import sequences
from selfteach.rollout.decoding.token_sampling import BLOCK, TokenDistribution, sample_token
from selfteach.rollout.transformers_engine import TransformersEngine
from selfteach.trainer.build import build
from selfteach.types import Problem, Sampling

RECIPE = Recipe.model_validate(
    {
        "data": {"type": "lab", "train": 6, "validation": 1, "test": 1},
        "train": {"steps": 0},
    }
)
FULL = TokenDistribution(1.0)
SAMPLING = Sampling(samples=3, temperature=1.0, max_tokens=40, seed=5)


@pytest.fixture(scope="module")
def built():
    return build(RECIPE)


def engine_of(built, end_ids: tuple[int, ...] | None = None, max_length: int = 256):
    components = built.components
    return TransformersEngine(
        components.policy.model,
        components.renderer,
        end_ids=end_ids or (built.tokenizer.eos_token_id,),
        pad_id=components.pad_id,
        max_length=max_length,
    )


def test_sampled_log_probabilities_are_the_trainers(built) -> None:
    for rollout in built.components.engine.generate(built.task.train, SAMPLING):
        side = sequences([rollout.prompt_ids], [rollout.token_ids], built.components.pad_id)
        with torch.no_grad():
            logits = built.components.policy.score(side).logits(slice(None))
        logp = token_logp(logits, torch.tensor(rollout.token_ids), SAMPLING.temperature)
        assert logp.tolist() == pytest.approx(list(rollout.logps), abs=1e-4)


def test_a_rollout_does_not_depend_on_its_batch_or_its_order(built) -> None:
    problems = built.task.train
    together = {(r.problem.id, r.sample): r for r in engine_of(built).generate(problems, SAMPLING)}
    backwards = engine_of(built).generate(problems[::-1], SAMPLING)
    alone = [r for p in problems for r in engine_of(built).generate([p], SAMPLING)]
    more = engine_of(built).generate(problems[:2], Sampling(5, 1.0, 40, 5))
    for other in [*backwards, *alone, *(r for r in more if r.sample < 3)]:
        assert other.token_ids == together[other.problem.id, other.sample].token_ids


def test_seed_sample_and_version_each_change_the_draw(built) -> None:
    problem = built.task.train[:1]
    engine = engine_of(built)
    first = [r.token_ids for r in engine.generate(problem, SAMPLING)]
    assert len(set(first)) > 1
    assert [r.token_ids for r in engine.generate(problem, SAMPLING)] == first
    other_seed = engine.generate(problem, Sampling(3, 1.0, 40, 6))
    assert [r.token_ids for r in other_seed] != first
    engine.load_weights([], version=1)
    again = engine.generate(problem, SAMPLING)
    assert [r.token_ids for r in again] != first
    assert {r.policy_version for r in again} == {1}


def test_problems_have_separate_random_streams(built) -> None:
    # The same question under two ids: only the id separates their streams.
    one = built.task.train[0]
    twin = Problem("twin", one.question, one.answer)
    sampling = Sampling(8, 1.0, 40, 5)
    first, second = (engine_of(built).generate([p], sampling) for p in (one, twin))
    assert [r.token_ids for r in first] != [r.token_ids for r in second]


def test_nearly_zero_temperature_is_greedy_generate(built) -> None:
    model, pad = built.components.policy.model, built.components.pad_id
    for rollout in engine_of(built).generate(built.task.train, Sampling(1, 1e-6, 40, 0)):
        prompt = torch.tensor([rollout.prompt_ids])
        out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt),
                             do_sample=False, max_new_tokens=40, pad_token_id=pad)  # fmt: skip
        assert tuple(out[0, prompt.shape[1] :].tolist()) == rollout.token_ids


def test_prompts_of_different_lengths_share_a_batch(built) -> None:
    short, long = built.task.train[0], built.task.train[1]
    padded = Problem("padded", f"{long.question} {long.question}", long.answer)
    alone = engine_of(built).generate([short], SAMPLING)
    beside = engine_of(built).generate([short, padded], SAMPLING)[:3]
    assert [r.token_ids for r in alone] == [r.token_ids for r in beside]
    for a, b in zip(alone, beside, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-4)


def test_finished_rows_leave_without_an_effect_on_others(built) -> None:
    vocabulary = built.tokenizer.get_vocab()
    early = (built.tokenizer.eos_token_id, vocabulary["+"], vocabulary["k"])
    whole = engine_of(built).generate(built.task.train, SAMPLING)
    cut = engine_of(built, early).generate(built.task.train, SAMPLING)
    assert len({len(r.token_ids) for r in cut}) > 3, "rollouts end at many different lengths"
    for a, b in zip(whole, cut, strict=True):
        stop = next(i for i, token in enumerate(a.token_ids) if token in early)
        assert b.token_ids == a.token_ids[: stop + 1] and b.finished


def test_a_rollout_cut_at_the_token_limit_is_not_finished(built) -> None:
    for rollout in engine_of(built).generate(built.task.train, Sampling(2, 1.0, 7, 0)):
        assert len(rollout.token_ids) == 7 and not rollout.finished
    room = len(built.components.renderer.solver_prompt(built.task.train[0])) + 5
    for rollout in engine_of(built, max_length=room).generate(built.task.train, SAMPLING):
        assert len(rollout.token_ids) == 5


def test_a_prompt_without_room_for_a_rollout_is_an_error(built) -> None:
    with pytest.raises(EngineError, match=r"prompt of 8 tokens; it leaves no room .* context of 8"):
        engine_of(built, max_length=8).generate(built.task.train[:1], SAMPLING)


def test_sample_token_inverts_the_distribution() -> None:
    # Probabilities .5 .25 .25: cumulative .5 .75 1.
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(5, 3)
    token, logp = sample_token(logits, torch.tensor([0.0, 0.499, 0.501, 0.751, 0.999]), FULL)
    assert token.tolist() == [0, 0, 1, 2, 2]
    assert logp.exp().tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.25])
    # At temperature ½ probabilities are squared: 4 1 1 of 6.
    token, logp = sample_token(logits[:2], torch.tensor([0.66, 0.67]), TokenDistribution(0.5))
    assert token.tolist() == [0, 1]
    assert logp.exp().tolist() == pytest.approx([4 / 6, 1 / 6])


@pytest.mark.parametrize("vocabulary", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 7])
def test_sample_token_of_a_large_vocabulary_inverts_the_whole_sum(vocabulary: int) -> None:
    logits, row = 4 * torch.randn(3, vocabulary), torch.arange(3).repeat(200)
    share = logits.double().softmax(-1)
    expected = torch.multinomial(share, 200, replacement=True).T.flatten()
    # In the middle of a token's share no rounding decides.
    middle = (share.cumsum(-1) - share / 2)[row, expected]
    token, logp = sample_token(logits, middle, FULL, row)
    assert token.tolist() == expected.tolist()
    torch.testing.assert_close(logp.double(), share[row, expected].log(), rtol=0, atol=1e-5)


def test_sample_token_never_returns_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(1001, 5)
    token, _ = sample_token(logits, torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64), FULL)
    assert set(token.tolist()) == {1, 3}


def test_loading_weights_copies_what_is_not_shared(built) -> None:
    name, param = next(iter(built.components.policy.trainable.items()))
    before = param.detach().clone()
    engine = engine_of(built)
    engine.load_weights([(name, param)], 1)
    assert torch.equal(param, before)
    engine.load_weights([(name, before + 1)], 2)
    assert torch.equal(param, before + 1)
    engine.load_weights([(name, before)], 3)
