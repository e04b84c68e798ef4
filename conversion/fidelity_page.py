"""The fidelity report as a page: one file of HTML that needs no other, with a map of what each layer and head keeps."""

from collections.abc import Iterator
from html import escape

from hf_sparse.conversion.fidelity_report import FidelityReport, PatternFidelity

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --page: #ffffff; --line: #c9ced6; --quiet: #5b6470; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --page: #15181c; --line: #3b424c; --quiet: #9aa4b1; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto; max-width: 75rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 0.4rem; overflow-wrap: anywhere; }
p { color: var(--quiet); margin: 0.3rem 0; max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.6rem 0; }
th, td { border: 1px solid var(--line); padding: 0.2rem 0.5rem; text-align: right; }
td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 14rem; }
th { font-weight: 600; } td:first-child, th:first-child { text-align: left; }
.map td { text-align: center; min-width: 2.2rem; font-size: 0.8rem; padding: 0.25rem; }
"""


def page(report: FidelityReport) -> str:
    """Return the page of a report."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: FidelityReport) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>Fidelity of {escape(report.source)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>"
    yield f"<h1>{escape(report.title())}</h1>"
    yield from (f"<p>{escape(line)}.</p>" for line in report.caption().split("; "))
    yield '<div class="wide"><table>'
    yield _row(report.head(), "th")
    yield from (_row(row) for row in report.rows())
    yield "</table></div>"
    for one in report.patterns:
        yield f"<h2>{escape(one.name)}</h2>"
        yield from _map(report, one)
        yield from _plan(one)
        yield from _timings(one)
    yield f"<p>Measured with torch {escape(report.torch)} in {report.seconds:.0f} seconds.</p>"
    yield "</body>\n</html>"


def _row(cells: list[str], tag: str = "td") -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _map(report: FidelityReport, one: PatternFidelity) -> Iterator[str]:
    """Yield the map of kept shares: a row is a layer, a column a head."""
    if one.kept is None:
        yield f"<p>What it keeps of the attention cannot be told: {escape(one.kept_note)}.</p>"
        return
    yield "<p>Per cent of the dense attention that is kept: a row is a layer, a column a head; more is a stronger colour.</p>"
    yield '<div class="wide"><table class="map">'
    yield _row(["layer", *map(str, range(max(map(len, one.kept))))], "th")
    for layer, heads in zip(report.layers, one.kept, strict=True):
        cells = "".join(_cell(share, layer, head) for head, share in enumerate(heads))
        yield f"<tr><th>{escape(layer)}</th>{cells}</tr>"
    yield "</table></div>"


def _cell(share: float, layer: str, head: int) -> str:
    """Return a cell whose colour lies over that of the page, so that text is read on it in light and in dark."""
    title = f"layer {layer}, head {head}: {share:.4f}"
    shade = f"background: rgba(46, 125, 210, {0.65 * min(max(share, 0.0), 1.0):.3f})"
    return f'<td style="{shade}" title="{escape(title)}">{100 * share:.0f}</td>'


def _plan(one: PatternFidelity) -> Iterator[str]:
    """Yield what a plan has for each layer."""
    if one.plan is None:
        return
    yield (
        f"<p>The plan: within a density of {one.plan['budget']:g}, chosen on {one.plan['texts']} pieces of "
        f"{one.plan['length']:,} tokens.</p>"
    )
    yield '<div class="wide"><table>'
    yield _row(["layer", "density", "kept", "pattern"], "th")
    for choice in one.plan["choices"]:
        yield _row([choice["layer"], f"{choice['density']:.4f}", f"{choice['kept']:.4f}", choice["name"]])
    yield "</table></div>"


def _timings(one: PatternFidelity) -> Iterator[str]:
    """Yield how long attention took."""
    yield "<p>Attention of all layers, forward, in milliseconds.</p>"
    yield '<div class="wide"><table>'
    yield _row(["tokens", *(f"{timing.length:,}" for timing in one.timings)], "th")
    yield _row(["dense", *(f"{1000 * timing.dense:,.1f}" for timing in one.timings)])
    yield _row(["sparse", *(f"{1000 * timing.sparse:,.1f}" for timing in one.timings)])
    yield "</table></div>"
