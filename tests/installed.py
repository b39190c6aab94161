"""What installed distributions take on the disk, by their own records."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def installed_sizes(needed: Iterable[Requirement]) -> tuple[dict[str, int], set[str]]:
    """Bytes of each distribution that is needed, directly or by another one, and the names of those that lack."""
    sizes: dict[str, int] = {}
    missing: set[str] = set()
    done: set[tuple[str, str]] = set()  # name and extra
    waiting = list(needed)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for other, extra in done if other == name}:
            done.add((name, extra))
            try:
                found = distribution(name)
            except PackageNotFoundError:
                missing.add(name)
                continue
            files = [file.locate() for file in found.files or ()]
            sizes[name] = sum(path.stat().st_size for path in files if path.is_file())
            wanted = map(Requirement, found.requires or ())
            waiting += [other for other in wanted if other.marker is None or other.marker.evaluate({"extra": extra})]
    return sizes, missing
