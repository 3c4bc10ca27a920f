"""The Dockerfile: linted, pinned, not root."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def dockerfile(repository):
    return (repository / "Dockerfile").read_text()


def test_hadolint_finds_nothing(repository):
    hadolint = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([hadolint, "Dockerfile"], cwd=repository, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_base_is_pinned_and_the_documents_one_is_named(dockerfile):
    bases = [line.split()[1] for line in dockerfile.splitlines() if line.startswith("FROM ")]
    assert len(bases) == 1
    assert ":" in bases[0]
    assert not bases[0].endswith(":latest")
    assert "# FROM nvcr.io/nvidia/pytorch:23.09-py3" in dockerfile


def test_flash_attention_and_no_root(dockerfile):
    assert "flash-attn==" in dockerfile
    users = [line.split()[1] for line in dockerfile.splitlines() if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("root", "0")
