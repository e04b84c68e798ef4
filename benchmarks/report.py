"""Tables and a plot of results, as ``README.md`` beside them."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from hf_sparse.benchmarks.attention import BOTH, DENSE, DROPOUT, FORWARD
from hf_sparse.benchmarks.models import (
    FREE_BERT,
    FREE_ROBERTA,
    OURS_BIGBIRD,
    OURS_LONGFORMER,
    THEIRS_BIGBIRD,
    THEIRS_LONGFORMER,
)

NOT_RUN = "not run"
PEERS = {OURS_LONGFORMER: THEIRS_LONGFORMER, OURS_BIGBIRD: THEIRS_BIGBIRD}
FREE = {OURS_LONGFORMER: FREE_ROBERTA, OURS_BIGBIRD: FREE_BERT}

LAYER_PEERS = {OURS_LONGFORMER: "HF Longformer layer", OURS_BIGBIRD: "HF BigBird layer (training mode)"}
OURS_REFORMER, THEIRS_REFORMER = "hf_sparse reformer layer", "HF Reformer LSH layer"
# lengths over which the slope is taken
SLOPE_FROM, SLOPE_TO = 4096, 65536

INTRODUCTION = """\
# Benchmarks

Every pattern beside dense attention and its peers, timed in turns within one run; medians, of two runs from
32,768 tokens on. Made by

```bash
make bench                # quick, under two minutes on two cores
make bench MODE=full      # all of it, under thirty
make bench MODE=full DEVICE=cuda
```

or, where the package is installed, `hf-sparse bench`. Nothing here passes or fails by time: machines differ,
and even on one a number moves by a tenth or more from run to run. Ratios within a run are what can be compared.

**How to read it.** Attention alone has one row of a batch, 12 heads of width 64, float32 on a CPU and bfloat16
on a GPU. A cell says how many times faster than dense attention (torch's `scaled_dot_product_attention`) a row
is, and in brackets its *efficiency*: edge density times dense time over our time, which is 1 where an edge
costs what it costs in dense attention. Density counts each edge once, rows and columns of global tokens
included; edges of nodes that are no tokens too, over N x N. Where dense attention was not run a cell gives the
time instead. *Attention removed* is the same model in which every token takes its own value, and queries, keys
and values get their gradient for nothing: no attention can make the model faster than that.
"""


def write_readme(out: Path) -> None:
    """Write ``README.md`` and the plots from the results in ``out/results``: for each device the fullest run there is."""
    text = [INTRODUCTION]
    results = [json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))]
    for device in ("cpu", "cuda"):
        held = [result for result in results if _device(result) == device]
        text += [f"## {device.upper()}", ""]
        if not held:
            text += ["Not run yet.", ""]
            continue
        result = min(held, key=lambda result: ("--only" in result["command"], result["mode"] != "full"))
        picture = _plot(result, out / f"{device}.png")
        text += [*tables(result), *([f"![time against length]({picture})", ""] if picture else [])]
    (out / "README.md").write_text("\n".join(text).rstrip() + "\n")


def tables(result: dict[str, Any]) -> list[str]:
    """Return the lines of all tables of a result, in Markdown."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, {machine['system']}, Python "
        f"{machine['python']}, {versions}, commit {machine['commit']}, {machine['date']}. `{result['command']}` took "
        f"{result.get('seconds', 0)} s.",
        "",
    ]
    rows = [row for row in result["rows"] if row["section"] == "attention"]
    for dropout in (0.0, DROPOUT):
        for what in (FORWARD, BOTH):
            held = [row for row in rows if row["what"] == what and row["dropout"] == dropout]
            if held:
                said = f" with dropout {dropout}" if dropout else ""
                lines += [f"### Attention, {what}{said}", "", *_attention(held), ""]
    if rows:
        lines += ["### Edge density", "", *_densities(rows), ""]
        slopes = list(_slopes(rows))
        if slopes:
            lines += ["### Cost against length", ""]
            span = f"{SLOPE_FROM} to {SLOPE_TO} tokens"
            lines += [f"Slope of log time over log length, {span}, without dropout; 2 is quadratic.", ""]
            lines += [*_table(["", FORWARD, BOTH], slopes), ""]
    plans = [row for row in result["rows"] if row["section"] == "plan"]
    if plans:
        lines += ["### Planning", "", *_planning(plans, rows), ""]
    if result["memory"]:
        lines += ["### Peak memory, forward+backward", "", *_memory(result["memory"]), ""]
    titles = {"model": "Models of 2 layers of RoBERTa-base width", "layer": "Attention layers with their projections"}
    for section, title in titles.items():
        held = [row for row in result["rows"] if row["section"] == section]
        if held:
            lines += [f"### {title}, {held[0]['n']} tokens", "", *_models(held, result.get("differences", {})), ""]
    return lines


def _attention(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    lengths = sorted({row["n"] for row in rows})
    at = {(row["name"], row["n"]): row for row in rows}

    def cell(name: str, n: int) -> str:
        row, dense = at.get((name, n)), at.get((DENSE, n))
        if row is None:
            return NOT_RUN
        if name == DENSE or dense is None:
            return _time(row["seconds"])
        faster = dense["seconds"] / row["seconds"]
        return f"{faster:.2f}x" + (f" ({row['density'] * faster:.2f})" if "density" in row else "")

    names = [DENSE, *dict.fromkeys(row["name"] for row in rows if row["name"] != DENSE)]
    yield from _table(["", *map(str, lengths)], [[name, *(cell(name, n) for n in lengths)] for name in names])


def _densities(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    lengths = sorted({row["n"] for row in rows})
    at = {(row["name"], row["n"]): row["density"] for row in rows if "density" in row}
    names = [name for name in dict.fromkeys(name for name, _ in at) if name != DENSE]
    yield from _table(["", *map(str, lengths)], [[name, *(f"{at[name, n]:.4f}" for n in lengths)] for name in names])


def _slopes(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for name in dict.fromkeys(row["name"] for row in rows):
        line = [name]
        for what in (FORWARD, BOTH):
            held = sorted(
                (row["n"], row["seconds"])
                for row in rows
                if (row["name"], row["what"], row["dropout"]) == (name, what, 0.0)
                and SLOPE_FROM <= row["n"] <= SLOPE_TO
            )
            reaches = held and (held[0][0], held[-1][0]) == (SLOPE_FROM, SLOPE_TO)
            line.append(f"{slope(held):.2f}" if reaches else NOT_RUN)
        if line[1:] != [NOT_RUN, NOT_RUN]:
            yield line


def _planning(plans: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    longest = max(row["n"] for row in plans)
    forward = {
        row["name"]: row["seconds"]
        for row in rows
        if (row["n"], row["what"], row["dropout"]) == (longest, FORWARD, 0.0)
    }
    yield f"Made when a pattern meets a length for the first time, and kept; at {longest} tokens."
    yield ""
    lines = [
        [row["name"], _time(row["seconds"]), f"{row['seconds'] / forward[row['name']]:.1%}"]
        for row in plans
        if row["n"] == longest and row["name"] in forward
    ]
    yield from _table(["", "time", "of one forward"], lines)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope of log y over log x."""
    x, y = ([math.log(point[i]) for point in points] for i in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _memory(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    peaks = {(row["name"], row["n"]): row["peak"] for row in rows}
    lines = []
    for row in rows:
        half = peaks.get((row["name"], row["n"] // 2))
        lines.append(
            [
                row["name"],
                str(row["n"]),
                f"{row['peak'] / 2**20:.0f} MiB",
                f"{row['peak'] / row['tensors']:.2f}x",
                f"{row['peak'] / half:.2f}x" if half else "",
            ]
        )
    yield "Over what was there before query, key and value were made; against the bytes of query, key, value, output and"
    yield "their gradients."
    yield ""
    yield from _table(["", "tokens", "peak", "of those tensors", "of half the length"], lines)


def _models(rows: Sequence[dict[str, Any]], differences: dict[str, float]) -> Iterator[str]:
    at = {(row["name"], row["what"]): row["seconds"] for row in rows}
    names = list(dict.fromkeys(row["name"] for row in rows))
    has_free = FREE_ROBERTA in names
    reformers = {name: name.replace(OURS_REFORMER, THEIRS_REFORMER) for name in names if OURS_REFORMER in name}
    peers = PEERS if has_free else {**LAYER_PEERS, **reformers}

    def ratio(name: str | None, row: str, what: str) -> str:
        return f"{at[name, what] / at[row, what]:.2f}x" if name in names else ""

    lines = []
    for name in names:
        line = [name, *(_time(at[name, what]) for what in (FORWARD, BOTH))]
        line.append(" / ".join(ratio(peers[name], name, what) for what in (FORWARD, BOTH)) if name in peers else "")
        if has_free:
            bound = (
                " / ".join(ratio(peers[name], FREE[name], what) for what in (FORWARD, BOTH)) if name in peers else ""
            )
            line.append(bound)
            line.append(f"{differences[name]:.0e}" if name in differences else "")
        lines.append(line)
    head = ["", FORWARD, BOTH, "faster than the in-tree one"]
    yield from _table([*head, "with free attention", "largest difference to it"] if has_free else head, lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    for line in (head, ["---"] * len(head), *lines):
        yield "| " + " | ".join(line) + " |"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _device(result: dict[str, Any]) -> str:
    return "cuda" if "--device cuda" in result["command"] else "cpu"


def _plot(result: dict[str, Any], path: Path) -> str | None:
    rows = [
        row
        for row in result["rows"]
        if (row["section"], row.get("what"), row.get("dropout")) == ("attention", BOTH, 0.0)
    ]
    if not rows:
        return None
    import matplotlib

    matplotlib.use("agg")
    from cycler import cycler
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axes = pyplot.subplots(figsize=(11, 6), layout="constrained")
    dense: dict[str, Any] = {"color": "black", "linewidth": 2.5, "linestyle": "-"}
    # ten colours, each as a line of every style before the next
    styles = cycler(color=[f"C{i}" for i in range(10)]) * cycler(linestyle=("-", "--", ":"), linewidth=(1.5, 1.5, 1.5))
    for name, style in zip(dict.fromkeys(row["name"] for row in rows), cycle(styles), strict=False):
        points = sorted((row["n"], row["seconds"]) for row in rows if row["name"] == name)
        axes.plot(
            [n for n, _ in points],
            [t for _, t in points],
            marker="o",
            markersize=4,
            label=name,
            **(dense if name == DENSE else style),
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds, forward+backward")
    lengths = sorted({row["n"] for row in rows})
    axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([n for n in lengths if n & (n - 1) == 0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.tick_params(axis="x", rotation=45)
    axes.grid(True, which="major", alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    axes.set_title(f"1 x 12 heads x 64, {result['machine']['device']}, {result['machine']['threads']} threads")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path.name
