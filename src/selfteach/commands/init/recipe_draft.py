"""Drafts a first recipe: values for a model and its problems, and the commented TOML with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import jinja2
import tomli_w
import torch

from selfteach.commands.init.model_facts import ModelFacts
from selfteach.commands.init.problem_choice import ProblemChoice, without_overlong
from selfteach.config.model_defaults import ADAPTERS_LR, ALL_WEIGHTS_LR, MAX_TOKENS
from selfteach.config.recipe import LoraConfig, ModelConfig, Recipe
from selfteach.errors import DataError
from selfteach.models.loading import build_renderer
from selfteach.prompts.template_set import Templates

SMALL = 2_000_000_000
"""Parameters below which a model is shown worked examples of the form."""
WITH_ADAPTERS = 300_000_000
"""Parameters from which adapters train instead of all weights."""
ROUND = 64
"""Lengths are multiples of this."""
SHORTEST, LONGEST = 128, 2048
"""Bounds of ``sampling.max_tokens`` where it follows from worked solutions."""
LAB_TOKENS, CHAIN_SUM_TOKENS, FEW_SHOT_TOKENS = 64, 64, 512
"""``sampling.max_tokens`` where no worked solutions tell: the last for short examples of the form."""


@dataclass(frozen=True, slots=True)
class CriticChoice:
    """Names a served critic."""

    base_url: str
    model: str
    api_key_env: str | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """Holds what a first recipe says, before it is written."""

    command: str
    """The command that wrote it."""
    model: ModelFacts
    problems: ProblemChoice
    critic: CriticChoice | None
    templates: str | None
    targets: tuple[str, ...]
    """Layers that get adapters; empty: all weights train."""
    max_tokens: int
    max_tokens_reason: str
    on_gpu: bool

    @property
    def arms(self) -> dict[str, str]:
        """Return the TOML of each arm by name: rewards alone, and what the feedback allows besides."""
        arms = {"grpo": 'objective = { type = "grpo" }'}
        if self.critic is not None or self.problems.has_oracle:
            critic = "" if self.critic else 'critic = { type = "oracle" }\n'
            arms["step_aligned"] = f'{critic}context = {{ type = "step_aligned" }}'
        if self.problems.with_reference:
            arms["reference"] = 'context = { type = "reference" }'
        if len(arms) == 1:
            arms["peer"] = 'context = { type = "peer", fallback = "environment" }'
        if self.critic is not None:
            for name in arms.keys() & {"grpo", "reference"}:
                arms[name] = f"critic = false\n{arms[name]}"
        return arms

    @property
    def learning_rate(self) -> float | None:
        """Return the usual rate for what trains; None for the lab's, which is the default there."""
        if self.model.is_lab:
            return None
        return ADAPTERS_LR if self.targets else ALL_WEIGHTS_LR


def draft_recipe(
    command: str, model: ModelFacts, problems: ProblemChoice, critic: CriticChoice | None
) -> Draft:
    """Choose a first recipe's values. Raises `DataError` if prompts leave no room for an answer."""
    generated = problems.section["type"] in ("lab", "chain_sums")
    is_small = model.parameters is None or model.parameters < SMALL
    templates = None
    if is_small and problems.is_math and not (generated or model.is_lab):
        templates = "steps_few_shot"
    adapted = not model.is_lab and (model.parameters or WITH_ADAPTERS) >= WITH_ADAPTERS
    tokens, reason = _max_tokens(model, problems, templates)
    problems, tokens, reason = _within_window(model, problems, templates, tokens, reason)
    return Draft(
        command, model, problems, critic, templates, model.targets if adapted else (),
        tokens, reason, torch.cuda.is_available(),
    )  # fmt: skip


def recipe_text(draft: Draft) -> str:
    """Return the recipe file of a draft, with its comments."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["toml"] = toml_value
    template = Path(__file__).with_name("recipe.toml.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        draft=draft,
        model=draft.model,
        data=draft.problems,
        default_targets=set(LoraConfig().targets),
    )


def toml_value(value: Any) -> str:
    """Return a value as TOML on one line: tables inline, texts quoted."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(v)}" for key, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def _max_tokens(
    model: ModelFacts, problems: ProblemChoice, templates: str | None
) -> tuple[int, str]:
    """Return the longest rollout, and why: twice what worked solutions have, or a usual number."""
    if model.is_lab:
        return LAB_TOKENS, "the lab's default"
    if problems.section["type"] == "chain_sums":
        return CHAIN_SUM_TOKENS, "a correct answer has about 45"
    solutions = [
        p.references["reference"] for p in problems.task.train if "reference" in p.references
    ]
    if model.tokenizer is not None and len(solutions) >= 2:
        lengths = [len(model.tokenizer(text)["input_ids"]) for text in solutions[:500]]
        usual = quantiles(lengths, n=20)[-1]
        tokens = -(-2 * int(usual) // ROUND) * ROUND
        reason = f"twice the {usual:.0f} tokens of a long worked solution"
        return max(SHORTEST, min(LONGEST, tokens)), reason
    if templates is not None:
        return FEW_SHOT_TOKENS, "the examples of the form are short"
    return MAX_TOKENS, "usual for models without a thought"


def _within_window(
    model: ModelFacts, problems: ProblemChoice, templates: str | None, tokens: int, reason: str
) -> tuple[ProblemChoice, int, str]:
    """Lower the longest rollout so that prompt, context and rollout fit; leave out overlong prompts."""
    if model.tokenizer is None or model.window is None or model.is_lab:
        return problems, tokens, reason
    config = ModelConfig(path=model.path, gguf_file=model.gguf_file)
    chosen = Templates(templates or problems.task.templates)
    renderer = build_renderer(config, model.tokenizer, chosen)
    task = problems.task
    lengths = sorted(
        len(renderer.solver_prompt(problem))
        for problem in (*task.train, *task.validation, *task.test)
    )
    usual = lengths[len(lengths) * 9 // 10]
    # A context is about as long as a rollout, and the teacher reads both behind the prompt.
    room = (model.window - usual) // 2
    if room < tokens:
        tokens = room // ROUND * ROUND if room >= ROUND else room
        reason = f"prompt, context and answer share the model's {model.window:,} tokens"
    if tokens < 1:
        raise DataError(
            f"--model {model.path}: its context of {model.window:,} tokens leaves no room behind "
            f"prompts of {usual:,} tokens"
        )
    can_drop = problems.section["type"] in ("files", "hub")
    if lengths[-1] + tokens > model.window and can_drop:
        problems = without_overlong(problems)
    return problems, tokens, reason


def trained_alike(recipe: Recipe) -> Recipe:
    """Return a recipe whose engine samples what all arms start from: no critic, no context."""
    values = recipe.model_dump(mode="json")
    values |= {"critic": None, "context": {"type": "none"}, "objective": {"type": "grpo"}}
    return Recipe.model_validate(values)
