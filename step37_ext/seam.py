"""What is said of one SGLang name that this package uses; `seams.py` and others list them."""

from dataclasses import dataclass

from packaging.version import Version


@dataclass(frozen=True)
class Seam:
    """One SGLang name and how it is used; with neither `call` nor `takes` it only has to exist.

    call: we call it, with these parameters: "name" passed by position, "name=" by keyword.
    takes: we stand in for it (a hook, an override), and our function takes exactly these, starred
        as in a signature; a "**name" at the end also takes what is not listed.
    since, before: the SGLang versions in which it is used, the first and the first no longer.
    """

    target: str
    why: str
    call: tuple[str, ...] | None = None
    takes: tuple[str, ...] | None = None
    since: str | None = None
    before: str | None = None

    def applies_to(self, version: Version) -> bool:
        """Whether the package uses this seam with that SGLang."""
        return not (
            (self.since is not None and version < Version(self.since))
            or (self.before is not None and version >= Version(self.before))
        )


def attributes(owner: str, why: str, *names: str) -> tuple[Seam, ...]:
    """Attributes of one owner that only have to exist."""
    return tuple(Seam(f"{owner}.{name}", why) for name in names)
