"""What a measurement ran on. Imports nothing heavy: a child's peak memory starts at that of its parent."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")


def cpu() -> dict[str, Any]:
    """The processor's name, and whether it multiplies bfloat16 numbers natively: by AMX or by AVX-512."""
    text = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()) + family,
        "amx_bf16": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
    }


def has_native_bfloat16() -> bool:
    """Without it PyTorch emulates bfloat16 convolutions, several times slower than float32."""
    found = cpu()
    return found["amx_bf16"] or found["avx512_bf16"]


def gpu() -> str | None:
    """The first graphics processor's name as NVIDIA's driver says it; None without one."""
    return output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").partition("\n")[0] or None


def commit(root: Path) -> str:
    """The checked-out commit, with a mark where code that is measured differs from it; "no commit" without git."""
    git = ("git", "-C", str(root))
    changed = output(*git, "status", "--porcelain", "--", "models", "benchmarks/*.py", "distill")
    return (output(*git, "rev-parse", "--short", "HEAD") or "no commit") + (" with changes" if changed else "")


def output(*words: str) -> str:
    """What a program prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
