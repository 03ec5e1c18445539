"""Assign devices to roles, check that these hold the work, and count how many are needed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from selfteach.commands.planning.costs import SERVED_BYTES, served_bytes
from selfteach.commands.planning.devices import Device
from selfteach.commands.planning.workload import StepWork, longest_teacher_sequence
from selfteach.errors import RecipeError
from selfteach.models.architectures import Shape
from selfteach.trainer.device_memory import FLOAT, Item, fit, gib, memory

TRAINER_MEMORY_SHARE, ENGINE_MEMORY_SHARE = 0.92, 0.90
"""Usable shares of a device's memory: allocator and driver take the rest; an engine takes
vLLM's default."""
MAX_NUM_SEQS = 256
"""Rollouts that an engine decodes at a time at most: vLLM's default."""
GROUP_SIZES = (1, 2, 4, 8)
"""Devices of a node over which a model may be split (tensor parallelism)."""
MAX_TRAINERS = 4096
"""Where the search for enough trainers ends."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Holds the number of devices per role.

    With 0 samplers the trainers sample, with 0 critics the devices that sample and train also serve
    the critic; these then take turns.
    """

    trainers: int
    samplers: int = 0
    critics: int = 0
    sampler_group: int = 1
    """Devices that share one model: tensor parallelism."""
    critic_group: int = 1

    @property
    def devices(self) -> int:
        """Return the number of all devices."""
        return self.trainers + self.samplers + self.critics

    @property
    def sampler_replicas(self) -> int:
        """Return the number of engines that sample."""
        return max(1, (self.samplers or self.trainers) // self.sampler_group)

    @property
    def critic_replicas(self) -> int:
        """Return the number of engines that serve the critic."""
        return max(1, (self.critics or self.trainers) // self.critic_group)


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """Holds the memory of one device of a role."""

    role: str
    engine: Literal["samplers", "critics"] | None
    """What an engine on this device does; None for a trainer alone."""
    items: tuple[Item, ...]
    available: float
    """Usable bytes."""

    @property
    def bytes(self) -> int:
        """Return the sum of all items."""
        return sum(item.bytes for item in self.items)

    @property
    def fits(self) -> bool:
        """Return True if a device can hold it."""
        return self.bytes <= self.available


def decoding_slots(
    shape: Shape, device: Device, group: int, length: float, resident: int = 0
) -> int:
    """Return the sequences of ``length`` tokens whose keys and values a group holds; 0 if not one.

    ``resident`` bytes of each device are taken by something else.
    """
    free = (ENGINE_MEMORY_SHARE * device.memory - resident) * group - served_bytes(shape)
    return max(0, min(MAX_NUM_SEQS, int(free / (kv_bytes(shape) * length))))


def kv_bytes(shape: Shape) -> int:
    """Return the bytes of one token's keys and values."""
    return 2 * shape.layers * shape.keys * SERVED_BYTES


def group_sizes(shape: Shape, device: Device, longest: float) -> list[int]:
    """Return the group sizes that hold a model and one sequence of ``longest`` tokens."""
    sizes = [g for g in GROUP_SIZES if g <= device.devices_per_node and shape.kv_heads % g == 0]
    return [g for g in sizes if decoding_slots(shape, device, g, longest) > 0]


def sampler_groups(work: StepWork, device: Device) -> list[int]:
    """Return the group sizes that can serve the policy."""
    return group_sizes(work.load.shape, device, work.prompt + work.rollout_lengths.cap)


def critic_groups(work: StepWork, device: Device) -> list[int]:
    """Return the group sizes that can serve the critic; ``[1]`` if no critic is served."""
    longest = _longest_critic_sequence(work)
    if longest is None or work.critic.shape is None:
        return [1]
    return group_sizes(work.critic.shape, device, longest)


def memory_by_role(work: StepWork, device: Device, layout: Layout) -> list[RoleMemory]:
    """Return each role's peak memory; an engine uses what is left for more sequences."""
    trainer = _trainer_items(work, device, layout)
    rows = [RoleMemory("trainer", None, trainer, TRAINER_MEMORY_SHARE * device.memory)]
    available = ENGINE_MEMORY_SHARE * device.memory
    if layout.samplers or work.engine == "vllm":
        longest = work.prompt + work.rollout_lengths.cap
        items = _engine_items(work.load.shape, layout.sampler_group, longest, "policy's weights")
        rows.append(_engine_memory(work, layout, "samplers", items, available))
    longest = _longest_critic_sequence(work)
    if longest is not None and work.critic.shape is not None:
        items = _engine_items(work.critic.shape, layout.critic_group, longest, "critic's weights")
        rows.append(_engine_memory(work, layout, "critics", items, available))
    return rows


def _longest_critic_sequence(work: StepWork) -> float | None:
    """Return the tokens of the longest sequence of a served critic; None if none is served."""
    critic = work.critic
    if critic.kind != "served" or critic.critique_lengths is None:
        return None
    return critic.prompt + work.rollout_lengths.cap + critic.critique_lengths.cap


def fewest_trainers(work: StepWork, device: Device) -> int | None:
    """Return the least number of trainers that hold their shard; None if no number does."""
    trainers = 1
    while trainers <= MAX_TRAINERS:
        items = _trainer_items(work, device, Layout(trainers, samplers=1))
        if RoleMemory("trainer", None, items, TRAINER_MEMORY_SHARE * device.memory).fits:
            return trainers
        trainers += 1 if trainers < device.devices_per_node else device.devices_per_node
    return None


def require_memory(work: StepWork, device: Device, layout: Layout, name: str) -> None:
    """Raise `RecipeError` with the number of devices that are needed, where memory is too small."""
    for model, groups, count, role in (
        ("the policy", sampler_groups(work, device), layout.samplers, "samplers"),
        ("the critic", critic_groups(work, device), layout.critics, "critics"),
    ):
        served = work.critic.kind == "served"
        if role == "samplers":
            served = layout.samplers > 0 or work.engine == "vllm"
        if not served:
            continue
        if not groups:
            raise RecipeError(f"{model} does not fit on {device.devices_per_node} × {name}")
        devices, option = count or layout.trainers, f"--{role if count else 'trainers'}"
        if devices < groups[0]:
            raise RecipeError(f"{option} {devices}: {model} needs at least {groups[0]} × {name}")
    for row in memory_by_role(work, device, layout):
        if not row.fits:
            raise RecipeError(_out_of_memory(work, device, layout, row, name))


def _out_of_memory(
    work: StepWork, device: Device, layout: Layout, row: RoleMemory, name: str
) -> str:
    need = f"{gib(row.bytes)} on a {row.role}, where {name} has {gib(int(row.available))}"
    if row.engine is not None:
        return f"{need}: give that engine separate devices, --{row.engine}"
    fewest = fewest_trainers(work, device)
    if fewest is None:
        return (
            f"{need}, however many share the weights: lower train.micro_batch_tokens or "
            "sampling.max_tokens, or set model.gradient_checkpointing"
        )
    return f"--trainers {layout.trainers}: {need}; at least {fewest} are needed"


def on_trainers(work: StepWork, device: Device, layout: Layout) -> StepWork:
    """Return the work with the micro-batch that fits a trainer, where the recipe leaves it open."""
    load = dataclasses.replace(work.load, shards=layout.trainers)
    return dataclasses.replace(work, load=fit(load, device.memory))


def _trainer_items(work: StepWork, device: Device, layout: Layout) -> tuple[Item, ...]:
    """Return a trainer's peak: training, or sampling in its process."""
    load = on_trainers(work, device, layout).load
    needed = memory(load)
    training = sum(item.bytes for item in needed.training)
    sampling = sum(item.bytes for item in needed.sampling)
    samples = not layout.samplers and work.engine != "vllm" and sampling > training
    items = (*needed.always, *(needed.sampling if samples else needed.training))
    critic = work.critic
    if critic.kind == "in_process" and critic.shape is not None and critic.shape != load.shape:
        size = critic.shape.parameters
        items = (*items, Item("critic's weights", FLOAT * size, f"{size:,} × {FLOAT} bytes"))
    return items


def trainer_resident_bytes(work: StepWork, layout: Layout) -> int:
    """Return the bytes that a trainer keeps while an engine uses its device."""
    needed = memory(dataclasses.replace(work.load, shards=layout.trainers))
    return sum(item.bytes for item in needed.always)


def _engine_memory(
    work: StepWork,
    layout: Layout,
    engine: Literal["samplers", "critics"],
    items: tuple[Item, ...],
    available: float,
) -> RoleMemory:
    """Return the memory of an engine on separate devices, or on the trainers'."""
    if layout.samplers if engine == "samplers" else layout.critics:
        return RoleMemory(engine.removesuffix("s"), engine, items, available)
    role = "trainer that samples" if engine == "samplers" else "trainer that serves the critic"
    resident = trainer_resident_bytes(work, layout)
    idle = Item("idle trainer", resident, "weights and moments, while it waits")
    return RoleMemory(role, engine, (idle, *items), available)


def _engine_items(shape: Shape, group: int, longest: float, name: str) -> tuple[Item, ...]:
    size, token_bytes = shape.parameters, kv_bytes(shape)
    return (
        Item(name, served_bytes(shape) // group, f"{size:,} × {SERVED_BYTES} bytes / {group}"),
        Item(
            "one sequence's keys and values",
            int(longest * token_bytes) // group,
            f"{longest:,.0f} tokens × {token_bytes:,} bytes / {group}",
        ),
    )


def window_warning(work: StepWork) -> str | None:
    """Return a warning if samples at the length limits exceed the model's window; else None."""
    longest, window = longest_teacher_sequence(work), work.load.shape.positions
    if longest <= window:
        return None
    return f"a sample at the limit has {longest:,} tokens, the model's window {window:,}"
