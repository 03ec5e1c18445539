"""Recipes: what a run is, as data. Strict TOML in, resolved JSON out; nothing here imports torch.

A recipe file holds the sections of one run (`Recipe`). A study adds ``[study]``, one table of
overrides per arm (``[arms.NAME]``), optionally per variant (``[variants.NAME]``) and a ``[sweep]``.
Sections that differ between arms stand in the arms; everything else is written once and is therefore
the same for all.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from selfteach.errors import RecipeError

M = TypeVar("M", bound=BaseModel)

ContextName = Literal[
    "none",
    "reference",
    "aligned_reference",
    "step_aligned",
    "full_repetition",
    "omission",
    "holistic",
    "answer_only",
    "shuffled_lines",
    "other_answer",
]
CONTEXTS: tuple[ContextName, ...] = get_args(ContextName)


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraConfig(Section):
    """Low-rank adapters through PEFT; the teacher of the initial policy is then the adapter off."""

    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=128, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class ModelConfig(Section):
    """The solver."""

    path: str = "lab:two_styles"
    """A Hugging Face id, a folder, ``lab:WORLD`` for a base model of the lab, or
    ``package:NAME`` for a folder inside an installed Python package."""
    gguf_file: str | None = None
    """Name of a GGUF file inside ``path``; its weights are dequantised."""
    templates: str | None = None
    """Template set (``lab``, ``steps``, or a folder with a slash); by default what the data needs."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: Literal["bfloat16"] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    lora: LoraConfig | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False


class LabData(Section):
    """Problems of the lab; the world is the model's own unless named."""

    type: Literal["lab"] = "lab"
    world: str | None = None
    chance_below: float = Field(default=1.0, gt=0, le=1)
    """Keep only problems that the solver's authors get right with a probability below this (the
    paper keeps those with an Avg@16 of its solver below 5/16)."""
    train: int = Field(default=2048, ge=1)
    validation: int = Field(default=96, ge=1)
    test: int = Field(default=192, ge=1)


class ChainSumsData(Section):
    """``chain_sum`` of reasoning-gym: add and subtract from left to right, one step per line."""

    type: Literal["chain_sums"] = "chain_sums"
    seed: int = 0
    min_terms: int = Field(default=3, ge=2)
    max_terms: int = Field(default=4, ge=2)
    max_digits: int = Field(default=2, ge=1)
    shots: int = Field(default=2, ge=0)
    """Worked examples that stand before every question."""
    train: int = Field(default=512, ge=1)
    validation: int = Field(default=32, ge=1)
    test: int = Field(default=64, ge=1)


class JsonlData(Section):
    """Problem sets as JSON lines: ``question`` and ``answer``, optionally ``id`` and ``reference``."""

    type: Literal["jsonl"]
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    verifier: Literal["exact", "math"] = "exact"


DataConfig = Annotated[Union[LabData, ChainSumsData, JsonlData], Field(discriminator="type")]  # noqa: UP007


class SamplingConfig(Section):
    """How the solver answers while it learns."""

    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=64, ge=1)
    batch_answers: int = Field(default=256, ge=1)
    """Answers decoded side by side; also the unit that is saved before it is used."""


class OracleConfig(Section):
    """A program that can check every step (the lab, chain sums)."""

    type: Literal["oracle"] = "oracle"
    error_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of critiques in which the critic errs."""


class ContextConfig(Section):
    """What the self-teacher is shown."""

    type: ContextName = "step_aligned"


class InitialTeacher(Section):
    """The frozen initial policy."""

    type: Literal["initial"] = "initial"


class LiveTeacher(Section):
    """The current policy."""

    type: Literal["live"]


class EmaTeacher(Section):
    """An exponential moving average of the weights, updated after each optimizer step."""

    type: Literal["ema"]
    rate: float = Field(default=0.05, gt=0, le=1)
    """Share of the new weights in each update."""


class TrustRegionTeacher(Section):
    """Logits between the initial policy's and the live policy's."""

    type: Literal["trust_region"]
    live_share: float = Field(default=0.5, ge=0, le=1)


TeacherConfig = Annotated[
    Union[InitialTeacher, LiveTeacher, EmaTeacher, TrustRegionTeacher],  # noqa: UP007
    Field(discriminator="type"),
]


class DistillationConfig(Section):
    """Move the student towards the self-teacher."""

    type: Literal["distillation"] = "distillation"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """forward_kl = KL(teacher‖student), reverse_kl = KL(student‖teacher)."""
    beta: float = 0.5
    jsd_scaled: bool = False
    """Divide the JSD by β(1−β): the convention whose ends are the two KLs."""
    support: Literal["full", "top_k", "sampled"] = "full"
    top_k: int | None = Field(default=None, ge=1)
    top_k_from: Literal["student", "teacher"] = "student"
    clip: float | None = Field(default=None, gt=0)
    """Upper cap of each vocabulary entry's term (OPSD: 0.05)."""
    temperature: float = Field(default=1.0, gt=0)
    control_variate: bool = False
    gate: Literal["all", "wrong", "right"] = "all"
    """Which answers teach, by their verdict."""
    from_first_error: bool = False
    """Only tokens from the first wrong step on (ROSD); right answers then teach nothing."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    importance_cap: float | None = Field(default=None, gt=0)
    """Truncated importance weight min(π_train/π_engine, cap) on every token."""


class GrpoConfig(Section):
    """Group-relative policy optimisation on the binary verdict."""

    type: Literal["grpo"]
    normalise: Literal["std", "none"] = "std"
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    clip_high: float = Field(default=0.2, ge=0)
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy‖initial policy)."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    importance_cap: float | None = Field(default=None, gt=0)


ObjectiveConfig = Annotated[
    Union[DistillationConfig, GrpoConfig],  # noqa: UP007
    Field(discriminator="type"),
]


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["constant", "linear"] = "constant"


class TrainConfig(Section):
    """The loop."""

    steps: int = Field(default=60, ge=0)
    problems_per_step: int = Field(default=16, ge=1)
    answers_per_problem: int = Field(default=8, ge=1)
    updates_per_batch: int = Field(default=1, ge=1)
    micro_batch_tokens: int = Field(default=16_384, ge=1)
    """Padded tokens (prompt and answer, student and teacher) in one forward pass."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest prompt with answer, in tokens; by default what the model was built for. A lesson that
    does not fit is dropped and counted, never cut."""
    checkpoint_every: int = Field(default=10, ge=1)
    keep_checkpoints: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """torch threads of a run; by default all cores for one run, one each in a study."""


class EvaluationConfig(Section):
    """What is measured, and when. Nothing is ever selected on the test problems."""

    every: int = Field(default=10, ge=1)
    """Steps between points of the learning curve, on validation problems."""
    validation_k: int = Field(default=4, ge=1)
    test_k: int = Field(default=12, ge=1)
    """Answers per test problem: Avg@k, Pass@k and Maj@k."""
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int | None = Field(default=None, ge=1)
    """By default as in training."""
    test: bool = True
    """Score the test problems once, after the last step."""


class Recipe(Section):
    """One run: one arm, one seed."""

    seed: int = Field(default=0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = LabData()
    sampling: SamplingConfig = SamplingConfig()
    critic: OracleConfig | None = None
    context: ContextConfig = ContextConfig(type="none")
    teacher: TeacherConfig = InitialTeacher()
    objective: ObjectiveConfig = DistillationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_types(cls, values: Any) -> Any:
        """A section that names no ``type`` is of the default one: ``objective.gate=wrong`` suffices."""
        if not isinstance(values, Mapping):
            return values
        defaults = {"data": "lab", "teacher": "initial", "objective": "distillation"}
        typed = {
            name: {"type": kind, **values[name]}
            for name, kind in defaults.items()
            if isinstance(values.get(name), Mapping)
        }
        return {**values, **typed}

    @model_validator(mode="after")
    def _sensible(self) -> Recipe:
        needs_critic = self.context.type in CRITIC_CONTEXTS
        if needs_critic and self.critic is None:
            raise ValueError(
                f'context "{self.context.type}" needs a critic: add [critic] type = "oracle"'
            )
        if isinstance(self.objective, DistillationConfig):
            if self.context.type == "none" and self.train.steps > 0:
                raise ValueError(
                    'distillation with context "none" has nothing to teach: choose a context, '
                    'for example [context] type = "step_aligned"'
                )
            if self.objective.from_first_error and self.critic is None:
                raise ValueError("from_first_error needs a critic to say where the first error is")
        elif self.context.type != "none":
            raise ValueError(f'grpo takes no context, found context "{self.context.type}"')
        elif self.train.answers_per_problem < 2:
            raise ValueError("grpo needs at least 2 answers_per_problem to compare")
        return self


TABLES = ("study", "arms", "variants", "sweep")
"""What a recipe file holds besides the common sections of its runs."""

CRITIC_CONTEXTS = frozenset(
    name for name in CONTEXTS if name not in ("none", "reference", "aligned_reference")
)
"""Contexts that are made from a critique."""


class VariantConfig(Section):
    """Another setting in which the arms are compared, reported beside the main one."""

    title: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...] | None = None
    """By default all."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the common sections, nested like the recipe."""
    arm_overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides of single arms, as chosen by this variant's own sweep."""


class SweepConfig(Section):
    """The same small grid for every arm, judged on validation problems with seeds of its own."""

    lr: tuple[float, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    variants: tuple[str, ...] = ()
    """Settings that are swept as well; the others take the main setting's rates."""


class StudyConfig(Section):
    """What a study compares, and how."""

    title: str = ""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    headline: tuple[str, ...] = ()
    """Pairs to print first, like ``step_aligned-grpo``."""
    bootstrap: int = Field(default=10_000, ge=100)
    workers: int | None = Field(default=None, ge=1)
    """Runs side by side, one process each; by default one per core."""


class Study(Section):
    """A recipe with arms: the common sections and what each arm changes."""

    common: dict[str, Any]
    study: StudyConfig = StudyConfig()
    arms: dict[str, dict[str, Any]]
    variants: dict[str, VariantConfig] = Field(default_factory=dict)
    sweep: SweepConfig | None = None

    def recipe(
        self, arm: str, *, seed: int | None = None, variant: str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Recipe:  # fmt: skip
        """The resolved recipe of one run.

        Overrides apply in this order: common sections, variant, arm, the variant's own overrides of
        the arm, ``overrides``.
        """
        if arm not in self.arms:
            raise RecipeError(f"no arm {arm!r}; {_nearest(arm, self.arms)}")
        layers: list[Mapping[str, Any]] = [self.common]
        if variant is not None:
            layers.append(self.variants[variant].set)
        layers.append(self.arms[arm])
        if variant is not None:
            layers.append(self.variants[variant].arm_overrides.get(arm, {}))
        layers.append(overrides or {})
        if seed is not None:
            layers.append({"seed": seed})
        merged: dict[str, Any] = {}
        for layer in layers:
            merged = merge(merged, layer)
        return validate(Recipe, merged, where=f"arm {arm!r}")

    def base_recipe(self, *, seed: int, variant: str | None = None) -> Recipe:
        """The recipe of the base row: the untrained model under the arms' evaluation."""
        first = next(iter(self.arms))
        untrained = {"seed": seed, "train": {"steps": 0}, "context": {"type": "none"},
                     "objective": {"type": "distillation"}, "critic": None}  # fmt: skip
        merged = merge(self.common, self.variants[variant].set if variant else {})
        merged = merge(merged, {"model": self.arms[first].get("model", {})})
        return validate(Recipe, merge(merged, untrained), where="base")


def load_study(path: Path, settings: Sequence[str] = ()) -> Study:
    """Read a recipe file as a study; a file without arms is a study of one arm, named like the file.

    Raises `RecipeError` in one line for whatever is wrong with the file.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path} is a folder; name the recipe file, {path / 'recipe.toml'}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    return study_from(raw, settings, where=str(path), default_arm=path.stem)


def study_from(
    raw: Mapping[str, Any],
    settings: Sequence[str] = (),
    *,
    where: str = "recipe",
    default_arm: str = "run",
) -> Study:
    """A study from parsed TOML, with ``key=value`` settings applied to the common sections.

    A setting whose key begins with ``arms.``, ``study.``, ``sweep.`` or ``variants.`` changes those.
    Raises `RecipeError`.
    """
    raw = deepcopy(dict(raw))
    for setting in settings:
        raw = merge(raw, parse_setting(setting))
    special = {key: raw.pop(key) for key in TABLES if key in raw}
    if settings:
        # A --set reaches every arm, also where an arm has a value of its own.
        forced = [s for s in settings if next(iter(parse_setting(s))) not in TABLES]
        for arm in special.get("arms", {}):
            for setting in forced:
                special["arms"][arm] = merge(special["arms"][arm], parse_setting(setting))
    special.setdefault("arms", {default_arm: {}})
    study = validate(Study, {"common": raw, **special}, where=where)
    if not study.arms:
        raise RecipeError(f"{where}: [arms] is empty")
    for arm in study.arms:
        study.recipe(arm, seed=0)
        for name, variant in study.variants.items():
            if variant.arms is not None:
                for other in variant.arms:
                    if other not in study.arms:
                        raise RecipeError(
                            f"{where}: variants.{name}.arms: {other!r}: {_nearest(other, study.arms)}"
                        )
            study.recipe(arm, seed=0, variant=name)
    if study.sweep is not None:
        shared = set(study.sweep.seeds) & set(study.study.seeds)
        if shared:
            raise RecipeError(f"{where}: sweep.seeds and study.seeds share {sorted(shared)}")
        for name in study.sweep.variants:
            if name not in study.variants:
                raise RecipeError(
                    f"{where}: sweep.variants: {name!r}: {_nearest(name, study.variants)}"
                )
    for pair in study.study.headline:
        if pair not in pairs([*study.arms]):
            raise RecipeError(
                f"{where}: study.headline: {pair!r}: {_nearest(pair, pairs([*study.arms]))}"
            )
    return study


def pairs(arms: Sequence[str]) -> list[str]:
    """Names of the paired differences between arms: later minus earlier, and each minus base."""
    later = [f"{b}-{a}" for i, a in enumerate(arms) for b in arms[i + 1 :]]
    return [*later, *(f"{arm}-base" for arm in arms)]


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, ``high`` over ``low``; a table with another ``type`` replaces the whole."""
    if "type" in high and "type" in low and high["type"] != low["type"]:
        return deepcopy(dict(high))
    merged = deepcopy(dict(low))
    for key, value in high.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = merge(old, value)
        else:
            merged[key] = deepcopy(value)
    return merged


def parse_setting(setting: str) -> dict[str, Any]:
    """``a.b=3`` as nested dictionaries; the value is TOML, or a string if it is not valid TOML."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {setting!r}: write key=value, for example --set optimizer.lr=5e-4"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    first, *inner = key.strip().split(".")
    for part in reversed(inner):
        value = {part: value}
    return {first: value}


def validate(model: type[M], values: Mapping[str, Any], *, where: str) -> M:
    """Validate, turning pydantic's report into one line with the nearest right key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_one_line(model, error)}") from None


def _one_line(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        return f"unknown key {path!r}; {_nearest(str(first['loc'][-1]), known)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    found = (
        f", found {first['input']!r}" if not isinstance(first["input"], dict | BaseModel) else ""
    )
    return f"{path + ': ' if path else ''}{message[0].lower() + message[1:]}{found}{more}"


def _fields_at(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Names of the fields where a validation error points."""
    current: list[type[BaseModel]] = [model]
    for part in loc:
        following: list[type[BaseModel]] = []
        for candidate in current:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                following += _models_in(field.annotation)
            elif _tag(candidate) == part:
                following.append(candidate)
        current = following or current
    return [name for candidate in current for name in candidate.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


def _tag(model: type[BaseModel]) -> object:
    field = model.model_fields.get("type")
    return getattr(field.annotation, "__args__", (None,))[0] if field else None


def _nearest(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
