"""Which devices do what, whether they can hold it, and how many that takes at least."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from selfteach.commands.check.memory import FLOAT, Item, gib, memory
from selfteach.errors import RecipeError
from selfteach.models.architectures import Shape
from selfteach.planning.costs import SERVED_BYTES, served_bytes
from selfteach.planning.devices import Device
from selfteach.planning.workload import Work, longest_teacher

TRAINER_ROOM, ENGINE_ROOM = 0.92, 0.90
"""Shares of a device's memory that are filled: the allocator and the driver take the rest; an engine
takes what vLLM takes unless it is told otherwise."""
SEATS = 256
"""Answers that an engine generates at a time at most, as vLLM unless it is told otherwise."""
GROUPS = (1, 2, 4, 8)
"""Over how many devices of a node a model may be split."""
MOST_TRAINERS = 4096
"""Where the search for enough trainers ends."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Devices by what they do. Without samplers of their own trainers sample, without critics of
    their own the devices that sample and learn mark too, each in turn."""

    trainers: int
    samplers: int = 0
    critics: int = 0
    sampler_group: int = 1
    """Devices that share one model: tensor parallelism."""
    critic_group: int = 1

    @property
    def devices(self) -> int:
        """All of them."""
        return self.trainers + self.samplers + self.critics

    @property
    def sampler_replicas(self) -> int:
        """Engines that sample."""
        return max(1, (self.samplers or self.trainers) // self.sampler_group)

    @property
    def critic_replicas(self) -> int:
        """Engines that mark."""
        return max(1, (self.critics or self.trainers) // self.critic_group)


@dataclass(frozen=True, slots=True)
class Held:
    """What a device of one kind holds."""

    role: str
    items: tuple[Item, ...]
    room: float
    """Bytes that may be filled."""

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(item.bytes for item in self.items)

    @property
    def fits(self) -> bool:
        """True if a device can hold it."""
        return self.bytes <= self.room


def slots_of(shape: Shape, device: Device, group: int, length: float, resting: int = 0) -> int:
    """Answers of so many tokens for which a group has keys and values; 0 if not even for one.

    ``resting`` bytes of each device are somebody else's.
    """
    room = (ENGINE_ROOM * device.memory - resting) * group - served_bytes(shape)
    return max(0, min(SEATS, int(room / (kv_bytes(shape) * length))))


def kv_bytes(shape: Shape) -> int:
    """Keys and values of one token."""
    return 2 * shape.layers * shape.keys * SERVED_BYTES


def groups_of(shape: Shape, device: Device, longest: float) -> list[int]:
    """Groups that can serve a model with one answer of the greatest length; empty if none can."""
    sizes = [g for g in GROUPS if g <= device.devices_per_node and shape.kv_heads % g == 0]
    return [g for g in sizes if slots_of(shape, device, g, longest) > 0]


def sampler_groups(work: Work, device: Device) -> list[int]:
    """Groups for the solver."""
    return groups_of(work.load.shape, device, work.prompt + work.answer.cap)


def critic_groups(work: Work, device: Device) -> list[int]:
    """Groups for a critic that is served; ``[1]`` where none is."""
    asked = work.asked
    if asked.marker != "served" or asked.shape is None or asked.critique is None:
        return [1]
    longest = asked.prompt + work.answer.cap + asked.critique.cap
    return groups_of(asked.shape, device, longest)


def held_by(work: Work, device: Device, layout: Layout) -> list[Held]:
    """What a device of each kind holds at its peak; engines take what is left for more answers."""
    rows = [Held("trainer", _trainer(work, layout), TRAINER_ROOM * device.memory)]
    room, asked = ENGINE_ROOM * device.memory, work.asked
    if layout.samplers or work.engine == "vllm":
        longest = work.prompt + work.answer.cap
        items = _engine(work.load.shape, layout.sampler_group, longest, "solver's weights")
        rows.append(_beside(work, layout, layout.samplers, "samples", items, room))
    if asked.marker == "served" and asked.shape is not None and asked.critique is not None:
        longest = asked.prompt + work.answer.cap + asked.critique.cap
        items = _engine(asked.shape, layout.critic_group, longest, "critic's weights")
        rows.append(_beside(work, layout, layout.critics, "marks", items, room))
    return rows


def fewest_trainers(work: Work, device: Device) -> int | None:
    """The least number of trainers that hold their share; None if no number does."""
    trainers = 1
    while trainers <= MOST_TRAINERS:
        layout = Layout(trainers, samplers=1)
        if Held("", _trainer(work, layout), TRAINER_ROOM * device.memory).fits:
            return trainers
        trainers += 1 if trainers < device.devices_per_node else device.devices_per_node
    return None


def require_room(work: Work, device: Device, layout: Layout, name: str) -> None:
    """Raises `RecipeError` that says how many devices of a kind are needed."""
    for model, groups, count, kind in (
        ("the solver", sampler_groups(work, device), layout.samplers, "samplers"),
        ("the critic", critic_groups(work, device), layout.critics, "critics"),
    ):
        served = work.asked.marker == "served"
        if kind == "samplers":
            served = layout.samplers > 0 or work.engine == "vllm"
        if served and not groups:
            raise RecipeError(f"{model} does not fit on {device.devices_per_node} × {name}")
        if not served:
            continue
        has, asked = count or layout.trainers, f"--{kind if count else 'trainers'}"
        if has < groups[0]:
            raise RecipeError(f"{asked} {has}: {model} needs at least {groups[0]} × {name}")
    for held in held_by(work, device, layout):
        if held.fits:
            continue
        told = f"{gib(held.bytes)} on a {held.role}, where {name} has {gib(int(held.room))}"
        fewest = fewest_trainers(work, device)
        if held.role != "trainer":
            own = "--samplers" if held.role.endswith("samples") else "--critics"
            raise RecipeError(f"{told}: give that engine devices of its own, {own}")
        if fewest is None:
            raise RecipeError(
                f"{told}, however many share the weights: lower train.micro_batch_tokens or "
                "sampling.max_tokens, or set model.gradient_checkpointing"
            )
        raise RecipeError(f"--trainers {layout.trainers}: {told}; at least {fewest} are needed")


def _trainer(work: Work, layout: Layout) -> tuple[Item, ...]:
    """A trainer's peak: learning, or sampling in its own process."""
    load = dataclasses.replace(work.load, shards=layout.trainers)
    needed = memory(load)
    learning = sum(item.bytes for item in needed.training)
    sampling = sum(item.bytes for item in needed.sampling)
    samples = not layout.samplers and work.engine != "vllm" and sampling > learning
    items = (*needed.always, *(needed.sampling if samples else needed.training))
    asked = work.asked
    if asked.marker == "own" and asked.shape is not None and asked.shape != load.shape:
        size = asked.shape.parameters
        items = (*items, Item("critic's weights", FLOAT * size, f"{size:,} × {FLOAT} bytes"))
    return items


def resting(work: Work, layout: Layout) -> int:
    """Bytes that a trainer keeps while an engine has its device."""
    needed = memory(dataclasses.replace(work.load, shards=layout.trainers))
    return sum(item.bytes for item in needed.always)


def _beside(
    work: Work, layout: Layout, own: int, does: str, items: tuple[Item, ...], room: float
) -> Held:
    """An engine on devices of its own, or on the trainers'."""
    if own:
        return Held({"samples": "sampler", "marks": "critic"}[does], items, room)
    kept = Item("trainer at rest", resting(work, layout), "weights and moments, while it waits")
    return Held(f"trainer that {does}", (kept, *items), room)


def _engine(shape: Shape, group: int, longest: float, name: str) -> tuple[Item, ...]:
    size, token = shape.parameters, kv_bytes(shape)
    return (
        Item(name, served_bytes(shape) // group, f"{size:,} × {SERVED_BYTES} bytes / {group}"),
        Item(
            "one answer's keys and values",
            int(longest * token) // group,
            f"{longest:,.0f} tokens × {token:,} bytes / {group}",
        ),
    )


def check_lengths(work: Work) -> str | None:
    """A word of warning where samples at the limit would not fit the window; None if they do."""
    longest, window = longest_teacher(work), work.load.shape.positions
    if longest <= window:
        return None
    return f"a sample at the limit has {longest:,} tokens, the model's window {window:,}"
