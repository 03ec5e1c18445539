"""Our losses against TRL 1.16's: restated here in a few lines, and its own code where importable.

How the conventions map (``trl`` on the left):

* GKD ``generalized_jsd_loss(beta)`` and SDPO ``alpha``: 0 is KL(teacher ‖ student), ``forward_kl``
  here; 1 is KL(student ‖ teacher), ``reverse_kl``; between them the *unscaled* JSD, in which beta
  is the teacher's share of the mixture, as here. TRL's loss therefore jumps at both ends: just
  inside them it is near 0. Ours refuses beta 0 and 1; ``jsd_scaled`` is the version without jumps.
* SDPO top-K takes the student's K, with a tail of 1 - sum held below 1 - 1e-7; ours has no floor.
* SDPO's sampled token is our ``reverse_kl`` without control variate.
* GRPO divides by the unbiased standard deviation of the group + 1e-4; ``grpo`` averages tokens of
  each answer and then answers, ``bnpo`` and ``dapo`` average tokens (of the micro-batch, of the
  whole batch). The clip is (1 - epsilon, 1 + epsilon_high); its KL is k3.
"""

import math
import warnings
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from selfteach.losses.divergence import Divergence, per_token
from selfteach.losses.policy_gradient import (
    clipped_surrogate,
    entropy,
    group_advantages,
    k3,
    token_logp,
)

B, T, V = 3, 4, 8
ALPHAS = [0.0, 0.3, 0.5, 0.9, 1.0]


def trl(module: str) -> ModuleType:
    """A module of TRL, or a skipped test; its import warnings are not about us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        version = pytest.importorskip("trl", reason="TRL is not installed").__version__
        if version != "1.16.0":
            pytest.skip(f"stated for TRL 1.16.0, found {version}")
        return import_module(module)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT_BTV, TEACHER_BTV = 2 * noise(2, B, T, V)
IDS_BT = torch.arange(B * T).view(B, T) % V


def close(got: Tensor, want: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-13)


def ours(alpha: float, **words: Any) -> Divergence:
    """TRL's alpha or beta as one of our specs."""
    if alpha in (0.0, 1.0):
        return Divergence("reverse_kl" if alpha else "forward_kl", **words)
    return Divergence("jsd", beta=alpha, **words)


def loss_and_gradient(spec: Divergence) -> tuple[Tensor, Tensor]:
    student_BTV = STUDENT_BTV.clone().requires_grad_()
    loss_BT = per_token(spec, student_BTV, TEACHER_BTV, IDS_BT).loss
    return loss_BT.detach(), torch.autograd.grad(loss_BT.sum(), student_BTV)[0]


def theirs_and_gradient(fn: Any) -> tuple[Tensor, Tensor]:
    student_BTV = STUDENT_BTV.clone().requires_grad_()
    loss_BT = fn(student_BTV)
    return loss_BT.detach(), torch.autograd.grad(loss_BT.sum(), student_BTV)[0]


def restated_divergence(p: list[float], q: list[float], alpha: float) -> float:
    """TRL's alpha-divergence of teacher p and student q, as sums of numbers."""

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    if alpha == 0.0:
        return kl(p, q)
    if alpha == 1.0:
        return kl(q, p)
    m = [alpha * x + (1 - alpha) * y for x, y in zip(p, q, strict=True)]
    return alpha * kl(p, m) + (1 - alpha) * kl(q, m)


def softmax(logits: Tensor, temperature: float = 1.0) -> list[float]:
    masses = [math.exp(x / temperature) for x in logits.tolist()]
    return [mass / sum(masses) for mass in masses]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gkd_restated(alpha, temperature) -> None:
    loss_BT, _ = loss_and_gradient(ours(alpha, temperature=temperature))
    for b in range(B):
        for t in range(T):
            p = softmax(TEACHER_BTV[b, t], temperature)
            q = softmax(STUDENT_BTV[b, t], temperature)
            assert loss_BT[b, t].item() == pytest.approx(
                restated_divergence(p, q, alpha), rel=1e-11
            )


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_sdpo_top_k_restated(alpha, k) -> None:
    loss_BT, _ = loss_and_gradient(ours(alpha, support="top_k", top_k=k))
    for b in range(B):
        for t in range(T):
            p, q = softmax(TEACHER_BTV[b, t]), softmax(STUDENT_BTV[b, t])
            top = sorted(range(V), key=lambda entry: q[entry], reverse=True)[:k]
            p, q = ([side[i] for i in top] + [1 - sum(side[i] for i in top)] for side in (p, q))
            assert loss_BT[b, t].item() == pytest.approx(restated_divergence(p, q, alpha), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gkd_itself(alpha, temperature) -> None:
    trainer = trl("trl.experimental.gkd.gkd_trainer").GKDTrainer
    got = loss_and_gradient(ours(alpha, temperature=temperature))
    want = theirs_and_gradient(
        lambda student_BTV: trainer.generalized_jsd_loss(
            student_BTV, TEACHER_BTV, beta=alpha, temperature=temperature, reduction="none"
        ).sum(-1)
    )
    close(got[0], want[0])
    close(got[1], want[1])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_sdpo_full_vocabulary_itself(alpha) -> None:
    module = trl("trl.experimental.sdpo.loss_utils")
    got = loss_and_gradient(ours(alpha))
    want = theirs_and_gradient(
        lambda student_BTV: module.compute_full_logit_self_distillation_loss(
            student_BTV, TEACHER_BTV, distillation_alpha=alpha
        )
    )
    close(got[0], want[0])
    close(got[1], want[1])


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_sdpo_top_k_itself(alpha, k) -> None:
    module = trl("trl.experimental.sdpo.loss_utils")
    got = loss_and_gradient(ours(alpha, support="top_k", top_k=k))
    want = theirs_and_gradient(
        lambda student_BTV: module.compute_topk_self_distillation_loss(
            student_BTV,
            TEACHER_BTV,
            distillation_topk=k,
            distillation_alpha=alpha,
            distillation_add_tail=True,
        )
    )
    close(got[0], want[0], rtol=1e-9)  # 1 - sum loses digits that the sum of the rest keeps
    close(got[1], want[1], rtol=1e-8)


def test_sdpo_sampled_token_itself() -> None:
    module = trl("trl.experimental.sdpo.loss_utils")
    got = loss_and_gradient(Divergence("reverse_kl", support="sampled"))
    want = theirs_and_gradient(
        lambda student_BTV: module.compute_sampled_token_self_distillation_loss(
            student_BTV, TEACHER_BTV, IDS_BT, distillation_alpha=1.0
        )
    )
    close(got[0], want[0])
    close(got[1], want[1])


def test_token_statistics_themselves() -> None:
    module = trl("trl.trainer.utils")
    want_BT = module.selective_log_softmax(STUDENT_BTV, IDS_BT, temperature=0.7)
    close(token_logp(STUDENT_BTV, IDS_BT, 0.7), want_BT)
    close(entropy(STUDENT_BTV), module.entropy_from_logits(STUDENT_BTV))


REWARDS = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0]


def grouped_advantages() -> tuple[Tensor, Tensor]:
    """Two groups' rewards less their means, and our advantages."""
    rewards_GK = torch.tensor(REWARDS, dtype=torch.float64).view(2, 4)
    got = group_advantages(REWARDS, [0] * 4 + [1] * 4, scale_rewards="group")
    centred_GK = rewards_GK - rewards_GK.mean(1, keepdim=True)
    return centred_GK, torch.tensor(got, dtype=torch.float64).view(2, 4)


def test_group_advantages_restated() -> None:
    centred_GK, got_GK = grouped_advantages()
    deviation_G1 = (centred_GK.square().sum(1, keepdim=True) / (4 - 1)).sqrt()
    close(got_GK, centred_GK / (deviation_G1 + 1e-4))


def test_group_advantages_with_trls_own_deviation() -> None:
    nanstd = trl("trl.trainer.utils").nanstd
    centred_GK, got_GK = grouped_advantages()
    want_GK = centred_GK / (nanstd(centred_GK, dim=1, keepdim=True) + 1e-4)
    close(got_GK, want_GK, rtol=1e-7)  # TRL takes n / (n - 1) in float32


# Answers of 4, 2 and 3 tokens.
MASK_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.float64)
LOGP_BT, OLD_BT, REFERENCE_BT = -1 + 0.5 * noise(3, B, T, seed=1)
ADVANTAGE_B = torch.tensor([1.5, -0.5, -1.0], dtype=torch.float64)
LOW, HIGH, KL = 0.2, 0.28, 0.04
# Each token's weight, before the sum, under TRL's names.
WEIGHTS = {
    "grpo": MASK_BT / MASK_BT.sum(1, keepdim=True) / B,
    "bnpo": MASK_BT / MASK_BT.sum(),
    "dapo": MASK_BT / MASK_BT.sum(),
}


def our_grpo(logp_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """The masked sum as our trainer forms it: answer tokens in one row, weights beside them."""
    scored = MASK_BT.bool()
    logp_N, old_N, reference_N = logp_BT[scored], OLD_BT[scored], REFERENCE_BT[scored]
    advantage_N = ADVANTAGE_B[:, None].expand(B, T)[scored]
    loss_N, _ = clipped_surrogate(logp_N, old_N, advantage_N, clip_low=LOW, clip_high=HIGH)
    return (weight_BT[scored] * (loss_N + KL * k3(logp_N, reference_N))).sum()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_grpo_restated(kind) -> None:
    answers, tokens = [], []
    for b in range(B):
        losses = []
        for t in range(int(MASK_BT[b].sum())):
            ratio = math.exp(LOGP_BT[b, t] - OLD_BT[b, t])
            bounded = min(max(ratio, 1 - LOW), 1 + HIGH)
            advantage = ADVANTAGE_B[b].item()
            gap = (REFERENCE_BT[b, t] - LOGP_BT[b, t]).item()
            penalty = math.exp(gap) - gap - 1
            losses.append(-min(ratio * advantage, bounded * advantage) + KL * penalty)
        answers.append(sum(losses) / len(losses))
        tokens += losses
    want = sum(answers) / B if kind == "grpo" else sum(tokens) / len(tokens)
    assert our_grpo(LOGP_BT, WEIGHTS[kind]).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_grpo_itself(kind) -> None:
    compute_loss = trl("trl.trainer.grpo_trainer").GRPOTrainer._compute_loss
    logp_BT = LOGP_BT.clone().requires_grad_()
    want = compute_loss(fake_trainer(kind, logp_BT), None, trl_inputs())
    got = our_grpo(logp_BT, WEIGHTS[kind])
    close(got.detach(), want.detach())
    close(torch.autograd.grad(got, logp_BT)[0], torch.autograd.grad(want, logp_BT)[0])


def trl_inputs() -> dict[str, Tensor]:
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    return {
        "prompt_ids": ids_BT[:, :1],
        "prompt_mask": ids_BT[:, :1] + 1,
        "completion_ids": ids_BT,
        "completion_mask": MASK_BT,
        "advantages": ADVANTAGE_B,
        "old_per_token_logps": OLD_BT,
        "ref_per_token_logps": REFERENCE_BT,
        "num_items_in_batch": MASK_BT.sum(),
    }


class Ledger(dict):
    """Metrics that nobody reads."""

    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])


def fake_trainer(kind: str, logp_BT: Tensor) -> SimpleNamespace:
    """As much of a GRPOTrainer as its loss reads, with our log-probabilities for the model's."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp_BT, torch.zeros(B, T), None),
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        _metrics={"eval": Ledger()},
        loss_type=kind,
        beta=KL,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )
