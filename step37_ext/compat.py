"""Does an SGLang have every name that the plug-in uses, and does every call made on it still bind?

What is checked is the list in `step37_ext/seams.py`, on SGLang's source alone, so that all
supported versions are checked without running one. `make compat` does it with their wheels.
"""

import inspect
import sys
from pathlib import Path

import click
from packaging.version import InvalidVersion, Version
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from step37_ext.seam import Seam
from step37_ext.seams import SEAMS
from step37_ext.sglang_source import NotFound, SglangSource

OLDEST = "0.5.20"
NEWEST_CHECKED = "0.5.23"
WIDTH = 140  # columns; the longest name beside four versions, also in a log


def supported_version(version: str) -> str | None:
    """None for an SGLang version that the plug-in works with, else one sentence that refuses it."""
    try:
        if Version(version) >= Version(OLDEST):
            return None
    except InvalidVersion:
        pass
    return f"step37_ext needs SGLang {OLDEST} or later; this is SGLang {version}."


def unchecked_version(version: str) -> str | None:
    """None for a supported version that was checked, else one sentence that warns about it."""
    if Version(version) <= Version(NEWEST_CHECKED):
        return None
    return (
        f"SGLang {version} is newer than {NEWEST_CHECKED}, the newest that step37_ext was checked "
        "with; `python -m step37_ext.compat` tells whether everything used is still there."
    )


def check_seam(seam: Seam, source: SglangSource) -> str | None:
    """None if that SGLang has the seam as the plug-in uses it, else one sentence what differs."""
    try:
        found = source.find(seam.target)
        if seam.call is not None:
            _bind(seam.call, found.signature())
        if seam.takes is not None:
            _compare(seam.takes, found.signature())
    except (NotFound, TypeError) as error:
        return str(error)
    return None


def _bind(call: tuple[str, ...], signature: inspect.Signature) -> None:
    """TypeError if our call does not fit: "name" is passed by position, "name=" by keyword."""
    positional = [name for name in call if not name.endswith("=")]
    keywords = {name[:-1]: name for name in call if name.endswith("=")}
    try:
        bound = signature.bind(*positional, **keywords)
    except TypeError as error:
        raise TypeError(f"a call ({', '.join(call)}) does not fit {signature}: {error}") from None
    # Arguments by position carry their parameter's name, so a changed order shows.
    for name, value in bound.arguments.items():
        if isinstance(value, str) and value.rstrip("=") != name:
            raise TypeError(f"the argument {value} of our call is now {name} in {signature}")


def _compare(takes: tuple[str, ...], signature: inspect.Signature) -> None:
    """TypeError if SGLang's callers may pass what our replacement does not take."""
    theirs = tuple(str(p.replace(default=p.empty)) for p in signature.parameters.values())
    listed = tuple(name for name in takes if not name.startswith("**"))
    takes_more = len(listed) < len(takes)
    if theirs != takes and not (takes_more and theirs[: len(listed)] == listed):
        raise TypeError(f"our replacement takes ({', '.join(takes)}), it is {signature}")


def check(source: SglangSource) -> dict[Seam, str | None]:
    """`check_seam` of every seam that is used with that version, in the list's order."""
    version = Version(source.version)
    return {seam: check_seam(seam, source) for seam in SEAMS if seam.applies_to(version)}


def table(results: dict[str, dict[Seam, str | None]]) -> Table:
    """Seams by version: "ok", "FAILS", or "-" where the seam is not used with that version."""
    grid = Table(title="SGLang seams", box=SIMPLE)
    grid.add_column("sglang.srt.")
    for version in results:
        grid.add_column(version)
    for seam in SEAMS:
        cells = [
            "-" if seam not in result else "[red]FAILS[/]" if result[seam] else "ok"
            for result in results.values()
        ]
        grid.add_row(seam.target.removeprefix("sglang.srt."), *cells)
    return grid


@click.command()
@click.argument("wheels", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(wheels: tuple[Path, ...]) -> None:
    """Check every SGLang name that the plug-in uses, in WHEELS or in the installed SGLang.

    The exit status is 1 if one is missing or no longer fits.
    """
    try:
        sources = [SglangSource.wheel(path) for path in wheels] or [SglangSource.installed()]
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    results = {source.version: check(source) for source in sources}
    Console(width=WIDTH).print(table(results))
    failures = 0
    for version, result in results.items():
        for seam, failure in result.items():
            if failure:
                failures += 1
                click.echo(f"{version} {seam.target}\n    {failure}\n    used for: {seam.why}")
    checked = sum(len(result) for result in results.values())
    click.echo(f"compat: {checked - failures}/{checked}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
