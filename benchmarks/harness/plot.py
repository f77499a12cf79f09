"""Plots of results: time over one setting, a panel per group, floors dashed. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness.results import Result


def require_matplotlib() -> None:
    """Find out before anything is measured whether a plot can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install -e '.[bench]'")


def panels(results: Iterable[Result], over: str) -> dict[str, dict[str, list[Result]]]:
    """Timed results by panel (the other settings) and implementation, in order of `over`."""
    found: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        if result.time_us is None or over not in result.settings:
            continue
        others = (f"{k}={v}" for k, v in result.settings.items() if k != over)
        panel = found.setdefault(" ".join([result.operation, *others]), {})
        panel.setdefault(result.implementation, []).append(result)
    for panel in found.values():
        for line in panel.values():
            line.sort(key=lambda result: float(result.settings[over]))
    return found


def plot(results: Iterable[Result], over: str, path: Path) -> None:
    """Draw microseconds over the setting `over` on logarithmic axes into `path` (png, svg, pdf).

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no result has a time.
    """
    from matplotlib.figure import Figure

    from benchmarks.harness.report import rates

    found = panels(results, over)
    if not found:
        raise ValueError("no result has a time: nothing to plot")
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (title, lines) in zip(axes, found.items(), strict=False):
        for name, line in lines.items():
            x = [float(result.settings[over]) for result in line]
            times = [result.time_us or {} for result in line]
            medians = [time["median"] for time in times]
            below = [time["median"] - time["p10"] for time in times]
            above = [time["p90"] - time["median"] for time in times]
            axis.errorbar(x, medians, yerr=[below, above], marker="o", label=name)
            if name == "step37":
                floor = [
                    m / rates(result)["times_floor"]
                    for m, result in zip(medians, line, strict=True)
                ]
                axis.plot(x, floor, "--", color="grey", label="measured floor")
        axis.set(xscale="log", yscale="log", xlabel=over, ylabel="us", title=title)
        axis.title.set_fontsize(8)
        axis.legend(fontsize=7)
    for axis in list(axes)[len(found) :]:
        axis.remove()
    figure.savefig(path)
