"""Base plus adapters as a standalone model: streamed shard by shard, verified by reloading it before it is published.

All deltas are summed in float32, added to the float32 weight and rounded once. The result is an ordinary model
directory that `AutoModelForCausalLM.from_pretrained` loads without peft.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from config import Config
from utils import adapters, base_model, files
from utils.base_model import COMPANION_FILES, BaseModel
from utils.composition import Factors, delta
from utils.exceptions import ArtefactError, Problem, VerificationError
from utils.logger import event
from utils.progress import Progress

# float32 logits of merged and composed differ by rounding only; 1e-4 of their scale is ten times what was measured
TOLERANCE = 1e-4
PROBE_TOKENS = 48
_RELOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
assert "peft" not in sys.modules
directory, probe, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
with torch.no_grad():
    logits = model(load_file(probe)["input_ids"]).logits.float()
assert "peft" not in sys.modules, "loading the merged model brought in peft"
save_file({"logits": logits.contiguous()}, out)
"""


def merge(
    base: BaseModel,
    factors: Factors,
    target: Path,
    config: Config,
    manifest: Callable[[dict[str, Any]], dict[str, Any]],
    card: str,
) -> dict[str, Any]:
    """Write base + factors to `target` and return what was checked; `target` appears only when every check passed.

    Raises ArtefactError when the target is in the way, the disk is too small or a delta fits no tensor, and
    VerificationError when the reloaded model is not the composed one.
    """
    refuse_target(target)
    dtype = None if config.inference.merge_dtype == "base" else getattr(torch, config.inference.merge_dtype)
    shards = sorted(base.directory.glob("*.safetensors"))
    _check_space(target, shards, dtype)
    checks: dict[str, Any] = {}
    with files.publish(target, lambda: manifest(checks)) as temporary:
        checks["tensors_changed"] = _write_shards(shards, factors, temporary, dtype)
        _write_companions(base.directory, temporary, dtype)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        checks |= _verify(base, factors, temporary, config)
    return checks


def refuse_target(target: Path) -> None:
    """Raises ArtefactError when something is already there; called before any work."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtefactError(
            Problem(
                "--merge_path exists and is not empty; nothing is ever overwritten",
                str(target),
                "choose another path, or remove it first",
            )
        )


def _write_shards(shards: list[Path], factors: Factors, directory: Path, dtype: torch.dtype | None) -> int:
    from safetensors import safe_open
    from safetensors.torch import save_file

    pending = {f"{module}.weight": f for module, f in factors.items()}
    changed = 0
    sizes: dict[str, int] = {}
    with Progress("merging", total=sum(s.stat().st_size for s in shards), unit="B") as bar:
        for shard in shards:
            tensors: dict[str, torch.Tensor] = {}
            with safe_open(shard, framework="pt") as reader:
                metadata = reader.metadata() or {"format": "pt"}
                for name in reader.keys():  # noqa: SIM118 - safe_open is no mapping
                    tensor = reader.get_tensor(name)
                    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                        raise ArtefactError(
                            Problem(
                                f"{shard.name}: {name} is FP8, and a delta is lost in it",
                                fix="merge into a bfloat16 copy",
                            )
                        )
                    kept = _kept_dtype(name, tensor, dtype)
                    if name in pending:
                        change = delta(pending.pop(name))
                        if change.shape != tensor.shape:
                            raise ArtefactError(
                                Problem(f"{name} is {tuple(tensor.shape)}, its delta {tuple(change.shape)}")
                            )
                        tensor = tensor.float() + change
                        changed += 1
                    tensors[name] = tensor.to(kept).contiguous()
                    if not torch.isfinite(tensors[name]).all():
                        raise VerificationError(Problem(f"{name} is not finite after merging"))
            save_file(tensors, directory / shard.name, metadata=metadata)
            sizes |= {name: shard.name for name in tensors}
            bar.advance(shard.stat().st_size)
    if pending:
        raise ArtefactError(Problem("the base model has no tensor for these deltas", sorted(pending)[:5]))
    if len(shards) > 1:
        total = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
        files.write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": sizes}
        )
    return changed


def _kept_dtype(name: str, tensor: torch.Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype on disk; routers stay as they are, because rounding them sends tokens to other experts."""
    is_router = name.endswith((".gate.weight", "e_score_correction_bias"))
    return tensor.dtype if wanted is None or is_router or not tensor.is_floating_point() else wanted


def _write_companions(source: Path, directory: Path, dtype: torch.dtype | None) -> None:
    """config.json as the base has it, but for the dtype and a quantisation that no longer holds; tokenizer and all."""
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings.pop("quantization_config", None)
    if dtype is not None:
        settings.pop("torch_dtype", None)
        settings["dtype"] = str(dtype).removeprefix("torch.")
    files.write_json(directory / "config.json", settings)
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _check_space(target: Path, shards: list[Path], dtype: torch.dtype | None) -> None:
    needed = sum(s.stat().st_size for s in shards) * (2 if dtype == torch.float32 else 1)
    place = target.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ArtefactError(
            Problem(
                f"merging needs {needed / 1e9:.1f} GB under {place}, {free / 1e9:.1f} GB are free",
                fix="free some space",
            )
        )


def _verify(base: BaseModel, factors: Factors, directory: Path, config: Config) -> dict[str, Any]:
    """Float32 logits of the directory, loaded by a fresh process without peft, against base + adapter in this one."""
    from safetensors.torch import load_file, save_file

    needed = sum(s.stat().st_size for s in directory.glob("*.safetensors")) * 3
    if psutil.virtual_memory().available < needed:
        raise VerificationError(
            Problem(
                f"reloading the merged model to check it needs about {needed / 1e9:.0f} GB of memory",
                f"{psutil.virtual_memory().available / 1e9:.0f} GB available",
                "merge on a machine with more memory",
            )
        )
    probe, out = directory / ".probe.safetensors", directory / ".logits.safetensors"
    tokenizer = base_model.load_tokenizer(base.directory)
    generator = torch.Generator().manual_seed(0)
    text = tokenizer("The quick brown fox explains what a function does:", add_special_tokens=False)["input_ids"]
    random_ids = torch.randint(0, len(tokenizer), (2, PROBE_TOKENS), generator=generator)
    random_ids[0, : min(len(text), PROBE_TOKENS)] = torch.tensor(text[:PROBE_TOKENS])
    save_file({"input_ids": random_ids}, probe)
    event("reloading the merged model in a fresh process")
    done = subprocess.run(
        [sys.executable, "-c", _RELOAD, str(directory), str(probe), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise VerificationError(Problem(f"the merged model does not load: {done.stderr.strip().splitlines()[-1:]}"))
    merged = load_file(out)["logits"]
    probe.unlink()
    out.unlink()
    model = base_model.load_model(base, config.base, dtype=torch.float32)
    with torch.no_grad():
        plain = model(random_ids.to(model.device)).logits.float().cpu()
        composed = adapters.add(model, "composed", factors)(random_ids.to(model.device)).logits.float().cpu()
    scale = float(composed.abs().max())
    error, effect = float((merged - composed).abs().max()), float((plain - composed).abs().max())
    rounded = any(t != torch.float32 for t in _dtypes(directory))
    checks = {
        "max_logit_difference": error,
        "adapter_effect_on_logits": effect,
        "largest_logit": scale,
        "rounded": rounded,
    }
    if effect <= 10 * TOLERANCE * scale:
        raise VerificationError(
            Problem("the adapters do not change the model's output", effect, "look at their manifests")
        )
    # float32 files must agree to rounding; in 16 bits the rounded weights themselves may move logits, but not like this
    limit = 0.25 * effect if rounded else TOLERANCE * max(1.0, scale)
    if error > limit:
        raise VerificationError(Problem(f"merged and composed logits differ by more than {limit:.3g}", error))
    event("merged model verified", max_logit_difference=error, adapter_effect=effect)
    return checks


def _dtypes(directory: Path) -> set[torch.dtype]:
    from safetensors import safe_open

    found = set()
    for shard in directory.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as reader:
            for name in list(reader.keys())[:8]:
                found.add(reader.get_tensor(name).dtype)
    return found
