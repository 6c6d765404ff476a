"""Writes the report of a benchmark as one self-contained HTML file."""

import html
import importlib.util
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from preprocessing.errors import InputError
from serving.load_test.perf_analyzer import STABLE, Row

REPORT_FILE = "report.html"
STYLE = """
:root{color-scheme:light}body{font:16px/1.5 system-ui,"Liberation Sans",sans-serif;color:#17201c;background:#f6f7f5;
max-width:62rem;margin:2rem auto;padding:0 1rem}h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:0 0 .5rem}
p.of{color:#5d6b64;margin:.2rem 0 1.4rem}section{background:#fff;border:1px solid #dfe4e0;border-radius:12px;
padding:1.1rem 1.3rem;margin:1rem 0;overflow-x:auto}svg{max-width:100%;height:auto}table{border-collapse:collapse;
width:100%;font-variant-numeric:tabular-nums}th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid #dfe4e0}
th{font-weight:500;color:#5d6b64}.warn{background:#fdf1d8;color:#7a4d00;border-color:#f0d9a8}.unstable td{color:#9a6200}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:1rem}.figures>*{margin:0}
.head{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:1.5rem}
.head b{display:block;font-size:1.7rem;line-height:1.2}
.head span{color:#5d6b64}
"""
COLOURS = ("#7aa5d8", "#e0a03c", "#b07cc6", "#0b7a5b", "#b9c2bd")


@dataclass(frozen=True)
class Measured:
    """Content of a report."""

    dataset: str
    model: str
    rows: Sequence[Row]
    lengths: Sequence[int]
    """Lengths of the histories that were sent."""
    sender: str = "perf_analyzer"
    """What sent the requests."""


def write_report(measured: Measured, path: Path) -> None:
    """Write the report: latency against throughput, percentiles, time per step, and lengths of the histories.

    Raises:
        InputError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the report's plots need matplotlib: `pip install 'llamarec[dev]'`")
    rows = measured.rows
    best = max(rows, key=lambda row: row.throughput)
    shaky = [row for row in rows if not row.stable]
    loads = "requests in flight" if rows[0].mode == "concurrency" else "requests sent per second"
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    warning = (
        f'<section class="warn"><h2>Not stable</h2>At {loads} {", ".join(f"{row.load:g}" for row in shaky)} the three '
        f"windows of the measurement differ by more than {STABLE:.0%}. These figures are marked (hollow in the plots) "
        "and are not reproducible: measure on a quiet machine, or with more --requests.</section>"
        if shaky
        else ""
    )
    figures = {
        "Latency against throughput": _latency_over_throughput(measured),
        "Percentiles": _percentiles(measured, loads),
        "Where a request’s time goes": _split(measured, loads),
        "Lengths of the histories sent": _lengths(measured),
    }
    plots = "".join(f"<section><h2>{html.escape(name)}</h2>{figure}</section>" for name, figure in figures.items())
    text = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(measured.model)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>{html.escape(measured.model)} under load</h1>
<p class="of">{html.escape(measured.dataset)}, histories of {len(measured.lengths)} users ·
{html.escape(measured.sender)} · {machine} · {when}</p>
<section class="head">{_figure(f"{best.throughput:.2f}", f"answers per second at best ({loads}: {best.load:g})")}
{_figure(_milliseconds(rows[0].p50_ms), f"median latency ({loads}: {rows[0].load:g})")}
{_figure(_milliseconds(best.p99_ms), "99th percentile at the best throughput")}</section>
{warning}<div class="figures">{plots}</div>
<section><h2>Figures</h2>{_table(rows, loads)}</section></body></html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _figure(value: str, what: str) -> str:
    return f"<div><b>{value}</b><span>{html.escape(what)}</span></div>"


def _milliseconds(value: float) -> str:
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.1f} ms"


def _table(rows: Sequence[Row], loads: str) -> str:
    steps = list(rows[0].steps)
    names = [loads, "answers/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "windows apart"]
    names += [f"{step}: compute + queue ms" for step in steps]
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>"]
    for row in rows:
        cells = [f"{row.load:g}", f"{row.throughput:.2f}"]
        cells += [f"{value:.1f}" for value in (row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms)]
        cells.append(f"{row.spread:.0%}" + ("" if row.stable else " unstable"))
        cells += [f"{row.steps[step].compute_ms:.1f} + {row.steps[step].queue_ms:.1f}" for step in steps]
        kind = "" if row.stable else ' class="unstable"'
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _axes(**labels: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set(**labels)
    return figure, axes


def _svg(figure: Any) -> str:
    """Return the figure as SVG to embed in the page."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llamarec", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _points(axes: Any, xs: Sequence[float], rows: Sequence[Row], name: str, colour: str, label: str) -> None:
    """Plot one column of the rows as a line; unstable measurements have hollow markers."""
    ys = [getattr(row, name) for row in rows]
    axes.plot(xs, ys, color=colour, label=label, linewidth=1.6)
    for x, y, row in zip(xs, ys, rows, strict=True):
        axes.plot([x], [y], marker="o", color=colour, markerfacecolor=colour if row.stable else "white", clip_on=False)


def _latency_over_throughput(measured: Measured) -> str:
    figure, axes = _axes(xlabel="answers per second", ylabel="median latency [ms]")
    _points(axes, [row.throughput for row in measured.rows], measured.rows, "p50_ms", COLOURS[3], "p50")
    for row in measured.rows:
        axes.annotate(f"{row.load:g}", (row.throughput, row.p50_ms), textcoords="offset points", xytext=(6, 4))
    axes.set(xlim=(0, None), ylim=(0, None))
    return _svg(figure)


def _percentiles(measured: Measured, loads: str) -> str:
    figure, axes = _axes(xlabel=loads, ylabel="latency [ms]")
    xs = [row.load for row in measured.rows]
    for name, colour in zip(("p50_ms", "p90_ms", "p95_ms", "p99_ms"), (COLOURS[3], *COLOURS[:3]), strict=True):
        _points(axes, xs, measured.rows, name, colour, name.removesuffix("_ms"))
    axes.set(ylim=(0, None), xticks=xs)
    axes.legend(frameon=False)
    return _svg(figure)


def _split(measured: Measured, loads: str) -> str:
    figure, axes = _axes(xlabel=loads, ylabel="mean time of a request [ms]")
    labels = [f"{row.load:g}" for row in measured.rows]
    bottom = [0.0] * len(labels)
    for step, colour in zip(measured.rows[0].steps, COLOURS, strict=False):
        for part, alpha in (("compute_ms", 1.0), ("queue_ms", 0.35)):
            times = [getattr(row.steps[step], part) for row in measured.rows]
            label = step if part == "compute_ms" else f"{step}, waiting"
            axes.bar(labels, times, bottom=bottom, color=colour, alpha=alpha, label=label, width=0.6)
            bottom = [low + time for low, time in zip(bottom, times, strict=True)]
    figure.legend(loc="outside right center", fontsize="small", reverse=True, frameon=False)
    return _svg(figure)


def _lengths(measured: Measured) -> str:
    figure, axes = _axes(xlabel="items in a history", ylabel="users")
    axes.hist(measured.lengths, bins=24, color=COLOURS[0])
    return _svg(figure)
