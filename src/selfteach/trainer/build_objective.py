"""Build the objective of a recipe, and refuse combinations whose gradient would be another one's."""

from __future__ import annotations

from selfteach.config.objective_section import (
    CustomObjectiveConfig,
    DistillationConfig,
    GrpoConfig,
    HybridConfig,
)
from selfteach.config.recipe import Recipe, TrainConfig
from selfteach.errors import RecipeError
from selfteach.losses.divergence import Divergence
from selfteach.losses.objectives import Anneal, Distillation, Grpo, Hybrid
from selfteach.losses.token_masks import TokenMask
from selfteach.protocols import Objective
from selfteach.trainer.custom_components import build_custom_objective


def build_objective(recipe: Recipe) -> Objective:
    """Build the objective of a recipe. Raises `RecipeError` for an invalid combination."""
    temperature = recipe.sampling.temperature
    match recipe.objective:
        case DistillationConfig() as config:
            _require_importance_weights(config, recipe.train)
            return _distillation(config, temperature)
        case GrpoConfig() as config:
            return _grpo(config, recipe)
        case HybridConfig() as config:
            _require_importance_weights(config.distillation, recipe.train)
            weight, train = config.weight, recipe.train
            steps = weight.steps or train.steps
            return Hybrid(
                _distillation(config.distillation, temperature),
                _grpo(config.grpo, recipe),
                Anneal(weight.start, weight.end, max(0, steps - 1) * train.num_iterations),
                config.grpo_weight,
                config.grpo_tokens,
            )
        case CustomObjectiveConfig() as config:
            return build_custom_objective(
                config, sampling_temperature=temperature, seed=recipe.seed
            )


def _require_importance_weights(config: DistillationConfig, train: TrainConfig) -> None:
    """Raise `RecipeError` for a sampled-token loss on tokens of an older policy without weights."""
    if config.support != "sampled" or config.importance_cap is not None:
        return
    for name in ("num_iterations", "staleness"):
        value = getattr(train, name)
        if value > TrainConfig.model_fields[name].default:
            raise RecipeError(
                f'objective.support = "sampled" with train.{name} = {value}: the tokens are an older '
                "policy's, and the gradient is biased without importance weights: set "
                "objective.importance_cap, like 2.0"
            )


def _distillation(config: DistillationConfig, sampling_temperature: float) -> Distillation:
    spec = Divergence(
        kind=config.divergence,
        support=config.support,
        beta=config.beta,
        jsd_scaled=config.jsd_scaled,
        top_k=config.top_k,
        top_k_from=config.top_k_from,
        clip=config.clip,
        temperature=config.temperature,
        control_variate=config.control_variate,
    )
    return Distillation(
        spec,
        sampling_temperature,
        token_mask=TokenMask(
            config.train_on, config.from_first_error, config.changed_steps_fraction
        ),
        aggregation=config.aggregation,
        importance_cap=config.importance_cap,
    )


def _grpo(config: GrpoConfig, recipe: Recipe) -> Grpo:
    sampling = recipe.sampling
    return Grpo(
        sampling.temperature,
        **config.model_dump(exclude={"type", "loss_type"}),
        max_tokens=recipe.most_sampled,
        mixed_groups_only=sampling.dynamic_rounds > 0,
    )
