"""Defines the recipe of one run as data: strict sections with their defaults; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from selfteach.config.context_section import (
    CONTEXTS,
    CRITIC_CONTEXTS,
    PARTLY_ALIGNED,
    ContextConfig,
    ContextName,
)
from selfteach.config.critic_section import CriticConfig
from selfteach.config.data_section import ORACLE_DATA, DataConfig, LabData
from selfteach.config.engine_section import EngineConfig, TransformersEngineConfig
from selfteach.config.environment_section import EnvironmentConfig
from selfteach.config.guard_section import GuardConfig
from selfteach.config.model_checks import check_model
from selfteach.config.model_defaults import with_episode_templates, with_model_defaults
from selfteach.config.objective_section import (
    DistillationConfig,
    GrpoConfig,
    ObjectiveConfig,
    terms,
)
from selfteach.config.part_section import CustomPart
from selfteach.config.reward_section import RewardConfig, check_environment
from selfteach.config.sampling_checks import check_sampling
from selfteach.config.sampling_section import EvaluationConfig, SamplingConfig
from selfteach.config.schema import Section
from selfteach.config.teacher_section import InitialTeacherConfig, TeacherConfig

__all__ = [
    "CONTEXTS",
    "CRITIC_CONTEXTS",
    "PARTLY_ALIGNED",
    "ContextConfig",
    "ContextName",
    "Recipe",
]


class LoraConfig(Section):
    """Trains low-rank adapters through PEFT; the initial teacher is then the model without them."""

    rank: int = Field(default=64, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=128, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Names of the linear layers that get adapters."""


class ThinkingConfig(Section):
    """Turns thinking on or off, for models whose chat template can.

    With ``student = false`` and ``teacher = true`` the teacher expects a thought where the student
    wrote its answer: see ``boundary``.
    """

    student: bool | None = None
    """``enable_thinking`` of the student's prompt; unset: the chat template's default."""
    teacher: bool | None = None
    """``enable_thinking`` of the teacher's prompt; unset: the chat template's default."""
    boundary: Literal["student", "teacher"] = "student"
    """Whose chat-template header goes between the teacher's prompt and the rollout, where the two
    differ: the student's (with Qwen3 and ``student = false`` an empty thought), or the teacher's, after
    which it expects another first token than the student's. Where the template writes the switch in
    the header alone, as Qwen3's does, ``teacher`` has an effect with the teacher's only, and is refused
    with the student's."""
    scored: bool = True
    """Train on the tokens of the thought too; false: only on the tokens after it."""
    tags: tuple[str, str] = ("<think>", "</think>")
    """Opening and closing tag of a thought. Verifier and critic see what follows it."""


class ModelConfig(Section):
    """Names the model that trains, and how it is loaded."""

    path: str = "lab:two_styles"
    """Hugging Face id, folder, ``lab:WORLD`` for a base model of the lab, or ``package:NAME`` for a
    folder inside an installed Python package."""
    gguf_file: str | None = None
    """Name of a GGUF file inside ``path``; its weights are dequantised."""
    templates: str | None = None
    """Prompt templates: ``steps``, ``free``, ``code``, ``chain_sums``, ``lab``; ``steps_few_shot``,
    ``free_few_shot`` and ``code_few_shot``, which show small models worked problems; ``turns`` and
    ``turns_chain_sums`` for episodes, ``turns_few_shot`` and ``turns_chain_sums_few_shot`` with worked
    tool calls; or a folder (named with a slash) whose files override those of ``steps``, or of the sets
    its ``parents.txt`` names; unset: what the data needs."""
    system: str | None = None
    """System prompt of student and teacher, in place of the chat template's. If the
    template has no system role, it is put before the first question."""
    teacher_system: str | None = None
    """System prompt of the teacher, where it is another one than the student's; unset: that of
    ``system``."""
    thinking: ThinkingConfig = ThinkingConfig()
    """Whether student and teacher think before they answer."""
    tool_calls: Literal["family", "json"] = "family"
    """How tools are called ([tools](environments.md#tools)): as the model's family does, or by a JSON
    object on lines of its own, which small models write instead."""
    weights_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Data type of the weights; ``auto``: bfloat16 where the device has bfloat16 matmul, else float32.
    What trains is float32 in any case, adapters or all weights, and so are its moments; matmuls of
    weights that are bfloat16 here are in bfloat16."""
    quantization: Literal["nf4"] | None = None
    """Hold the frozen weights of the decoder's linear layers in 4 bits (QLoRA): ``nf4``, with
    bitsandbytes (the extra ``4bit``). Needs ``model.lora``. Other weights have ``weights_dtype``."""
    autocast: Literal["auto", "bfloat16"] | None = None
    """Multiply matrices in bfloat16 while weights keep their dtype; ``auto``: where the device has
    bfloat16 matmul, which most CPUs lack; ``false``: never. On such a CPU logits are rounded to
    bfloat16 too (up to an eighth of a distillation's gradient where teacher and student differ little);
    on a GPU they are float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the model; ``auto``: CUDA where there is one, else the CPU; ``mps`` is refused."""
    lora: LoraConfig | None = None
    """Adapters to train instead of the full weights; ``lora = false`` in an arm or variant removes
    them."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, more time; ``auto``: where those of the
    smallest micro-batch do not fit; on a CPU only if ``train.micro_batch_tokens`` is auto, too."""
    compile: bool = False
    """Compile the decoder layers for training (``torch.compile``), where their states and gradients
    stay the same; minutes at the start; not with sharding, ``train.deterministic`` or recomputation."""

    @field_validator("lora", "autocast", "quantization", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        """Read false as None: TOML has no null, and an override must be able to unset a key."""
        return None if value is False else value

    @model_validator(mode="after")
    def _check_quantization(self) -> ModelConfig:
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f'quantization = "{self.quantization}" holds frozen weights, and without adapters all '
                "weights train: add [model.lora], or remove quantization"
            )
        if self.quantization is not None and self.gguf_file is not None:
            raise ValueError(
                "quantization and gguf_file exclude each other: a GGUF file's weights are dequantised; "
                "name a folder or hub id with safetensors"
            )
        return self


class OptimizerConfig(Section):
    """Sets AdamW and its learning rate."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate. The default is for the lab; for other models it is 1e-4 with adapters and
    1e-5 if all weights train."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Term added to AdamW's denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of matrices, embeddings and adapters included, not of norms and biases."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; a larger gradient is scaled down."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which the learning rate grows linearly to ``lr``."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate after the warm-up: ``linear`` falls from ``lr`` to 0 after the last
    update, ``cosine`` along half a cosine."""


class TrainConfig(Section):
    """Sets the training loop."""

    steps: int = Field(default=60, ge=0)
    """Number of training steps."""
    problems_per_step: int = Field(default=16, ge=1)
    """Problems per training step."""
    group_size: int = Field(default=8, ge=1)
    """Rollouts sampled for each problem: the group of GRPO."""
    num_iterations: int = Field(default=1, ge=1)
    """Optimizer updates on the rollouts of each training step."""
    staleness: int = Field(default=0, ge=0)
    """Steps by which the sampling weights may lag. 0: each step ends before the next begins. 1: a step
    is critiqued while another one trains; 2 and more: sampling runs further ahead."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens (prompt and rollout, student and teacher) in one forward pass, padding included where the
    device has no attention without padding (bfloat16 on CUDA has); ``auto``: 16,384, or
    as many as fit the memory that the device has free."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and rollout together; unset: the model's context length. A sample that does
    not fit is dropped and counted, never cut."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=1, ge=1)
    """Number of latest checkpoints that are kept."""
    deterministic: bool = False
    """On a GPU, use only algorithms whose sums have a fixed order: runs of one recipe, resumed or not,
    then end in the same weights bit for bit on the same device and software, and are slower. A CPU
    always does."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of torch in a run; unset: all cores for a single run, one each in a study."""


class DistributedConfig(Section):
    """Sets how the ranks of a torchrun job train together."""

    shard: Literal["none", "full"] = "none"
    """``none``: every rank holds the whole model, gradients are summed. ``full``: weights, gradients,
    optimizer state and teacher are sharded over all ranks (FSDP2)."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Data type in which sharded weights are gathered and multiplied; unset: as stored."""
    reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """Data type in which gradients of sharded weights are summed; unset: ``param_dtype``."""
    timeout_seconds: float = Field(default=3600.0, gt=0)
    """How long a rank waits for the others, slow critics included, before the job ends."""

    @model_validator(mode="after")
    def _check_dtypes(self) -> DistributedConfig:
        if self.shard == "none" and (self.param_dtype or self.reduce_dtype):
            raise ValueError('param_dtype and reduce_dtype need shard = "full"')
        return self


class TrackingConfig(Section):
    """Sets where metrics are sent besides metrics.jsonl; by default nothing leaves the machine."""

    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that receive the metrics."""
    project: str = Field(default="selfteach", min_length=1)
    """Name of the project at Weights & Biases and trackio."""


class Recipe(Section):
    """Describes one run: one arm, one seed."""

    seed: int = Field(default=0, ge=0)
    """Seed of sampling, problem order and everything else that is random."""
    model: ModelConfig = ModelConfig()
    """The model that trains."""
    data: DataConfig = LabData()
    """Where problems come from."""
    sampling: SamplingConfig = SamplingConfig()
    """How training rollouts are sampled."""
    engine: EngineConfig = TransformersEngineConfig()
    """What samples the rollouts."""
    environment: EnvironmentConfig | None = None
    """What replies to the policy, turn by turn; unset: rollouts are single answers. ``environment =
    false`` in an arm removes it."""
    critic: CriticConfig | None = None
    """What critiques the rollouts; ``critic = false`` in an arm removes it."""
    context: ContextConfig = ContextConfig(type="none")
    """What the self-teacher is shown."""
    teacher: TeacherConfig = InitialTeacherConfig()
    """Which weights the self-teacher has."""
    reward: RewardConfig | None = None
    """What a rollout is worth; unset: 1 if the verifier accepts it, else 0. ``reward = false`` in an
    arm removes it."""
    objective: ObjectiveConfig = DistillationConfig()
    """What is minimised."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning rate."""
    train: TrainConfig = TrainConfig()
    """The training loop."""
    distributed: DistributedConfig = DistributedConfig()
    """How the ranks of a torchrun job train together."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is evaluated, and when."""
    guard: GuardConfig = GuardConfig()
    """When a run stops by itself, and bounds that it watches."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics are sent."""

    @field_validator("critic", "reward", "environment", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        """Read false as None: ``critic = false`` in an arm removes the critic that others share."""
        return None if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _default_types(cls, values: Any) -> Any:
        """Give a section without ``type`` the default: ``objective.train_on=incorrect`` suffices."""
        if not isinstance(values, Mapping):
            return values
        typed = {
            name: {"type": kind, **values[name]}
            for name, kind in DEFAULT_TYPES.items()
            if isinstance(values.get(name), Mapping)
        }
        return with_episode_templates(with_model_defaults({**values, **typed}))

    @model_validator(mode="after")
    def _check_combinations(self) -> Recipe:
        distillation, grpo = terms(self.objective)
        check_environment(self.data, self.reward, episodes=self.runs_hub_episodes)
        for name in self.context.names:
            if name in CRITIC_CONTEXTS and self.critic is None:
                raise ValueError(f'context "{name}" needs a critic: add [critic] type = "oracle"')
        if grpo and distillation is None and self.context.type != "none":
            raise ValueError(f'grpo uses no context: remove context.type = "{self.context.type}"')
        if distillation is not None and self.train.steps > 0:
            _check_distillation(distillation, self)
        check_sampling(self)
        check_model(self)
        comparing = "grpo" if grpo else 'context "peer"' if "peer" in self.context.names else None
        if comparing and self.train.group_size < 2:
            raise ValueError(f"{comparing} needs a train.group_size of at least 2")
        if self.guard.kl_initial is not None and not self.can_score_initial:
            raise ValueError(
                "guard.kl_initial compares with the initial weights, which this recipe does not keep: "
                'set model.lora, teacher.type = "initial" or, for grpo, objective.kl_coef'
            )
        if self.sampling.separate_copy and self.engine.type != "transformers":
            raise ValueError(
                "sampling.separate_copy is a copy for the engine in this process; "
                f'engine.type = "{self.engine.type}" needs none'
            )
        return self

    @property
    def has_oracle(self) -> bool:
        """Return True if a program can critique the rollouts; of episodes, those with a calculator."""
        if self.environment is None:
            return self.data.type in ORACLE_DATA
        return self.environment.type == "calculator" and self.data.type == "chain_sums"

    @property
    def runs_hub_episodes(self) -> bool:
        """Return True if the environment of `verifiers` that gives the problems runs the episodes."""
        return self.environment is not None and self.environment.type == "verifiers"

    @property
    def most_sampled(self) -> int:
        """Return the most tokens that the model samples in a rollout: of all turns of an episode."""
        turns = 1 if self.environment is None else self.environment.max_turns
        return self.sampling.max_tokens * turns

    @property
    def all_weights_train(self) -> bool:
        """Return True if the model's weights train, and not adapters."""
        return self.model.lora is None and self.train.steps > 0

    @property
    def shows_context(self) -> bool:
        """Return True if the teacher's prompts are built: in distillation, and where an objective of
        one's own is named with a context."""
        if isinstance(self.objective, CustomPart):
            return self.context.type != "none"
        return terms(self.objective)[0] is not None

    @property
    def can_score_initial(self) -> bool:
        """Return True if the initial policy can score: its weights are kept."""
        return self.model.lora is not None or self.scoring_teacher.type == "initial"

    @property
    def scoring_teacher(self) -> TeacherConfig:
        """Return the teacher that scores in training: the initial policy for GRPO's KL penalty."""
        if isinstance(self.objective, GrpoConfig) and self.objective.kl_coef > 0:
            return InitialTeacherConfig()
        return self.teacher


DEFAULT_TYPES = {
    "data": "lab",
    "engine": "transformers",
    "critic": "oracle",
    "teacher": "initial",
    "objective": "distillation",
}
"""The ``type`` of a section that names none."""


def _check_distillation(distillation: DistillationConfig, recipe: Recipe) -> None:
    if "context" not in recipe.model_fields_set:
        raise ValueError(
            "distillation without a context has nothing to teach: choose one, for example "
            '[context] type = "step_aligned" ("none" is a null control)'
        )
    if distillation.needs_critique and recipe.critic is None:
        key = "from_first_error" if distillation.from_first_error else "changed_steps_fraction"
        raise ValueError(f"{key} needs a critic that locates the first error")
