"""Describe devices: memory, speed, and bandwidth to other devices.

``devices.toml`` names its sources; a file of the same form adds devices or replaces known ones.
"""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from selfteach.config.schema import Section, validate
from selfteach.errors import RecipeError

KNOWN = Path(__file__).with_name("devices.toml")
HERE = "here"
"""The machine this runs on, measured on request."""
GIGA = 1e9
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrix in `measured_here`: a small one would time a GPU's launch overhead."""
COPY_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Bytes copied in `measured_here`: more than a cache holds."""


class Device(Section):
    """Describes one device. Rates are per second and in one direction."""

    memory_gib: float = Field(gt=0)
    tflops: float = Field(gt=0)
    """bfloat16, dense, in 10¹²."""
    memory_gb_per_s: float = Field(gt=0)
    link_gb_per_s: float = Field(gt=0)
    devices_per_node: int = Field(ge=1)
    network_gb_per_s: float = Field(gt=0)
    host_gb_per_s: float = Field(gt=0)
    source: str
    names: tuple[str, ...] = ()
    """What PyTorch calls it: this device, and no smaller or larger one with a similar name."""

    @property
    def flops(self) -> float:
        """Return the peak operations per second."""
        return self.tflops * 1e12

    @property
    def memory(self) -> float:
        """Return the memory in bytes."""
        return self.memory_gib * 2**30

    @property
    def bandwidth(self) -> float:
        """Return the memory bandwidth in bytes per second."""
        return self.memory_gb_per_s * GIGA

    def bandwidth_between(self, devices: int) -> float:
        """Return bytes per second among ``devices``: within a node, or over the network."""
        within = devices <= self.devices_per_node
        return GIGA * (self.link_gb_per_s if within else self.network_gb_per_s)


def known_devices(extra: Path | None = None) -> dict[str, Device]:
    """Return devices by name; rows of ``extra`` replace known ones.

    Raises `RecipeError` for an invalid file.
    """
    devices: dict[str, Device] = {}
    for path in (KNOWN,) if extra is None else (KNOWN, extra):
        try:
            rows = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"--device-file {path}: {error}") from None
        for name, row in rows.items():
            if not isinstance(row, dict):
                raise RecipeError(
                    f"{path}: {name} is not a table; write [{name}] above its numbers"
                )
            devices[name] = validate(Device, row, where=f"{path}: [{name}]")
    return devices


def find_device(name: str, extra: Path | None = None) -> Device:
    """Return a device by name. Raises `RecipeError` that lists the known ones."""
    if name == HERE:
        return measured_here()
    devices = known_devices(extra)
    if name not in devices:
        raise RecipeError(
            f"--device {name!r} is unknown; known devices: {', '.join((HERE, *devices))}; add yours "
            "with --device-file"
        )
    return devices[name]


def measured_here() -> Device:
    """Measure this machine as one device, by a matmul and a copy: a normalizer, not a benchmark."""
    import torch

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    size, copied = MATMUL_SIZE[device.type], COPY_BYTES[device.type]
    # Random, not ones: a GPU that multiplies constants draws less power, and is faster.
    square = torch.rand(size, size, device=device, dtype=dtype)
    buffer = torch.ones(copied, device=device, dtype=torch.uint8)

    def fastest(call: Callable[[], object], repeats: int = 3) -> float:
        seconds = []
        for _ in range(repeats):
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return max(1e-9, min(seconds))

    flops = 2 * size**3 / fastest(lambda: square @ square)
    bandwidth = 2 * copied / fastest(lambda: buffer.clone())
    if gpu:
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gb_per_s = bandwidth / GIGA
    return Device(
        memory_gib=memory / 2**30, tflops=flops / 1e12, memory_gb_per_s=gb_per_s,
        link_gb_per_s=gb_per_s, devices_per_node=1, network_gb_per_s=1.25, host_gb_per_s=gb_per_s,
        source="measured here; a network of 10 Gb/s is assumed",
    )  # fmt: skip
