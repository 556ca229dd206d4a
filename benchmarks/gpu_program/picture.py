"""The bound on a step as a picture: a bar for each program, its parts the kinds of kernels."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.gpu_program.roofline import Row

COLOURS = {
    "products": ("#1b6ca8", "#5b9bc8", "#9cc3df"),
    "cuDNN": ("#7a4fa3", "#a987c9"),
    "other": ("#e09f3e", "#c8553d", "#7f8c5a", "#b0a990", "#5f6368"),
}


def draw(programs: dict[str, list[Row]], title: str, path: Path) -> None:
    """Draws the kinds of each program, by its name; writes a PNG."""
    figure = Figure(figsize=(9, 1.6 + 0.7 * len(programs)), layout="constrained")
    axes = figure.add_subplot()
    kinds = sorted({row.name for rows in programs.values() for row in rows if row.name != "collectives"})
    ends = dict.fromkeys(programs, 0.0)
    for kind, colour in zip(kinds, _colours(kinds), strict=True):
        widths = [sum(row.milliseconds for row in rows if row.name == kind) for rows in programs.values()]
        axes.barh(list(programs), widths, left=list(ends.values()), color=colour, label=kind, height=0.6)
        ends = {name: end + width for (name, end), width in zip(ends.items(), widths, strict=True)}
    for name, end in ends.items():
        axes.annotate(f"{end:.1f} ms", (end, name), xytext=(4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="milliseconds a step at least: a bound from counts, not a measured time")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=130)


def _colours(kinds: list[str]) -> list[str]:
    left = {family: iter(colours) for family, colours in COLOURS.items()}
    families = [next((family for family in left if kind.startswith(family)), "other") for kind in kinds]
    return [next(left[family], "#cccccc") for family in families]
