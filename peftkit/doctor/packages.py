"""Versions that are installed, against those that peftkit asks for: what its package says of itself, without importing any."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, metadata, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from peftkit.doctor.finding import Finding

_OWN = "peftkit"
_FOR_DEVELOPERS = "dev"
# Whose own releases change what methods do: docs/methods.md was measured with the lowest version that is allowed.
_MEASURED = ("peft", "transformers")


def package_findings() -> list[Finding]:
    """Python, the packages that are needed, and those of each extra."""
    try:
        own = metadata(_OWN)
    except PackageNotFoundError:
        what = "is not installed as a package: what it needs cannot be compared"
        return [_python(""), Finding("packages", _OWN, "note", what, "pip install -e . in its folder")]
    requirements = [Requirement(text) for text in own.get_all("Requires-Dist") or []]
    extras = [name for name in own.get_all("Provides-Extra") or [] if name != _FOR_DEVELOPERS]
    needed = [_needed(item) for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    return [_python(own["Requires-Python"] or ""), *needed, *(_extra(name, requirements) for name in extras)]


def _python(wanted: str) -> Finding:
    found = platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("packages", "python", "ok", found)
    return Finding("packages", "python", "broken", f"{found}; it must be {wanted}", f"install Python {wanted}")


def _needed(item: Requirement) -> Finding:
    found = installed(item.name)
    remedy = f'pip install --upgrade "{item.name}{item.specifier}"'
    if found is None:
        return Finding("packages", item.name, "broken", f"is missing; it must be {item.specifier or 'there'}", remedy)
    if not _fits(item, found):
        return Finding("packages", item.name, "broken", f"{found} does not fit; it must be {item.specifier}", remedy)
    if item.name in _MEASURED and (measured := _newer_than_measured(found, item.specifier)):
        what = f"{found} is newer than {measured}, with which the tables of docs/methods.md were made"
        return Finding("packages", item.name, "note", what, f'pip install "{item.name}=={measured}" if a method misbehaves')
    return Finding("packages", item.name, "ok", found)


def _newer_than_measured(found: str, wanted: SpecifierSet) -> str:
    """The lowest version that is allowed, where the installed one has another first or second number; else empty."""
    lowest = next((item.version for item in wanted if item.operator == ">="), found)
    return lowest if Version(found).release[:2] > Version(lowest).release[:2] else ""


def _extra(name: str, requirements: Iterable[Requirement]) -> Finding:
    parts = list(_parts_of(name, requirements))
    missing = [item.name for item, found in parts if found is None]
    old = [f"{item.name} {found} is not {item.specifier}" for item, found in parts if found and not _fits(item, found)]
    remedy = f'pip install --upgrade "{_OWN}[{name}]"'
    if missing or old:
        texts = [f"without {', '.join(missing)}"] if missing else []
        return Finding("extras", name, "missing", "; ".join([*texts, *old]), remedy)
    return Finding("extras", name, "ok", ", ".join(f"{item.name} {found}" for item, found in parts))


def _parts_of(name: str, requirements: Iterable[Requirement]) -> Iterator[tuple[Requirement, str | None]]:
    """The packages of an extra, each with its installed version."""
    for item in requirements:
        is_its_own = (
            item.marker is not None and item.marker.evaluate({"extra": name}) and not item.marker.evaluate({"extra": ""})
        )
        if is_its_own:
            yield item, installed(item.name)


def _fits(item: Requirement, found: str) -> bool:
    return item.specifier.contains(found, prereleases=True)


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
