"""Compare `selfteach plan` with every measured step: predicted / measured, by class of device.

    python benchmarks/training/plan_accuracy.py            collect measurements.json, print the tables
    python benchmarks/training/plan_accuracy.py --check    fail if the committed file is another one

Measurements are those of ours in the newest results of each machine (`results/*.json`); the table
goes into docs/planning.md. Rates of CPUs are those that the benchmark `limit` measured beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness

from harness import Table

from selfteach.commands.planning.accuracy import DATA, DEFAULTS, comparisons, summary
from selfteach.models.architectures import known_shapes

RESULTS = Path(__file__).resolve().parents[1] / "results"
FILES = {"cpu-avx512": "2026-11-26.json", "cpu-avx2": "2026-11-26.avx2.json"}
GPU, GPU_FILE = "h200-sxm", "2026-11-26.json"
LAB = {
    "family": "llama", "hidden": 128, "intermediate": 384, "layers": 3, "heads": 4, "kv_heads": 4,
    "head_dim": 32, "vocabulary": 37, "positions": 256, "tied": True,
}  # fmt: skip
SMOLLM2 = {
    "family": "llama", "hidden": 576, "intermediate": 1536, "layers": 30, "heads": 9, "kv_heads": 3,
    "head_dim": 64, "vocabulary": 49_152, "positions": 8192, "tied": True,
}  # fmt: skip
CALIBRATED = [
    ("twice the rollouts", 1.625, 1.536), ("eight times the rollouts", 5.705, 5.634),
    ("rollouts of 20 tokens instead of 33", 0.656, 0.638),
    ("batches of 8 rollouts instead of 32", 1.496, 1.380),
    ("micro-batches of 1,024 tokens", 1.037, 0.961), ("two updates per step", 1.624, 1.382),
    ("a critic of 0.25 s, 8 at a time, in sequence", 1.891, 1.907),
]  # fmt: skip
"""The table of plan_check.py in docs/planning.md: setting, predicted and measured seconds a step."""
CUDNN = "cuDNN's attention planned each shape anew; it has been turned off since"
STEPS: dict[str, dict[str, Any]] = {
    "lab": {
        "shape": "lab", "rollouts": 32, "problems": 4, "prompt": 8, "shared_prompt": 1, "length": 33,
    },
    "SmolLM2-135M": {
        "shape": "SmolLM2-135M", "rollouts": 8, "problems": 2, "prompt": 310, "shared_prompt": 293,
        "length": 32,
    },
    "Qwen2.5-1.5B, random weights": {
        "shape": "Qwen2.5-1.5B", "rollouts": 32, "problems": 4, "prompt": 128, "length": 512,
        "bytes": 2,
    },
}  # fmt: skip
"""The work of a step by model: prompts as `check.sizes` counts them, rollouts as they were sampled."""
TEACHERS: dict[str, dict[str, Any]] = {
    "lab": {"teacher_prompt": 41, "shared_teacher_prompt": 1},
    "SmolLM2-135M": {"teacher_prompt": 578, "shared_teacher_prompt": 498},
    "Qwen2.5-1.5B, random weights": {"teacher_prompt": 384},
}
"""Tokens of the teacher's prompt with a reference, counted alike."""
CRITIQUE: dict[str, Any] = {"teacher_prompt": 9, "shared_teacher_prompt": 1, "trace": True}
"""The lab's teacher's prompt without the critique."""
SAMPLED: dict[tuple[str, bool], dict[str, Any]] = {
    ("lab", False): {"prompt": 8, "shared_prompt": 1},
    ("lab", True): {"prompt": 8, "shared_prompt": 1},
    ("SmolLM2-135M", False): {"prompt": 48, "shared_prompt": 24},
    ("SmolLM2-135M", True): {"prompt": 64},
}
"""Prompts of the benchmarks of sampling (`rollout/sampling.py`) by model, and whether on a GPU."""


def collected() -> dict[str, Any]:
    """Return what measurements.json holds."""
    rows, devices = list(_gpu_rows()), dict[str, Any]()
    classes = {GPU: GPU}
    for device, file in FILES.items():
        results = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        rates = {row["what"]: row["rate"] for row in results["limit"]["tables"][0]["rows"]}
        devices[device] = _device(file, rates)
        rows += _cpu_rows(device, file, results)
    classes |= dict.fromkeys(devices, "cpu")
    shapes = {"lab": LAB, "SmolLM2-135M": SMOLLM2}
    shapes |= {f"lab, V {v}": {**LAB, "vocabulary": v} for v in (1_024, 8_192, 32_768)}
    shapes["Qwen2.5-1.5B"] = dataclasses.asdict(known_shapes()["Qwen/Qwen2.5-1.5B-Instruct"])
    names = ("setting", "predicted", "measured")
    return {
        "shapes": shapes, "measured_devices": devices, "classes": classes, "measurements": rows,
        "calibrated": [dict(zip(names, row, strict=True)) for row in CALIBRATED],
    }  # fmt: skip


def _device(file: str, rates: dict[str, str]) -> dict[str, Any]:
    """Return a CPU with the rate of float32, as `selfteach plan --device here` measures it."""
    fastest = max(float(rate.split()[0]) for what, rate in rates.items() if "float32" in what)
    bandwidth = float(next(r for what, r in rates.items() if what.startswith("copy")).split()[0])
    return {
        "memory_gib": 16.0, "tflops": fastest / 1e3,
        "memory_gb_per_s": bandwidth, "link_gb_per_s": bandwidth,
        "devices_per_node": 1, "network_gb_per_s": 1.25, "host_gb_per_s": bandwidth,
        "source": f"one thread, measured: benchmarks/results/{file}, limit",
    }  # fmt: skip


def _row(name: str, device: str, phase: str, seconds: float, source: str, **work: Any) -> Any:
    changed = {key: value for key, value in work.items() if DEFAULTS.get(key) != value}
    return {
        "name": name,
        "device": device,
        "phase": phase,
        "seconds": round(seconds, 5),
        **changed,
        "source": f"benchmarks/results/{source}",
    }


def _step_rows(device: str, source: str, row: dict[str, Any], **more: Any) -> Iterator[Any]:
    """Yield training, and sampling where it was measured, of a step of ours."""
    model, kind = row["model"], row["kind"]
    work = {**STEPS[model], **more}
    if kind != "grpo":
        work |= TEACHERS[model]
    if kind == "full, critique":
        work |= CRITIQUE
    if row["who"].endswith("bf16"):
        work["bytes"] = 2
    sampling = row.get("sampling") or 0.0
    name = f"{model}: {kind}" + (", bf16" if row["who"].endswith("bf16") else "")
    yield _row(name, device, "train", row["step"] - sampling, source, **work)
    if sampling:
        yield _row(name, device, "rollout", sampling, source, **work)


def _gpu_rows() -> Iterator[Any]:
    results = json.loads((RESULTS / GPU_FILE).read_text(encoding="utf-8"))
    whole, small = results["training_step_gpu"]["tables"]
    source = f"{GPU_FILE}, training_step_gpu"
    for row in whole["rows"]:
        if row["who"] == "ours":
            yield from _step_rows(GPU, source, row)
    for row in small["rows"]:
        if row["who"] == "ours":
            more = {"micro_batch_tokens": 3_584, "excluded": CUDNN}
            for one in _step_rows(GPU, source, row, **more):
                yield one | {"name": one["name"] + ", 3,584 tokens a micro-batch"}
    for row in results["sampling_gpu"]["tables"][0]["rows"]:
        if row["way"] == "selfteach" and row["seconds"]:
            shape = "lab" if row["model"] == "lab" else "SmolLM2-135M"
            yield _sampling_row(GPU, f"{GPU_FILE}, sampling_gpu", shape, row, row["dtype"])


def _sampling_row(device: str, source: str, shape: str, row: dict[str, Any], dtype: str) -> Any:
    rollouts = row["answers"]
    return _row(
        f"{shape}: sampling {rollouts} rollouts, {dtype}", device, "rollout", row["seconds"], source,
        shape=shape, rollouts=rollouts, problems=max(1, rollouts // 8),
        **SAMPLED[shape, device == GPU], length=round(row["mean length"]),
        bytes=2 if dtype == "bfloat16" else 4,
    )  # fmt: skip


def _cpu_rows(device: str, file: str, results: dict[str, Any]) -> Iterator[Any]:
    for row in results["training_step"]["tables"][0]["rows"]:
        if row["who"] in ("ours", "ours, bf16") and row["step"]:
            yield from _step_rows(device, f"{file}, training_step", row)
    for index, shape in ((0, "lab"), (1, "lab"), (2, "SmolLM2-135M")):
        for row in results["sampling"]["tables"][index]["rows"]:
            if row["way"] == "selfteach" and row["seconds"]:
                mixed = ", mixed lengths" if index == 1 else ""
                made = _sampling_row(device, f"{file}, sampling", shape, row, "float32")
                yield made | {"name": made["name"] + mixed}
    arms, growth = results["main_job"]["tables"][:2]
    source = f"{file}, main_job"
    for row in arms["rows"]:
        if row["tree"] == "now":
            yield from _main_rows(device, source, f"lab: arm {row['arm']}", row, row["arm"])
    for row in growth["rows"]:
        if isinstance(row["size"], int):
            yield from _growth_rows(device, source, row)


def _main_rows(
    device: str, source: str, name: str, row: dict[str, Any], arm: str, **more: Any
) -> Iterator[Any]:
    work = {**STEPS["lab"], **more}
    if arm != "grpo":
        work |= TEACHERS["lab"] if arm == "reference" else CRITIQUE
    yield _row(name, device, "train", row["learning"], source, **work)
    yield _row(name, device, "rollout", row["sampling"], source, **work)


def _growth_rows(device: str, source: str, row: dict[str, Any]) -> Iterator[Any]:
    more: dict[str, Any] = {"length": 32}
    match row["grows"]:
        case "answers":
            more |= {"rollouts": row["size"], "problems": row["size"] // 8}
        case "vocabulary":
            more["shape"] = "lab" if row["size"] == LAB["vocabulary"] else f"lab, V {row['size']}"
        case _:
            more["length"] = row["size"]
    name = f"lab: {row['size']:,} {row['grows']}"
    yield from _main_rows(device, source, name, row, "reference", **more)


def tables() -> list[Table]:
    """Return the errors by class of device and phase, and every comparison."""
    errors = Table("Predicted / measured, without calibration")
    for kind in dict.fromkeys(row.device_class for row in comparisons()):
        for phase in ("train", "rollout"):
            error = summary(kind, phase)
            if error is not None:
                errors.rows.append({
                    "device class": kind, "phase": phase, "measurements": error.count,
                    "median": round(error.median, 2), "lowest": round(error.low, 2),
                    "highest": round(error.high, 2), "worst": round(error.worst, 2),
                })  # fmt: skip
    every = Table("Every measurement")
    every.rows = [
        {
            "device": row.device, "setting": row.name, "phase": row.phase,
            "predicted, s": row.predicted, "measured, s": row.measured,
            "ratio": row.ratio, "left out": row.excluded,
        }
        for row in comparisons()
    ]  # fmt: skip
    return [errors, every]


def written(values: dict[str, Any]) -> str:
    """Return the text of measurements.json: a line for each measurement."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in value)
            lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Collect, and print the tables."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--check", action="store_true", help="only compare with the file")
    args = options.parse_args()
    text = written(collected())
    if args.check and text != DATA.read_text(encoding="utf-8"):
        raise SystemExit(f"{DATA} is not what the results give: run this script without --check")
    DATA.write_text(text, encoding="utf-8")
    for table in tables():
        print(table.markdown())


if __name__ == "__main__":
    main()
