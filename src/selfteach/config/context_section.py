"""Defines ``[context]``: what the self-teacher is shown besides the question."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, Tag, model_validator

from selfteach.config.part_section import BUILT_IN, CUSTOM, CustomPart, custom_name_or
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
    "other_reference",
    "peer",
    "environment",
]
CONTEXTS: tuple[ContextName, ...] = get_args(ContextName)
ContextType = Annotated[
    Annotated[ContextName, Tag(BUILT_IN)] | Annotated[str, Tag(CUSTOM)],
    custom_name_or("context", CONTEXTS),
]
"""One of our contexts, or the name of one's own."""
PARTLY_ALIGNED = "partly_aligned"
"""The context with a degree of alignment, from the reference (0) to the critique (1)."""
CRITIC_CONTEXTS = frozenset(
    name
    for name in CONTEXTS
    if name
    not in ("none", "reference", "aligned_reference", "other_reference", "peer", "environment")
)
"""Contexts that are made from a critique."""


class ContextConfig(Section):
    """Sets what the self-teacher is shown."""

    type: ContextType = "step_aligned"
    """What the teacher's prompt holds besides the question; ``none``: nothing, a control; or a context
    of one's own, ``package.module:name`` or ``./file.py:name``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of a context of one's own."""
    fallback: ContextType | None = None
    """Context of rollouts for which ``type`` cannot be built (SDPO: ``environment`` where no ``peer``
    is correct)."""
    alignment: float = Field(default=0.5, ge=0, le=1)
    """For ``partly_aligned`` (the lab): share of the critique's steps that keep the rollout's words and
    order; the others take the reference's. 1 is ``step_aligned``, 0 the reference."""

    @property
    def label(self) -> str:
        """Return the type, with its degree where it has one: ``partly_aligned@0.6``.

        Of one's own, the file's or module's name with the options: ``context.py:shown(lines=3)``.
        """
        if self.custom_part is not None:
            return self.custom_part.label
        partly = self.type == PARTLY_ALIGNED
        return f"{PARTLY_ALIGNED}@{self.alignment:g}" if partly else self.type

    @property
    def custom_part(self) -> CustomPart | None:
        """Return the context of one's own; None for one of ours."""
        return None if self.type in CONTEXTS else CustomPart(type=self.type, options=self.options)

    @property
    def custom_fallback(self) -> CustomPart | None:
        """Return the fallback of one's own, which has no options; None for one of ours, or none."""
        ours = self.fallback is None or self.fallback in CONTEXTS
        return None if ours or self.fallback is None else CustomPart(type=self.fallback)

    @property
    def names(self) -> tuple[str, ...]:
        """Return all types that may be shown."""
        return (self.type,) if self.fallback is None else (self.type, self.fallback)

    @model_validator(mode="after")
    def _check_fallback(self) -> ContextConfig:
        if self.fallback is not None and self.fallback in (self.type, "none"):
            raise ValueError('fallback must differ from type and from "none"')
        if self.options and self.custom_part is None:
            raise ValueError(f'options are for a context of your own; "{self.type}" takes none')
        return self
