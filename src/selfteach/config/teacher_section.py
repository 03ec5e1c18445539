"""Defines ``[teacher]``: the weights of the self-teacher."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, Tag

from selfteach.config.part_section import CUSTOM, CustomPart, custom_or
from selfteach.config.schema import Section


class InitialTeacherConfig(Section):
    """Teaches with the frozen initial policy."""

    type: Literal["initial"] = "initial"
    """The initial policy."""


class LiveTeacherConfig(Section):
    """Teaches with the current policy."""

    type: Literal["live"]
    """The current policy."""


class EmaTeacherConfig(Section):
    """Teaches with an exponential moving average of the weights, updated after each optimizer step."""

    type: Literal["ema"]
    """An exponential moving average."""
    rate: float = Field(default=0.05, gt=0, le=1)
    """Share of the student's weights in each update: teacher = (1 − rate) teacher + rate student."""


class TrustRegionTeacherConfig(Section):
    """Teaches with a mix of the initial policy's and the current policy's logits."""

    type: Literal["trust_region"]
    """A mix of logits."""
    student_mix: float = Field(default=0.5, ge=0, le=1)
    """Weight of the current policy's logits; the initial policy's have the rest."""


class CustomTeacherConfig(CustomPart):
    """Teaches with a class of one's own, a `Teacher` of `selfteach.protocols`."""


TeacherConfig = Annotated[
    Union[  # noqa: UP007
        Annotated[InitialTeacherConfig, Tag("initial")],
        Annotated[LiveTeacherConfig, Tag("live")],
        Annotated[EmaTeacherConfig, Tag("ema")],
        Annotated[TrustRegionTeacherConfig, Tag("trust_region")],
        Annotated[CustomTeacherConfig, Tag(CUSTOM)],
    ],
    custom_or("teacher", ("initial", "live", "ema", "trust_region")),
]
