"""Checks of values that people write into YAML files, with messages that say field, value and what was expected."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


def require(condition: bool, where: str, value: Any, expected: str) -> None:
    """Check one value.

    Raises:
        ValueError: the condition is false; the message names the place, the value and what was expected.
    """
    if not condition:
        raise ValueError(f"{where} is {value!r:.200}, expected {expected}.")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def is_whole(value: Any, *, low: int) -> bool:
    """Whether a value is a whole number of at least `low` and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def check_keys(values: Any, *, where: str, known: Iterable[str], needed: Iterable[str] = ()) -> dict[str, Any]:
    """A mapping with the keys that it may and must have.

    Raises:
        ValueError: no mapping, an unknown key, or a needed one is missing; the message names the known ones.
    """
    known = list(known)
    require(isinstance(values, dict), where, values, f"a mapping with the keys {known}")
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}: known are {known}.")
    missing = [key for key in needed if key not in values]
    if missing:
        raise ValueError(f"{where} lacks {missing}: expected these keys with values; known are {known}.")
    return values


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML; the message has the file and what the parser says.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file, expected a YAML file.") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
