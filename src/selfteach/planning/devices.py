"""What is known of a device: memory, speed, and how fast it reaches others.

``devices.toml`` names its sources; a file of the same form adds devices or replaces known ones.
"""

from __future__ import annotations

import os
import time
import tomllib
from pathlib import Path

from pydantic import Field

from selfteach.config.schema import Section, validate
from selfteach.errors import RecipeError

KNOWN = Path(__file__).with_name("devices.toml")
HERE = "here"
"""The machine this runs on, measured when it is asked for."""
GIGA = 1e9
SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows of the square that `measured_here` multiplies: a GPU's time for a small one is the call's."""
MOVED = {"cpu": 2**26, "cuda": 2**30}
"""Bytes that it copies: more than a cache holds."""


class Device(Section):
    """One device. Rates are per second and in one direction."""

    memory_gib: float = Field(gt=0)
    tflops: float = Field(gt=0)
    """bfloat16, dense, in 10¹²."""
    memory_gb_per_s: float = Field(gt=0)
    link_gb_per_s: float = Field(gt=0)
    devices_per_node: int = Field(ge=1)
    network_gb_per_s: float = Field(gt=0)
    host_gb_per_s: float = Field(gt=0)
    source: str

    @property
    def flops(self) -> float:
        """Operations per second, at most."""
        return self.tflops * 1e12

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * 2**30

    @property
    def bandwidth(self) -> float:
        """Of its memory, in bytes per second."""
        return self.memory_gb_per_s * GIGA

    def reach(self, devices: int) -> float:
        """Bytes per second between so many devices: within a node, or over the network."""
        within = devices <= self.devices_per_node
        return GIGA * (self.link_gb_per_s if within else self.network_gb_per_s)


def known_devices(more: Path | None = None) -> dict[str, Device]:
    """Devices by name; those of ``more`` come last and win. Raises `RecipeError` for a bad file."""
    devices: dict[str, Device] = {}
    for path in (KNOWN,) if more is None else (KNOWN, more):
        try:
            rows = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"--device-file {path}: {error}") from None
        for name, row in rows.items():
            if not isinstance(row, dict):
                raise RecipeError(f"{path}: {name} is no table; write [{name}] over its numbers")
            devices[name] = validate(Device, row, where=f"{path}: [{name}]")
    return devices


def find_device(name: str, more: Path | None = None) -> Device:
    """A device by name. Raises `RecipeError` that says which there are."""
    if name == HERE:
        return measured_here()
    devices = known_devices(more)
    if name not in devices:
        raise RecipeError(
            f"--device {name!r}: not known; there are {', '.join((HERE, *devices))}, and "
            "--device-file adds others"
        )
    return devices[name]


def measured_here() -> Device:
    """This machine as one device, by a product of matrices and a copy: a normaliser, no benchmark."""
    import torch

    gpu = torch.cuda.is_available()
    where = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    side, bytes_moved = SIDE[where.type], MOVED[where.type]
    # Not all ones: a GPU that multiplies what never changes draws less power, and is faster.
    square = torch.rand(side, side, device=where, dtype=dtype)
    moved = torch.ones(bytes_moved, device=where, dtype=torch.uint8)

    def best(call: object, times: int = 3) -> float:
        assert callable(call)
        taken = []
        for _ in range(times):
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return max(1e-9, min(taken))

    flops = 2 * side**3 / best(lambda: square @ square)
    bandwidth = 2 * bytes_moved / best(lambda: moved.clone())
    if gpu:
        memory = torch.cuda.get_device_properties(where).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = bandwidth / GIGA
    return Device(
        memory_gib=memory / 2**30, tflops=flops / 1e12, memory_gb_per_s=own, link_gb_per_s=own,
        devices_per_node=1, network_gb_per_s=1.25, host_gb_per_s=own,
        source="measured here; a network of 10 Gb/s is assumed",
    )  # fmt: skip
