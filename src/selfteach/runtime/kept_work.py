"""Says what of a folder's work is on disk when a command is ended, and how to go on."""

from __future__ import annotations

from pathlib import Path

from selfteach.runtime.stored_files import read_json


def describe_progress(folder: Path) -> str:
    """Return what a run, study, sweep, selection or forecast has kept in its folder, for a person."""
    if (folder / "study.json").exists():
        what = "what each run has sampled, critiqued and saved"
    elif not (folder / "config.json").exists():
        return f"nothing was begun in {folder}: repeat the command"
    elif "forecast" in read_json(folder / "config.json"):
        return "kept: what was measured, if --out names its folder: repeat the command"
    elif (folder / "result.json").exists():
        return f"kept: the run is complete; selfteach report {folder} writes its report"
    elif saved := sorted((folder / "checkpoints").glob("step_*")):
        step = int(saved[-1].name.removeprefix("step_"))
        what = f"the checkpoint after step {step}, and what was sampled and critiqued since"
    else:
        what = "what was sampled and critiqued"
    return f"kept: {what}; continue with selfteach resume {folder}"
