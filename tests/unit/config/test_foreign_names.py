"""Keys of other trainers get the key that sets the same here, and that key exists."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from selfteach.config.foreign_names import OURS
from selfteach.config.recipe import Recipe
from selfteach.config.reference import sections_of
from selfteach.config.schema import Section, parse_setting, validate
from selfteach.errors import RecipeError


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("learning_rate=1e-5", "unknown key 'learning_rate'; use optimizer.lr"),
        ("train.num_generations=8", "unknown key 'train.num_generations'; use train.group_size"),
        ("optimizer.warmup_ratio=0.1", "use optimizer.warmup_steps"),
        ("model.lora.r=8", "use model.lora.rank"),
        ("objective.loss_type=dapo", 'use objective.loss_type, with objective.type = "grpo"'),
        ("mask_truncated_completions=true", "use objective.mask_truncated, with"),
        ("importance_sampling_level=sequence", "use objective.importance_level, with"),
        ("delta=4.0", "use objective.clip_delta, with"),
        ("top_p=0.9", "use sampling.top_p, or evaluation.top_p"),
        ("filter_groups.enable=true", "unknown key 'filter_groups'; use sampling.dynamic_rounds"),
        ("temperature=1.1", "unknown key 'temperature'; use sampling.temperature"),
        ("eval_strategy=steps", "use evaluation.every"),
        ("trust_remote_code=true", "use model.trust_remote_code"),
        ("trainer.total_epochs=3", "unknown key 'trainer'; use train"),
        ("logging_steps=1", "nothing needs to be set here"),
        ("train.stepss=1", "did you mean 'steps'?"),
    ],
)
def test_hints(setting: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint.replace("?", r"\?")):
        validate(Recipe, parse_setting(setting), where="--set")


def keys_below(section: type[Section], path: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield path + name
        for inner in sections_of(field.annotation):
            yield from keys_below(inner, f"{path}{name}.")


def test_every_hint_names_a_key_of_the_recipe() -> None:
    known = set(keys_below(Recipe))
    for key, ours in OURS.items():
        first = ours.split(",")[0].split(" ")[0]
        assert not first or first == "--out" or first in known, (key, ours)
