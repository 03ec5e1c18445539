"""Episodes in the loss: the model's tokens alone, wherever an environment's stand between them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM
from two_turns import PROBLEM, episode

from selfteach.episodes import Segment
from selfteach.losses.divergence import Divergence
from selfteach.losses.objectives import Anneal, Distillation, Grpo, Hybrid
from selfteach.losses.token_masks import TokenMask
from selfteach.models.lm_head import Head, Scores
from selfteach.models.sequences import select_tokens, sequences
from selfteach.protocols import Objective
from selfteach.trainer.batching import collate
from selfteach.trainer.metrics import loss_coverage, summarize_samples
from selfteach.types import (
    CritiquedRollout,
    Problem,
    Rollout,
    Sequences,
    TokenWeights,
    TrainingSample,
    Verdict,
)

PAD = 0
TEACHER_PROMPT = (1, 2, 9, 9)


def sample_of(rollout: Rollout, *, correct: bool = False, **fields: object) -> TrainingSample:
    critiqued = CritiquedRollout(rollout, Verdict(correct, True, "a"), None)
    return TrainingSample(critiqued, teacher_prompt_ids=TEACHER_PROMPT, **fields)  # type: ignore[arg-type]


def score(model: LlamaForCausalLM, side: Sequences) -> Scores:
    hidden_BTH = model.model(input_ids=side.ids_BT).last_hidden_state
    head = Head(model.lm_head.weight)
    return Scores(((hidden_BTH[side.rows_N, side.columns_N], head, 1.0),))


def test_a_two_turn_batch_by_hand() -> None:
    """Ids 3 4 | 20 21 22 | 5: an environment's tokens are read and not among the batch's N."""
    sample = sample_of(episode((3, 4), (20, 21, 22), (5,)))
    weights = TokenWeights((0.1, 0.2, 7.0, 7.0, 7.0, 0.3), 2.0, (0.0, 0.5, 9.0, 9.0, 9.0, 1.0))
    (batch,) = collate([sample], [weights], pad_id=PAD, micro_batch_tokens=100)
    assert batch.ids_N.tolist() == [3, 4, 5]
    assert batch.student.ids_BT.tolist() == [[1, 2, 3, 4, 20, 21, 22, 5]]
    assert batch.student.columns_N.tolist() == [1, 2, 6]
    assert batch.teacher is not None
    assert batch.teacher.ids_BT.tolist() == [[*TEACHER_PROMPT, 3, 4, 20, 21, 22, 5]]
    assert batch.teacher.columns_N.tolist() == [3, 4, 8]
    assert batch.student.rows_N.tolist() == [0, 0, 0]
    torch.testing.assert_close(batch.weight_N, torch.tensor([0.1, 0.2, 0.3]))
    assert batch.advantage_N.tolist() == [2.0] * 3
    assert batch.sampled_logp_N.tolist() == [-0.5] * 3
    assert batch.share_N is not None and batch.share_N.tolist() == [0.0, 0.5, 1.0]


def test_a_tree_scores_the_model_s_tokens_alone() -> None:
    """Two episodes of one prompt share their first turn: paths of a tree, with the same columns."""
    runs = [((3, 4), (20, 21), (5, 6)), ((3, 4), (20, 21), (7,))]
    rollouts = [episode(*run, prompt=range(1, 9)) for run in runs]
    at = [rollout.model_positions for rollout in rollouts]
    completions = [rollout.token_ids for rollout in rollouts]
    whole = sequences([r.prompt_ids for r in rollouts], completions, PAD)
    side = select_tokens(whole, [len(row) for row in completions], at)
    assert side.tree is not None and whole.tree is not None
    nodes = side.tree.ids_1U[0]
    # The token at a node is the last that is read before the one that is predicted.
    assert nodes[side.tree.columns_N].tolist() == [8, 3, 21, 5, 8, 3, 21]


OBJECTIVES: dict[str, Objective] = {
    "distillation": Distillation(Divergence("reverse_kl"), 1.0),
    "from the first error": Distillation(
        Divergence("jsd"), 1.0, TokenMask(from_first_error=True), aggregation="sequence_mean"
    ),
    "changed steps": Distillation(Divergence("forward_kl"), 1.0, TokenMask("all", False, 0.5)),
    "grpo": Grpo(1.0),
    "grpo by rollout": Grpo(1.0, aggregation="sequence_mean", importance_level="sequence"),
    "hybrid": Hybrid(
        Distillation(Divergence("reverse_kl"), 1.0, TokenMask(from_first_error=True)),
        Grpo(1.0), Anneal(0.3, 0.3), None, "others",
    ),
}  # fmt: skip


def group() -> list[TrainingSample]:
    """Return three episodes of one problem, and one of another; the second turn of two is wrong."""
    other = Problem("r", "q", "a")
    return [
        sample_of(
            episode((3, 4), (20, 21, 22), (5, 6, 7)),
            first_error_token=5, changed_spans=((5, 8),),
        ),
        sample_of(episode((3,), (20, 21), (8, 9), (22,), (10,), sample=1), correct=True),
        sample_of(
            episode((11, 12, 13), sample=2), first_error_token=0, changed_spans=((0, 3),)
        ),
        sample_of(
            episode((4, 6), (21, 23, 24, 25), (9,), problem=other),
            first_error_token=6, changed_spans=((6, 7),),
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("micro_batch_tokens", [1, 1000])
def test_a_step_s_loss_is_the_slow_sum_over_the_model_s_tokens(
    tiny_llama: LlamaForCausalLM, name: str, micro_batch_tokens: int
) -> None:
    """Masked is sliced: each turn is scored by itself, after all that stands before it."""
    objective, samples = OBJECTIVES[name], group()
    model = tiny_llama.double()
    denominators = objective.denominators(samples)
    weights = objective.token_weights(samples, denominators, 0)
    batches = collate(samples, weights, pad_id=PAD, micro_batch_tokens=micro_batch_tokens)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        batch = dataclasses.replace(batch, weight_N=batch.weight_N.double())
        with torch.no_grad():
            teacher = score(model, batch.teacher) if batch.teacher and _distils(name) else None
        loss, _ = objective.loss(score(model, batch.student), teacher, batch, 2)
        total = total + loss.detach()
    assert total.item() == pytest.approx(_slow(model, name, samples), rel=1e-6, abs=1e-7)


def _distils(name: str) -> bool:
    return not name.startswith("grpo")


def _slow(model: LlamaForCausalLM, name: str, samples: list[TrainingSample]) -> float:
    """Compute a step's loss token by token: plain passes, counts and sums over turns."""
    rewards = [float(sample.critiqued.verdict.correct) for sample in samples]
    mean = sum(rewards[:3]) / 3
    std = (sum((reward - mean) ** 2 for reward in rewards[:3]) / 2) ** 0.5
    advantages = [*((reward - mean) / (std + 1e-4) for reward in rewards[:3]), 0.0]
    turns = [[i for t in s.rollout.turns for i in range(t.start, t.stop)] for s in samples]
    passing = turns
    if name in ("from the first error", "hybrid"):
        firsts = [s.first_error_token for s in samples]
        passing = [
            [i for i in row if first is not None and i >= first]
            for row, first in zip(turns, firsts, strict=True)
        ]
    if name == "changed steps":
        spans = [[i for a, b in s.changed_spans for i in range(a, b)] for s in samples]
        passing = [span[: len(row) // 2] for span, row in zip(spans, turns, strict=True)]

    def distilled() -> float:
        kind = {"from the first error": "jsd", "changed steps": "forward_kl"}.get(
            name, "reverse_kl"
        )
        sums = [
            sum(_divergence(model, sample, i, kind) for i in row)
            for sample, row in zip(samples, passing, strict=True)
        ]
        if name != "from the first error":
            return sum(sums) / sum(map(len, passing))
        rows = [(total, len(row)) for total, row in zip(sums, passing, strict=True) if row]
        return sum(total / n for total, n in rows) / len(rows)

    def rewarded(rows: list[list[int]]) -> float:
        # On-policy the ratio is 1, so a token's loss is minus its advantage.
        if name == "grpo by rollout":
            return sum(-a for a in advantages) / len(samples)
        sums = sum(-a * len(row) for a, row in zip(advantages, rows, strict=True))
        return sums / sum(map(len, rows))

    if name.startswith("grpo"):
        return rewarded(turns)
    if name != "hybrid":
        return distilled()
    others = [[i for i in row if i not in gated] for row, gated in zip(turns, passing, strict=True)]
    return 0.3 * distilled() + 0.7 * rewarded(others)


@torch.no_grad()
def _divergence(model: LlamaForCausalLM, sample: TrainingSample, at: int, kind: str) -> float:
    """Return the divergence at one token, from two passes over exactly what stands before it."""
    before = sample.rollout.token_ids[:at]
    student, teacher = (
        model(input_ids=torch.tensor([[*prompt, *before]])).logits[0, -1].log_softmax(-1)
        for prompt in (sample.rollout.prompt_ids, TEACHER_PROMPT)
    )
    s, t = student.exp(), teacher.exp()
    if kind == "reverse_kl":
        return float((s * (student - teacher)).sum())
    if kind == "forward_kl":
        return float((t * (teacher - student)).sum())
    m = ((s + t) / 2).log()
    return float(0.5 * (s * (student - m)).sum() + 0.5 * (t * (teacher - m)).sum())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_environment_s_tokens_are_in_no_denominator_and_have_no_weight(name: str) -> None:
    objective, samples = OBJECTIVES[name], group()
    weights = objective.token_weights(samples, objective.denominators(samples), 0)
    for sample, row in zip(samples, weights, strict=True):
        mask = sample.rollout.model_mask
        assert not any(w for w, is_model in zip(row.weights, mask, strict=True) if not is_model)
    longer = group()
    longer[1] = sample_of(
        episode((3,), (20,) * 50, (8, 9), (22,) * 9, (10,), sample=1), correct=True
    )
    assert objective.denominators(longer) == objective.denominators(samples)


def test_an_episode_of_one_turn_is_a_single_answer_bit_for_bit() -> None:
    answer = Rollout(PROBLEM, 0, (1, 2), (3, 4, 5), (-0.5,) * 3, "3 4 5", True, 0)
    segment = Segment("model", 0, 3, "3 4 5")
    turn = dataclasses.replace(answer, segments=(segment,))
    samples = [sample_of(one, correct=True) for one in (answer, turn)]
    batches = []
    for sample in samples:
        objective = OBJECTIVES["distillation"]
        (weights,) = objective.token_weights([sample], objective.denominators([sample]), 0)
        batches += collate([sample], [weights], pad_id=PAD, micro_batch_tokens=100)
    for name in ("ids_N", "weight_N", "advantage_N", "sampled_logp_N"):
        assert torch.equal(getattr(batches[0], name), getattr(batches[1], name)), name
    assert torch.equal(batches[0].student.columns_N, batches[1].student.columns_N)
    ignored = ("turns", "environment_tokens")
    plain, same = summarize_samples(samples[:1]), summarize_samples(samples[1:])
    assert plain == {name: value for name, value in same.items() if name not in ignored}


def test_metrics_are_of_the_model_s_tokens() -> None:
    sample = sample_of(episode((3, 4), (20,) * 30, (5, 6), texts=("wait", "wait wait", "b")))
    metrics = summarize_samples([sample])
    assert metrics["length"] == metrics["tokens_sampled"] == 4
    assert metrics["entropy"] == 0.5
    assert metrics["repetition"] == 0 and metrics["hesitations"] == 1
    assert metrics["turns"] == 2 and metrics["environment_tokens"] == 30
    assert metrics["event/tool_result"] == 1
    ends = TokenWeights((0.0,) * 33 + (1.0,))
    assert loss_coverage([sample], [ends])["eos_in_loss"] == 1


def test_thoughts_of_later_turns_are_not_scored() -> None:
    sample = sample_of(
        episode((3, 4), (20, 21), (5, 6, 7)), scored_from=1, unscored=((4, 6),)
    )  # fmt: skip
    expected = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert TokenMask().mask(sample) == expected
    assert Grpo(1.0).masks([sample]) == [expected]


def test_segments_must_tile_the_tokens() -> None:
    rollout = episode((3, 4), (20,), (5,))
    with pytest.raises(AssertionError, match="tile"):
        dataclasses.replace(rollout, segments=rollout.segments[:2])
