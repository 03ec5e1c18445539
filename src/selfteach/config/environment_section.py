"""Defines ``[environment]``: what replies to the turns of the policy, and the limits of an episode."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, Tag, field_validator

from selfteach.config.code_section import Isolation
from selfteach.config.part_section import CUSTOM, CustomPart, custom_or
from selfteach.config.schema import Section


class EpisodeConfig(Section):
    """Sets the limits of an episode; each turn has the token limit of ``sampling.max_tokens``."""

    max_turns: int = Field(default=8, ge=1)
    """Turns of the policy; an episode that would need another one ends, out of budget."""
    deadline_s: float = Field(default=60.0, gt=0)
    """Seconds for each reply; an environment that takes longer ends its episode."""
    concurrency: int = Field(default=32, ge=1)
    """Environments that reply at the same time."""
    max_reply_chars: int = Field(default=4000, ge=100)
    """Longest message of an environment in characters; of a longer one the middle is left out, and its
    place says so."""
    seed_by: Literal["sample", "problem"] = "sample"
    """Whether each episode's environment has a seed of its own, or all episodes of a problem have the
    same, at every step: for environments that draw the task by the seed."""


class CalculatorEnvironmentConfig(EpisodeConfig):
    """Offers a calculator; a turn without a call is the answer."""

    type: Literal["calculator"]
    """A calculator."""


class PythonEnvironmentConfig(EpisodeConfig):
    """Offers Python in isolated processes ([code](code.md#isolation)); a turn without a call is the
    answer."""

    type: Literal["python"]
    """Python."""
    isolation: Isolation = "auto"
    """How programs are isolated, as ``data.code.isolation``."""
    cpu_s: float = Field(default=5.0, gt=0, le=600)
    """Seconds of CPU time of a program."""
    memory_mb: int = Field(default=1024, ge=64)
    """Address space of a program, in MiB."""
    scratch_mb: int = Field(default=16, ge=1)
    """Size of its scratch folder, and of a file, in MiB."""
    workers: int | None = Field(default=None, ge=1)
    """Number of programs that run at the same time; unset: one per CPU, at most 8."""
    refused_imports: tuple[str, ...] = ("ctypes", "multiprocessing", "socket", "subprocess")
    """Modules whose import is refused with a message that says so."""


class OpenEnvEnvironmentConfig(EpisodeConfig):
    """Runs episodes on a server of OpenEnv's protocol; needs the extra ``openenv``."""

    type: Literal["openenv"]
    """A server of OpenEnv's protocol."""
    seed_by: Literal["sample", "problem"] = "problem"
    """Whether each episode has a seed of its own, or all episodes of a problem the same: servers draw
    the task by the seed, and a group's rollouts are compared."""
    url: str
    """Address of the server, like ``http://localhost:8000``; each episode is a session of its own."""
    action: str = Field(default="message", min_length=1)
    """Key of an action that gets the turn's text."""
    observation: str | None = None
    """Key of an observation whose value the policy reads; unset: the whole observation as JSON."""
    success: float = 1.0
    """Least sum of an episode's rewards that counts as a success; the sum is its reward."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        scheme, _, rest = value.partition("://")
        if scheme not in ("http", "https", "ws", "wss") or not rest:
            raise ValueError(f"{value!r} is no address of a server, like http://localhost:8000")
        return value.rstrip("/")


class VerifiersEnvironmentConfig(EpisodeConfig):
    """Runs the episodes of the environment of `verifiers` that gives the problems
    (``data.type = "verifiers"``)."""

    type: Literal["verifiers"]
    """The environment that ``data`` names."""
    success: float = 1.0
    """Least reward of an episode that counts as a success: the weighted sum of its rubric."""


class CustomEnvironmentConfig(CustomPart, EpisodeConfig):
    """Runs episodes with a class of one's own, an `Environment` of `selfteach.protocols`."""


EnvironmentConfig = Annotated[
    Union[  # noqa: UP007
        Annotated[CalculatorEnvironmentConfig, Tag("calculator")],
        Annotated[PythonEnvironmentConfig, Tag("python")],
        Annotated[OpenEnvEnvironmentConfig, Tag("openenv")],
        Annotated[VerifiersEnvironmentConfig, Tag("verifiers")],
        Annotated[CustomEnvironmentConfig, Tag(CUSTOM)],
    ],
    custom_or("environment", ("calculator", "python", "openenv", "verifiers")),
]
