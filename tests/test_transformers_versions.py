"""One code base, the same numbers on every transformers version that the README names.

`make versions` installs the other versions under `.cache/`; the venv's own is what all other tests run on.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

REPOSITORY = Path(__file__).resolve().parent.parent
SUITES = [
    f"test_{name}.py"
    for name in ("golden", "hub", "generation", "configuration", "modeling_nvlm_d", "prefix", "session", "batching")
]


def test_the_venv_has_the_newest_version():
    assert transformers.__version__ == "5.23.0" or "NVLM_OTHER_TRANSFORMERS" in os.environ


@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["4.57.6", "5.16.1"])
def test_golden_numbers_on(version):
    folder = REPOSITORY / ".cache" / f"transformers-{version}"
    assert folder.is_dir(), f"transformers {version} is not installed in {folder}: run `make versions`"
    environment = {**os.environ, "PYTHONPATH": str(folder), "NVLM_OTHER_TRANSFORMERS": version}
    seen = subprocess.run(
        [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.strip() == version
    suites = [str(REPOSITORY / "tests" / suite) for suite in SUITES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suites]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"transformers {version}:\n{result.stdout[-5000:]}{result.stderr[-2000:]}"
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout.splitlines()[-1]
