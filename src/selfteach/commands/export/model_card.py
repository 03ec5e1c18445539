"""Write the model card of a run: what was measured, how, and what the numbers do not support."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selfteach import __version__
from selfteach.commands.evaluate import summary
from selfteach.config.part_names import unanchored
from selfteach.config.recipe import Recipe
from selfteach.errors import CheckpointError
from selfteach.evaluation.evaluation_record import Evaluation, load_evaluation
from selfteach.runtime.run_folder import RunFolder, load_result

_MEASURES = {"avg": "Avg@{k}", "pass": "Pass@{k}", "maj": "Maj@{k}"}
SERVED = (
    "reply_cache", "base_url", "base_urls", "api_key_env", "api_key_envs", "api_key_header",
    "extra_body",
)  # fmt: skip
"""Keys of a critic or a judge that say where it is served, and how one is let in."""
LOCAL_PATH = re.compile(r"(~|\.{0,2})/[^\n]*")
_COUNTS = {
    "rollouts_sampled": "training rollouts", "tokens_sampled": "tokens sampled",
    "tokens_trained": "tokens trained on", "critiques": "critiques",
    "critic_prompt_tokens": "critic's prompt tokens",
    "critic_completion_tokens": "critic's written tokens", "optimizer_steps": "optimizer steps",
}  # fmt: skip


def model_card(run: RunFolder, recipe: Recipe, base: str | None, *, is_adapter: bool) -> str:
    """Return the card as Markdown with the hub's metadata. Raises `CheckpointError` for lost files."""
    return "\n".join(_lines(run, recipe, base, is_adapter)) + "\n"


def _lines(run: RunFolder, recipe: Recipe, base: str | None, is_adapter: bool) -> Iterator[str]:
    result = load_result(run.path)
    yield "---"
    if base is not None:
        yield f"base_model: {base}"
        yield f"base_model_relation: {'adapter' if is_adapter else 'finetune'}"
    yield f"library_name: {'peft' if is_adapter else 'transformers'}"
    yield "tags: [selfteach, self-distillation]"
    yield "---"
    yield ""
    yield f"# {run.path.resolve().name}"
    yield ""
    kind = "A LoRA adapter for" if is_adapter else "A model trained from"
    named = base or _name_alone(recipe.model.path)
    yield f"{kind} `{named}`, made with selfteach {__version__}: {_method(recipe)}"
    yield ""
    yield from _quantization(recipe, is_adapter)
    yield from _results(run, recipe, result)
    yield from _limits(recipe)
    yield from _budget(result)
    yield "## Recipe"
    yield ""
    yield "```json"
    yield json.dumps(_portable(recipe), indent=2)
    yield "```"


def _method(recipe: Recipe) -> str:
    names = unanchored(recipe.model_dump(mode="json", include={"objective", "context", "critic"}))
    objective, context = names["objective"]["type"], names["context"]["type"]
    steps = f"{recipe.train.steps:,} steps, seed {recipe.seed}"
    if objective == "grpo":
        functions = recipe.reward.functions if recipe.reward is not None else ()
        rewards = ", ".join(f"`{one.name}`" for one in functions)
        reward = f"rewards {rewards}" if rewards else "a binary reward"
        return f"GRPO with {reward}, {steps}."
    critic = f", critic `{names['critic']['type']}`" if recipe.critic is not None else ""
    return f"{objective} from a self-teacher that is shown `{context}`{critic}, {steps}."


def _quantization(recipe: Recipe, is_adapter: bool) -> Iterator[str]:
    """Yield how the base's weights were held, where they were in 4 bits."""
    if recipe.model.quantization is None:
        return
    kind = recipe.model.quantization
    note = (
        f"The base was held in 4 bits in training and for the results below: load it with "
        f'`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{kind}", '
        "bnb_4bit_use_double_quant=True)` for the same."
        if is_adapter
        else f"The adapter was trained and measured on a base in 4 bits ({kind}) and is added here to "
        "the base's whole weights: this model was not measured, and differs by what rounding to "
        "4 bits had changed."
    )
    yield note
    yield ""


def _results(run: RunFolder, recipe: Recipe, result: Mapping[str, Any]) -> Iterator[str]:
    yield "## Results"
    yield ""
    yield "| problems | step | measure | mean | 95 % interval over problems |"
    yield "|---|---|---|---|---|"
    for evaluation in _evaluations(run, result["step"]):
        numbers = summary(evaluation, "")
        for name, title in _MEASURES.items():
            low, high = numbers[name]["ci95"]
            yield (
                f"| {evaluation.split} ({len(evaluation.problem_ids)} × {evaluation.k}) | "
                f"{evaluation.step} | {title.format(k=evaluation.k)} | {numbers[name]['mean']:.1f} | "
                f"[{low:.1f}, {high:.1f}] |"
            )
    yield ""
    yield (
        f"Rollouts of at most {recipe.evaluation.max_tokens or recipe.sampling.max_tokens:,} tokens at "
        f"temperature {recipe.evaluation.temperature:g}{_cuts(recipe)}. Step 0 is the base model."
    )
    yield ""


def _cuts(recipe: Recipe) -> str:
    """Return what cuts the distribution of evaluations, after a comma; empty for nothing."""
    return f", {recipe.evaluation.cuts}" if recipe.evaluation.cuts else ""


def _evaluations(run: RunFolder, last: int) -> Iterator[Evaluation]:
    """Yield the validation before and after training, and the test, as far as they are stored."""
    for split, step in dict.fromkeys([("validation", 0), ("validation", last), ("test", last)]):
        try:
            yield load_evaluation(run.path, split, step)
        except CheckpointError:
            continue


def _limits(recipe: Recipe) -> Iterator[str]:
    yield "## What these numbers do not support"
    yield ""
    yield (
        f"- This is one run with seed {recipe.seed}. The intervals hold the choice of problems alone: "
        "another seed may end elsewhere, and a comparison of methods needs several seeds of each."
    )
    yield f'- Problems are of one source (`data.type = "{recipe.data.type}"`): no other was tried.'
    yield "- Validation problems may have been used to choose settings; test problems were scored once."
    yield "- Nothing was measured of safety, of other languages or of chat."
    yield ""


def _budget(result: Mapping[str, Any]) -> Iterator[str]:
    budget = result["budget"]
    yield "## Budget"
    yield ""
    yield "| | |"
    yield "|---|---|"
    for name, title in _COUNTS.items():
        yield f"| {title} | {budget.get(name, 0):,.0f} |"
    yield f"| seconds | {budget['seconds']:,.0f} |"
    yield ""


def _portable(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe without what is of this machine or secret: folders, servers, keys, sinks."""
    written = recipe.model_dump(mode="json", exclude_defaults=True)
    values = _with_types(written, recipe.model_dump(mode="json"))
    # Their defaults depend on the model.
    values.setdefault("optimizer", {})["lr"] = recipe.optimizer.lr
    values.setdefault("sampling", {})["max_tokens"] = recipe.sampling.max_tokens
    for section, keys in {
        "critic": SERVED,
        "engine": ("url", "urls", "folder", "api_key_env"),
    }.items():
        if isinstance(values.get(section), dict):
            values[section] = {k: v for k, v in values[section].items() if k not in keys}
    if isinstance(values.get("reward"), dict):
        values["reward"]["functions"] = [
            {k: v for k, v in one.items() if k not in SERVED}
            for one in values["reward"]["functions"]
        ]
    values.pop("tracking", None)
    return _without_folders(unanchored(values))


def _with_types(written: Any, whole: Any) -> Any:
    """Return values without defaults, but with the ``type`` of each table: it says what the rest is."""
    if isinstance(written, dict):
        kinds = {"type": whole["type"]} if "type" in whole else {}
        return {**kinds, **{k: _with_types(v, whole.get(k)) for k, v in written.items()}}
    if isinstance(written, list):
        return [_with_types(*pair) for pair in zip(written, whole, strict=True)]
    return written


def _without_folders(values: Any) -> Any:
    """Return values with the names of files and folders alone, where there are paths."""
    if isinstance(values, dict):
        return {key: _without_folders(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_folders(value) for value in values]
    return _name_alone(values) if isinstance(values, str) else values


def _name_alone(value: str) -> str:
    """Return the last part of a path on this machine; other texts, hub ids among them, as they are."""
    return Path(value).name if LOCAL_PATH.fullmatch(value) else value
