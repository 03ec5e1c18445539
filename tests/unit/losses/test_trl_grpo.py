"""GRPO's forms against TRL 1.16's own code, on the same tensors; skipped where TRL is absent.

TRL's ``epsilon_high`` is the cap itself under ``cispo``, where ours is 1 + ``clip_high``. A step is one
batch here, so ``bnpo`` is compared with one micro-batch.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections import defaultdict
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from grpo_case import (
    FINISHED,
    FORMS,
    LENGTHS,
    LIMIT,
    OPTIONS,
    B,
    Case,
    T,
    case,
    ids_of,
    objective,
    our_loss,
    samples,
)
from torch import Tensor

from selfteach.losses.grpo import Grpo
from selfteach.losses.policy_gradient import group_advantages


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """TRL's trainer module; its import warnings are not about us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        version = pytest.importorskip("trl", reason="TRL is not installed").__version__
        if version != "1.16.0":
            pytest.skip(f"stated for TRL 1.16.0, found {version}")
        return import_module("trl.trainer.grpo_trainer")


def run_branch(module: ModuleType, condition: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run the one ``if`` of TRL's `_generate_and_score_completions` that begins with a condition."""
    source = inspect.getsource(module.GRPOTrainer._generate_and_score_completions)
    (branch,) = (
        node
        for node in ast.walk(ast.parse(textwrap.dedent(source)))
        if isinstance(node, ast.If) and ast.unparse(node.test) == condition
    )
    names = {**vars(module), **values}
    exec(compile(ast.Module([branch], []), "trl", "exec"), names)
    return names


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages(module: ModuleType, scale_rewards: str) -> None:
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 0.5, 1.0, 1.0, 0.25, 0.25, 0.25, 0.25]
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize", scale_rewards=scale_rewards,
        reward_weights=torch.ones(1, dtype=torch.float64),
    )  # fmt: skip
    values = {
        "self": trainer, "num_generations": 4, "device": torch.device("cpu"),
        "rewards_per_func": torch.tensor(rewards, dtype=torch.float64)[:, None],
        "unscorable_mask": torch.zeros(len(rewards), dtype=torch.bool),
    }  # fmt: skip
    condition = "self.multi_objective_aggregation == 'sum_then_normalize'"
    want = run_branch(module, condition, values)["advantages"]
    got = group_advantages(rewards, [i // 4 for i in range(12)], scale_rewards=scale_rewards)  # type: ignore[arg-type]
    # TRL takes n / (n - 1) in float32.
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=1e-7, atol=1e-12)


def trl_mask(module: ModuleType, form: Grpo, made: Case) -> Tensor:
    """The tokens in TRL's loss; its own code masks the rollouts that the limit cut."""
    end = 99
    values = {
        "self": SimpleNamespace(
            mask_truncated_completions=True, eos_token_ids=[end],
            _tokenizer=SimpleNamespace(pad_token_id=end),
        ),
        "completion_ids_list": [
            [*ids_of(row)[:-1], end if FINISHED[row] else 0] for row in range(B)
        ],
        "completion_mask": made.mask_BT, "tool_mask": None, "device": torch.device("cpu"),
    }  # fmt: skip
    if not form.mask_truncated:
        return made.mask_BT
    return run_branch(module, "self.mask_truncated_completions", values)["completion_mask"]


def trl_loss(module: ModuleType, kind: str, form: Grpo, made: Case) -> tuple[Tensor, Tensor]:
    hidden_NH = made.hidden_NH.clone().requires_grad_()
    logp_BT = made.padded(made.logp(hidden_NH @ made.head_VH.T))
    old_N = made.old_N
    mask_BT, ids_BT = trl_mask(module, form, made), torch.zeros(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids_BT[:, :1], "prompt_mask": ids_BT[:, :1] + 1, "completion_ids": ids_BT,
        "completion_mask": mask_BT, "num_items_in_batch": mask_BT.sum(),
        "advantages": torch.tensor(form.advantages(samples()), dtype=torch.float64),
        "ref_per_token_logps": made.padded(made.logp(made.reference_NV)),
        "old_per_token_logps": None if old_N is None else made.padded(old_N),
    }  # fmt: skip
    if form.importance_cap is not None:
        trained_N = made.logp(made.hidden_NH @ made.head_VH.T) if old_N is None else old_N
        ratio_N = (trained_N - made.sampled_N).exp().clamp(max=form.importance_cap)
        inputs["importance_sampling_ratio"] = made.padded(ratio_N)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp_BT, torch.zeros(B, T), None),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=False, delta=form.clip_delta, steps_per_generation=1
        ),
        _metrics={"train": defaultdict(list)},
        loss_type=kind,
        beta=form.kl_coef,
        epsilon_low=form.clip_low,
        epsilon_high=form.clip_high + (1 if kind == "cispo" else 0),
        importance_sampling_level=form.importance_level,
        max_completion_length=LIMIT,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=form.importance_cap is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
    )
    loss = module.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, hidden_NH)[0]


@pytest.mark.parametrize("later", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", FORMS)
def test_each_form(module: ModuleType, kind: str, option: str, level: str, later: bool) -> None:
    form, made = objective(kind, option, level), case(later=later)
    if form is None:
        return
    want = trl_loss(module, kind, form, made)
    for ours, theirs in zip(our_loss(form, made), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert len(LENGTHS) == B and want[1].abs().max() > 0
