"""PEP 517 backend: setuptools', with the torch to build against taken from the environment.

With torch among build-system.requires, pip would fetch a second torch for every build. The library
loads in any supported torch, so it is built against the one that is installed where it will run,
and one is asked for only where there is none. pip runs the backend in an environment of its own,
but by the target's interpreter, whose sys.prefix still names the target. uv and `python -m build`
hide the target: they fetch a torch to build against, unless build isolation is switched off.
"""

from __future__ import annotations

import re
import site
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from machine import check_machine
from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

MINIMUM_TORCH = (2, 13)

Settings = dict[str, Any] | None


def _visible_site_packages() -> list[str]:
    """The directories that the target interpreter imports from, isolated or not."""
    directories = [*sys.path, *site.getsitepackages([sys.prefix])]
    venv = Path(sys.prefix, "pyvenv.cfg")
    if not venv.exists() or "include-system-site-packages = true" in venv.read_text():
        directories += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    return directories


def _find_torch() -> str | None:
    """The directory of the torch that the target interpreter imports, if it is new enough."""
    for directory in _visible_site_packages():
        for torch in metadata.distributions(name="torch", path=[directory]):
            version = re.match(r"(\d+)\.(\d+)", torch.version)
            new_enough = version and (int(version[1]), int(version[2])) >= MINIMUM_TORCH
            return directory if new_enough else None
    return None


def _use_torch() -> None:
    """Makes the target's torch importable, behind everything the build asked for."""
    directory = _find_torch()
    if directory is not None and directory not in sys.path:
        sys.path.append(directory)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:  # noqa: ARG001
    check_machine()
    return [] if _find_torch() else ["torch>=" + ".".join(map(str, MINIMUM_TORCH))]


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    _use_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    _use_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
