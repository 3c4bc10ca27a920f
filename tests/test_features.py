"""docs/versions.md: its rows are the features, its tests exist, and its cells say what tests said."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("features", Path(__file__).with_name("features.py"))
features = importlib.util.module_from_spec(SPEC)
sys.modules["features"] = features
SPEC.loader.exec_module(features)


def test_the_committed_table_has_all_features_versions_and_tests():
    text = features.TABLE.read_text()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[0] == ["transformers", *features.VERSIONS]
    assert [row[0] for row in rows[2:]] == list(features.FEATURES)
    notes = re.findall(r"^\[(\d+)\] \S", text, re.MULTILINE)
    cells = [cell for row in rows[2:] for cell in row[1:]]
    assert len(cells) == len(features.FEATURES) * len(features.VERSIONS)
    assert all(cell == "yes" or cell.removeprefix("no [").removesuffix("]") in notes for cell in cells)
    shown = text.split("## Shown by\n\n")[1]
    assert shown == features.markdown(everywhere("yes")).split("## Shown by\n\n")[1]


def test_the_readme_has_the_table():
    readme = (features.REPOSITORY / "README.md").read_text()
    table = "\n".join(line for line in features.TABLE.read_text().splitlines() if line[:1] == "|")
    assert table in readme


def everywhere(cell):
    return {version: dict.fromkeys(features.FEATURES, cell) for version in features.VERSIONS}


def test_equal_reasons_share_a_note():
    cells = everywhere("yes")
    first, second, third = list(features.FEATURES)[:3]
    cells["4.57.6"] |= {first: "no: too old", second: "no: too old", third: "no: other"}
    text = features.markdown(cells)
    assert f"| {first} | no [1] | yes | yes |" in text
    assert f"| {second} | no [1] | yes | yes |" in text
    assert f"| {third} | no [2] | yes | yes |" in text
    assert re.findall(r"^\[.*", text, re.MULTILINE) == ["[1] too old", "[2] other"]


def test_every_named_test_is_collected():
    tests = {test for shown in features.FEATURES.values() for test in shown}
    files = sorted({f"tests/{test.split('::')[0]}" for test in tests})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=features.REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    collected = [features.Outcome(line, passed=True) for line in result.stdout.splitlines() if "::" in line]
    named = {test.format(version=version) for test in tests for version in features.VERSIONS}
    assert not [test for test in sorted(named) if not any(features.shows(outcome, test) for outcome in collected)]


@pytest.fixture
def report(tmp_path):
    """The outcomes of a file with every kind of test."""
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "test_kinds.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', ['a.b', 'c'])\n"
        "def test_good(x): pass\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "def test_skipped(): pytest.skip('too old')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('no set-up')\n"
        "def test_without_set_up(broken): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    return features.read_report(tmp_path / "report.xml")


def test_outcomes_of_a_run(report):
    prefix = "cli/test_kinds.py::test_"
    assert {outcome.name.removeprefix(prefix): outcome.passed for outcome in report} == {
        "good[a.b]": True,
        "good[c]": True,
        "bad": False,
        "skipped": False,
        "without_set_up": False,
    }
    reasons = {outcome.name.removeprefix(prefix): outcome.reason for outcome in report}
    assert reasons["skipped"] == "too old"
    assert "not equal" in reasons["bad"]
    assert "no set-up" in reasons["without_set_up"]


@pytest.mark.parametrize(
    ("test", "cell"),
    [
        ("cli/test_kinds.py::test_good", "yes"),
        ("cli/test_kinds.py::test_good[a.b]", "yes"),
        ("cli/test_kinds.py::test_skipped", "no: too old"),
        ("cli/test_kinds.py::test_bad", "no: AssertionError: not equal"),
        ("cli/test_kinds.py", "no: AssertionError: not equal"),
    ],
)
def test_a_cell_is_the_outcome_of_its_tests(report, monkeypatch, test, cell):
    monkeypatch.setattr(features, "FEATURES", {"something": (test,)})
    assert features.cell_of("something", "5.23.0", report) == cell
    monkeypatch.setattr(features, "REASONS", {("something", "5.23.0"): "because"})
    assert features.cell_of("something", "5.23.0", report) == ("yes" if cell == "yes" else "no: because")


def test_a_test_that_was_not_run_is_an_error(report, monkeypatch):
    monkeypatch.setattr(features, "FEATURES", {"something": ("cli/test_kinds.py::test_go",)})
    with pytest.raises(ValueError, match=r"No outcome of cli/test_kinds\.py::test_go on transformers 4\.57\.6"):
        features.cell_of("something", "4.57.6", report)
