"""Checks that a recipe's objective and engine are right for the way in which it samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfteach.config.objective_section import DistillationConfig, GrpoConfig, terms

if TYPE_CHECKING:
    from selfteach.config.recipe import Recipe


def check_sampling(recipe: Recipe) -> None:
    """Refuse options of sampling under which the objective, or the engine, would be another one.

    Raises ValueError in one line.
    """
    distillation, grpo = terms(recipe.objective)
    _refuse_two_cuts(recipe)
    if recipe.train.steps == 0:  # nothing is trained
        return
    _check_cuts(recipe, distillation, grpo)
    _check_vllm_process(recipe)
    if recipe.sampling.dynamic_rounds > 0:
        _check_dynamic(recipe, distillation, grpo)


def _check_cuts(
    recipe: Recipe, distillation: DistillationConfig | None, grpo: GrpoConfig | None
) -> None:
    if cuts := recipe.sampling.cuts:
        if grpo is not None or (distillation and distillation.support == "sampled"):
            name = "grpo" if grpo is not None else 'support = "sampled"'
            raise ValueError(
                f"sampling.{cuts} cuts the distribution that rollouts come from, and the loss of "
                f"{name} is of sampled tokens: its gradient would be biased. Remove it; evaluation "
                "has its own"
            )
        if distillation and distillation.importance_cap is not None:
            raise ValueError(
                f"objective.importance_cap compares whole distributions, and sampling.{cuts} cuts one: "
                "remove one of them"
            )


def _check_dynamic(
    recipe: Recipe, distillation: DistillationConfig | None, grpo: GrpoConfig | None
) -> None:
    if grpo is None or distillation is not None:
        raise ValueError(
            "sampling.dynamic_rounds replaces groups that score alike, from which distillation learns: "
            'it needs objective.type = "grpo"'
        )
    if recipe.train.staleness > 0:
        raise ValueError(
            "sampling.dynamic_rounds needs train.staleness = 0: its further rounds wait for verdicts, "
            "and would be sampled by other weights than the first"
        )
    if recipe.critic is not None:
        raise ValueError(
            "sampling.dynamic_rounds with a critic, which grpo does not use, would pay for critiques "
            "of groups that are left out: set critic = false"
        )


def _check_vllm_process(recipe: Recipe) -> None:
    """Refuse settings of vLLM in the trainer's process that change how the trainer computes."""
    engine, sampling = recipe.engine, recipe.sampling
    if engine.type != "vllm":
        return
    if engine.batch_invariant:
        raise ValueError(
            "engine.batch_invariant replaces PyTorch's operations in this process by ones without "
            'gradients: sample with engine.type = "vllm_server", whose servers are started with it'
        )
    if recipe.train.deterministic and sampling.top_p < 1:
        raise ValueError(
            "train.deterministic with sampling.top_p: vLLM in this process sums probabilities in an "
            'order that PyTorch then refuses: sample with engine.type = "vllm_server", or remove top_p'
        )


def _refuse_two_cuts(recipe: Recipe) -> None:
    """Refuse top_p with min_p for vLLM, which cuts by min_p first and so keeps other tokens."""
    if recipe.engine.type == "transformers":
        return
    for name, section in (("sampling", recipe.sampling), ("evaluation", recipe.evaluation)):
        if section.top_p < 1 and section.min_p > 0:
            raise ValueError(
                f"{name}.top_p and {name}.min_p together keep other tokens in vLLM than in "
                "transformers: set one of them"
            )
