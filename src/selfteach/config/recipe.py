"""What one run is, as data: strict sections with their defaults; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import Field, field_validator, model_validator

from selfteach.config.critic_section import CriticConfig
from selfteach.config.data_section import DataConfig, LabData
from selfteach.config.engine_section import EngineConfig, TransformersEngineConfig
from selfteach.config.objective_section import DistillationConfig, ObjectiveConfig, terms
from selfteach.config.schema import Section

ContextName = Literal[
    "none",
    "reference",
    "aligned_reference",
    "step_aligned",
    "partly_aligned",
    "full_repetition",
    "omission",
    "holistic",
    "answer_only",
    "shuffled_lines",
    "other_answer",
    "peer",
    "environment",
]
CONTEXTS: tuple[ContextName, ...] = get_args(ContextName)
DIAL = "partly_aligned"
"""The context that has positions, from the reference (0) to the critique (1)."""


class LoraConfig(Section):
    """Low-rank adapters through PEFT; the teacher of the initial policy is then the adapter off."""

    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=128, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class ThinkingConfig(Section):
    """For models that can think before they answer; others take no notice.

    With ``student = false`` and ``teacher = true`` the teacher expects a thought where the student
    wrote its answer: see ``boundary``.
    """

    student: bool | None = None
    """None: whatever the model's chat template does by itself."""
    teacher: bool | None = None
    boundary: Literal["student", "teacher"] = "student"
    """What stands between the teacher's prompt and the answer it scores, where the two are asked
    differently: the student's header (with Qwen3 and ``student = false`` an empty thought), or the
    teacher's own, after which it expects another first token than the student's."""
    scored: bool = True
    """False: only tokens behind the thought count."""
    tags: tuple[str, str] = ("<think>", "</think>")
    """What the model writes around a thought. Verifier, critic and steps see what follows it."""


class ModelConfig(Section):
    """The solver."""

    path: str = "lab:two_styles"
    """A Hugging Face id, a folder, ``lab:WORLD`` for a base model of the lab, or
    ``package:NAME`` for a folder inside an installed Python package."""
    gguf_file: str | None = None
    """Name of a GGUF file inside ``path``; its weights are dequantised."""
    templates: str | None = None
    """Template set (``steps``, ``free``, ``chain_sums``, ``lab``, or a folder of your own, named with
    a slash, whose files override those of ``steps``); by default what the data needs."""
    system: str | None = None
    """System prompt of solver and teacher, in place of the chat template's own. Where a chat template
    has no such role it stands before the first question."""
    thinking: ThinkingConfig = ThinkingConfig()
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: Literal["auto", "bfloat16"] | None = None
    """Products in bfloat16 while weights stay as they are; ``auto``: where the device multiplies
    bfloat16 itself, which most processors do not (`products.multiplies_halves`); ``false``: nowhere.
    A processor that does rounds logits to bfloat16 too, an eighth of a distillation's gradient where
    teacher and student differ little; elsewhere they come in float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    lora: LoraConfig | None = None
    """``lora = false`` in an arm or variant takes adapters away again: full weights."""
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False

    @field_validator("lora", "autocast", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        """TOML has no null, and an override must be able to say none."""
        return None if value is False else value


class SamplingConfig(Section):
    """How the solver answers while it learns."""

    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=256, ge=1)
    """Answers decoded side by side; also the unit that is saved before it is used."""
    separate_copy: bool = False
    """Sample with a copy of the weights, so that sampling and learning can go on at the same time: for
    ``train.staleness`` above 0, on a machine with cores or memory to spare."""


class ContextConfig(Section):
    """What the self-teacher is shown."""

    type: ContextName = "step_aligned"
    fallback: ContextName | None = None
    """What is shown of an answer that has no context of this type (SDPO: ``environment`` where no
    ``peer`` is right)."""
    alignment: float = Field(default=0.5, ge=0, le=1)
    """Of ``partly_aligned`` (the lab): the share of the critique's steps that keep the answer's own
    words and place; the others stand in the reference's. 1 is step_aligned, 0 the reference."""

    @property
    def label(self) -> str:
        """The kind, with its position where it is the dial: ``partly_aligned@0.6``."""
        return f"{DIAL}@{self.alignment:g}" if self.type == DIAL else self.type

    @property
    def names(self) -> tuple[ContextName, ...]:
        """All kinds that may be shown."""
        return (self.type,) if self.fallback is None else (self.type, self.fallback)

    @model_validator(mode="after")
    def _two_kinds(self) -> ContextConfig:
        if self.fallback is not None and self.fallback in (self.type, "none"):
            raise ValueError('fallback is another context than type, and not "none"')
        return self


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
    student_mix: float = Field(default=0.5, ge=0, le=1)


TeacherConfig = Annotated[
    Union[InitialTeacher, LiveTeacher, EmaTeacher, TrustRegionTeacher],  # noqa: UP007
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
    group_size: int = Field(default=8, ge=1)
    num_iterations: int = Field(default=1, ge=1)
    staleness: int = Field(default=0, ge=0)
    """How many steps old the weights are that answer. 0: each step is over before the next begins. 1: a
    step is marked while another one learns; 2 and more: sampling is further ahead."""
    micro_batch_tokens: int = Field(default=16_384, ge=1)
    """Padded tokens (prompt and answer, student and teacher) in one forward pass."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest prompt with answer, in tokens; by default what the model was built for. A sample that
    does not fit is dropped and counted, never cut."""
    checkpoint_every: int = Field(default=10, ge=1)
    keep_checkpoints: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """torch threads of a run; by default all cores for one run, one each in a study."""


class DistributedConfig(Section):
    """How ranks that torchrun has started train together; without torchrun there is one."""

    shard: Literal["none", "full"] = "none"
    """``none``: every rank holds the whole model, gradients are summed. ``full``: weights, gradients,
    moments and teacher lie in pieces on all ranks (FSDP2)."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """What sharded weights are gathered and multiplied in; by default as they are stored."""
    reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """What gradients of sharded weights are summed in; by default as param_dtype."""
    timeout_seconds: float = Field(default=3600.0, gt=0)
    """How long a rank waits for the others, a slow critic's included, before the job ends."""

    @model_validator(mode="after")
    def _of_shards(self) -> DistributedConfig:
        if self.shard == "none" and (self.param_dtype or self.reduce_dtype):
            raise ValueError('param_dtype and reduce_dtype are of shard = "full"')
        return self


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


class TrackingConfig(Section):
    """Where numbers go besides metrics.jsonl; nothing leaves the machine unless it is asked for."""

    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = Field(default="selfteach", min_length=1)
    """Under which Weights & Biases and trackio file their runs."""


class Recipe(Section):
    """One run: one arm, one seed."""

    seed: int = Field(default=0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = LabData()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = TransformersEngineConfig()
    critic: CriticConfig | None = None
    context: ContextConfig = ContextConfig(type="none")
    teacher: TeacherConfig = InitialTeacher()
    objective: ObjectiveConfig = DistillationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("critic", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        """``critic = false`` in an arm takes away the critic that others share."""
        return None if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _default_types(cls, values: Any) -> Any:
        """A section that names no ``type`` is of the default one: ``objective.train_on=incorrect`` suffices."""
        if not isinstance(values, Mapping):
            return values
        defaults = {
            "data": "lab",
            "engine": "transformers",
            "critic": "oracle",
            "teacher": "initial",
            "objective": "distillation",
        }
        typed = {
            name: {"type": kind, **values[name]}
            for name, kind in defaults.items()
            if isinstance(values.get(name), Mapping)
        }
        return {**values, **typed}

    @model_validator(mode="after")
    def _sensible(self) -> Recipe:
        told, rewarded = terms(self.objective)
        for name in self.context.names:
            if name in CRITIC_CONTEXTS and self.critic is None:
                raise ValueError(f'context "{name}" needs a critic: add [critic] type = "oracle"')
        if told is None and self.context.type != "none":
            raise ValueError(f'grpo takes no context, found context "{self.context.type}"')
        if told is not None and self.train.steps > 0:
            _can_teach(told, self)
        few = self.train.group_size < 2
        if rewarded is not None and few:
            raise ValueError("grpo needs at least 2 group_size to compare")
        if "peer" in self.context.names and few:
            raise ValueError('context "peer" needs at least 2 group_size')
        if self.sampling.separate_copy and self.engine.type != "transformers":
            raise ValueError(
                "sampling.separate_copy is a copy for the engine in this process; "
                f'engine.type = "{self.engine.type}" needs none'
            )
        return self


def _can_teach(told: DistillationConfig, recipe: Recipe) -> None:
    if recipe.context.type == "none":
        raise ValueError(
            'distillation with context "none" has nothing to teach: choose a context, '
            'for example [context] type = "step_aligned"'
        )
    if told.needs_critique and recipe.critic is None:
        gate = "from_first_error" if told.from_first_error else "changed_steps_fraction"
        raise ValueError(f"{gate} needs a critic to say where the first error is")


CRITIC_CONTEXTS = frozenset(
    name
    for name in CONTEXTS
    if name not in ("none", "reference", "aligned_reference", "peer", "environment")
)
"""Contexts that are made from a critique."""
