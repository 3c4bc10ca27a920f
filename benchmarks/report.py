"""What a benchmark found: figures for the table, everything for the JSON, and pictures."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

DIGITS = 4


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Args:
        what: is measured.
        value: as measured.
        unit: of the value; "" for a ratio.
        at_least, at_most: what is wanted, where anything is.
    """

    what: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def wanted(self) -> str:
        """What is wanted, in words."""
        words = [
            f"at least {self.at_least:g}" if self.at_least is not None else "",
            f"at most {self.at_most:g}" if self.at_most is not None else "",
        ]
        return " and ".join(word for word in words if word)

    @property
    def is_met(self) -> bool | None:
        """Whether the value is as wanted; None where nothing is wanted."""
        if not self.wanted:
            return None
        return not (
            (self.at_least is not None and self.value < self.at_least)
            or (self.at_most is not None and self.value > self.at_most)
        )


@dataclass
class Section:
    """One benchmark's findings.

    Args:
        name: of the benchmark.
        title: a line that says what was done.
        figures: the table's lines.
        data: all that was measured, for the JSON.
        plots: PNG files beside it.
        note: why there is nothing, or what must be known to read the figures.
    """

    name: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    plots: list[Path] = field(default_factory=list)
    note: str = ""


def table(sections: Sequence[Section]) -> str:
    """All figures as one Markdown table."""
    lines = ["| benchmark | what | value | wanted | met |", "| --- | --- | ---: | --- | --- |"]
    for section in sections:
        for figure in section.figures:
            met = {None: "", True: "yes", False: "**no**"}[figure.is_met]
            value = f"{figure.value:.{DIGITS}g} {figure.unit}".strip()
            lines.append(f"| {section.name} | {figure.what} | {value} | {figure.wanted} | {met} |")
        if section.note:
            lines.append(f"| {section.name} | {section.note} | | | |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": psutil.getloadavg()[0],
    }


def processor_name() -> str:
    """The processor as Linux names it, elsewhere as Python does."""
    file = Path("/proc/cpuinfo")
    names = [line for line in file.read_text().splitlines() if line.startswith("model name")] if file.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def write(folder: Path, sections: Sequence[Section], *, machine: dict[str, Any], seconds: dict[str, float]) -> None:
    """Write `results.json`, and `results.md` with the table and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": machine,
        "seconds": seconds,
        "sections": {
            section.name: {
                "title": section.title,
                "note": section.note,
                "figures": [
                    {"what": one.what, "value": one.value, "unit": one.unit, "wanted": one.wanted, "met": one.is_met}
                    for one in section.figures
                ],
                "data": section.data,
            }
            for section in sections
        },
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    used = ", ".join(f"{name} {value}" for name, value in machine.items())
    plots = [f"![{plot.stem}]({plot.name})" for section in sections for plot in section.plots]
    titles = [f"- **{section.name}**: {section.title}" for section in sections]
    text = "\n".join(["# Benchmarks", "", used, "", *titles, "", table(sections), "", *plots]) + "\n"
    (folder / "results.md").write_text(text)
