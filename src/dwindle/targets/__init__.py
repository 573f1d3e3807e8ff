"""Targets: what a file has to run on. Each is a small YAML file; a user's own is named by its path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from dwindle.errors import ConfigError, check_choice, did_you_mean
from dwindle.quantization.schemes import SCHEMES
from dwindle.units import parse_size

RUNTIMES = ("litert", "micro")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a file has to run on.

    Attributes:
        name: Its name.
        description: What it is, in words.
        runtime: ``"litert"``, or ``"micro"`` (TensorFlow Lite Micro).
        schemes: Schemes of files that it runs; None: all.
        max_size: Bytes that a file may have where the user sets no goal, or None.
        max_ram: Bytes of RAM, likewise.
    """

    name: str
    description: str = ""
    runtime: str = "litert"
    schemes: tuple[str, ...] | None = None
    max_size: int | None = None
    max_ram: int | None = None


def known_targets() -> list[str]:
    """Return the names of the targets that come with dwindle."""
    return sorted(Path(entry.name).stem for entry in files("dwindle.targets").iterdir() if entry.name.endswith(".yaml"))


def read_target(target: str | Path | Target) -> Target:
    """Return the target of a name, or of a YAML file.

    Raises:
        ConfigError: If there is none of that name, or the file holds something else.
    """
    import yaml

    if isinstance(target, Target):
        return target
    text, name = str(target), Path(target).stem
    if text.endswith((".yaml", ".yml")):
        try:
            content = yaml.safe_load(Path(target).read_text(encoding="utf8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"target `{target}` can't be read: {' '.join(str(error).split())[:200]}") from None
    elif text in known_targets():
        content = yaml.safe_load(files("dwindle.targets").joinpath(f"{text}.yaml").read_text(encoding="utf8"))
    else:
        known = known_targets()
        raise ConfigError(
            f"`target` is {text!r}; it must be one of {', '.join(known)}, or a .yaml file{did_you_mean(text, known)}"
        )
    return _checked(name, content)


def _checked(name: str, content: Any) -> Target:
    known = [field.name for field in fields(Target) if field.name != "name"]
    if not isinstance(content, Mapping):
        raise ConfigError(f"target `{name}` is no mapping; it may have {', '.join(known)}")
    for key in content:
        if key not in known:
            raise ConfigError(
                f"target `{name}` has `{key}`; known are {', '.join(known)}{did_you_mean(str(key), known)}"
            )
    check_choice(f"runtime of target {name}", content.get("runtime", "litert"), RUNTIMES)
    schemes = content.get("schemes")
    for scheme in schemes or ():
        check_choice(f"schemes of target {name}", scheme, SCHEMES)
    sizes = {key: parse_size(content[key], key) for key in ("max_size", "max_ram") if content.get(key) is not None}
    return Target(
        name=name, description=str(content.get("description", "")), runtime=str(content.get("runtime", "litert")),
        schemes=None if schemes is None else tuple(schemes), **sizes,
    )  # fmt: skip
