"""The set-up script says what is missing, and never installs both flavours of FBGEMM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "tools").mkdir()
    script = shutil.copy(ROOT / "tools" / "setup_environment.sh", folder / "tools")
    command = ["/bin/sh", script, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def test_missing_python_is_told_with_a_remedy(tmp_path: Path):
    ended = run(tmp_path, "runtime", PYTHON="/no/such/python3.11")
    assert ended.returncode == 2
    assert "no Python 3.11 found (looked for: /no/such/python3.11)" in ended.stderr
    assert "remedy: install it" in ended.stderr
    assert not (tmp_path / ".venv").exists()


def test_unknown_step_is_told(tmp_path: Path):
    ended = run(tmp_path, "everything")
    assert ended.returncode == 2
    assert "runtime|package|development" in ended.stderr


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    matches = [re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", line) for line in lines if not line.startswith("#")]
    assert all(matches), f"{name}: every line is an exact pin"
    return {match[1]: match[2] for match in matches if match}


def test_everything_is_pinned_once():
    base, dev, s3, cpu, gpu = map(pins, ("base.txt", "dev.txt", "s3.txt", "tables-cpu.txt", "tables-gpu.txt"))
    assert len({*base, *dev, *s3}) == len(base) + len(dev) + len(s3)
    assert not {name for name in base.keys() | dev.keys() if "fbgemm" in name or name == "torchrec"}
    assert cpu.keys() == {"fbgemm-gpu-cpu", "torchrec"}
    assert gpu.keys() == {"fbgemm-gpu", "torchrec"}
    minors = {version.rpartition(".")[0] for version in (*cpu.values(), *gpu.values())}
    assert len(minors) == 1, "the minors of TorchRec and FBGEMM go together"
