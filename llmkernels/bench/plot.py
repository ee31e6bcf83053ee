"""The roofline picture of a report: what each call reached, under what the device could do.

One panel a dtype.  Left to right: operations done for each byte moved; upwards: operations a second.  A call under the
slope waits for memory, one under a flat roof for arithmetic; its distance to the roof is what is left to gain.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkernels.roofline import Ceilings, with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

PAPER, INK, FAINT, GRID = "#fbfaf7", "#22252b", "#8b8f98", "#e7e4dc"
ROOF, SHADE = "#3d4350", "#efece4"
BACKENDS = ("#0f6fc6", "#d1495b", "#2a9d5c", "#8452c9", "#c77d0a", "#12939a", "#6b6f76")
FASTER, SLOWER = "#2a9d5c", "#c96a4f"
PANEL = (12.5, 6.6)  # inches
HEAD, FOOT = 1.6, 0.75  # inches above and below the panels
LEFT, RIGHT = 0.075, 0.985  # of the width
ROOM, NUDGE, STEPS = 15, 15, 10  # pixels between the middles of two points: along a stem, sideways, how often
OFFSETS = (  # where a label may stand: points to the right and up, which of its sides is there, degrees it is turned
    *((8, 0, "left", "center", 0), (-8, 0, "right", "center", 0), (0, 9, "center", "bottom", 0)),
    *((0, -9, "center", "top", 0), (7, 7, "left", "bottom", 0), (7, -7, "left", "top", 0)),
    *((-7, 7, "right", "bottom", 0), (-7, -7, "right", "top", 0)),
    *((0, -9, "center", "top", 90), (0, 9, "center", "bottom", 90)),  # in a crowd
)
CLOSE = 2.0  # times one roof is higher than another whose name it carries
FONT: Any = {"font.family": ["DejaVu Sans"], "font.size": 10, "axes.linewidth": 0.8}


def draw(report: dict[str, Any], file: Path) -> None:
    """Write the picture as PNG (or whatever the file's name ends in).  ValueError where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["operations"] and row["seconds"]]
    if not rows:
        raise ValueError("the report has no row with operations to draw; measure an op that computes something")
    ceilings = Ceilings(**report["ceilings"])
    dtypes = sorted({row["dtype"] for row in rows})
    colors = dict(zip(sorted({row["backend"] for row in rows}), BACKENDS * len(rows), strict=False))
    with pyplot.rc_context(FONT):
        width, height = PANEL
        tall = height * len(dtypes) + HEAD + FOOT
        figure = pyplot.figure(figsize=(width, tall), facecolor=PAPER, dpi=130)
        panels = figure.subplots(len(dtypes), 1, squeeze=False)[:, 0]
        figure.subplots_adjust(left=LEFT, right=RIGHT, top=1 - HEAD / tall, bottom=FOOT / tall, hspace=0.13)
        _title(figure, ceilings, report, colors)
        for panel, dtype in zip(panels, dtypes, strict=True):
            _panel(panel, [row for row in rows if row["dtype"] == dtype], dtype, ceilings, colors)
        panels[-1].set_xlabel("operations for each byte moved", color=INK, labelpad=8)
        figure.savefig(file, facecolor=PAPER)
        pyplot.close(figure)


def _title(figure: "Figure", ceilings: Ceilings, report: dict[str, Any], colors: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    tall = figure.get_figheight()
    threads = f", {ceilings.threads} thread{'s' * (ceilings.threads > 1)}" if ceilings.threads else ""
    figure.text(LEFT, 1 - 0.55 / tall, f"{ceilings.device}{threads}", size=20, weight="bold", color=INK)
    words = "Each dot is a call, checked before it was timed. The nearer to the roof, the less is left to gain."
    figure.text(LEFT, 1 - 0.88 / tall, words, size=11.5, color=FAINT)
    marks = [Line2D([], [], ls="", marker="o", ms=10, mfc=c, mec=PAPER, label=name) for name, c in colors.items()]
    if any(row["peers"] for row in report["rows"]):
        marks += [
            Line2D([], [], ls="", marker="o", ms=7, mfc=PAPER, mec=FAINT, mew=1.5, label="fastest peer"),
            Line2D([], [], color=FASTER, lw=2.5, label="ahead of it"),
            Line2D([], [], color=SLOWER, lw=2.5, label="behind it"),
        ]
    figure.legend(handles=marks, loc="upper left", bbox_to_anchor=(LEFT - 0.01, 1 - 0.98 / tall), ncols=len(marks),
                  frameon=False, labelcolor=INK, handletextpad=0.4, columnspacing=1.6)  # fmt: skip


def _panel(panel: "Axes", rows: list[Row], dtype: str, ceilings: Ceilings, colors: dict[str, str]) -> None:
    intensity = [row["operations"] / row["bytes"] for row in rows]
    reached = [row["operations"] / row["seconds"] for row in rows]
    rivals = [row["operations"] / min(row["peers"].values()) for row in rows if row["peers"]]
    roofs = sorted({row["arithmetic"] for row in rows}, key=ceilings.rate)
    highest = max(ceilings.rate(name) for name in roofs)
    left, right = min(intensity) / 2.2, max(*intensity, 2.5 * highest / ceilings.bytes_per_second) * 2.2
    panel.set(xscale="log", yscale="log", xlim=(left, right), facecolor=PAPER)
    panel.set_ylim(min(*reached, *rivals) / 2.5, highest * 3)
    _grid(panel)
    marks = _roofs(panel, roofs, ceilings)
    ops = {row["op"] for row in rows}
    title = f"{dtype}  {rows[0]['op']}" if len(ops) == 1 else dtype
    marks.append(
        panel.text(0.012, 0.955, title, transform=panel.transAxes, size=15, weight="bold", color=INK, va="top")
    )
    tips = [row["operations"] / min([row["seconds"], *row["peers"].values()]) for row in rows]
    feet = [row["operations"] / max(row["seconds"], min(row["peers"].values(), default=0)) for row in rows]
    points = _spread(panel, ceilings.bytes_per_second, intensity, reached, feet, tips)
    for row, (x, y) in zip(rows, points, strict=True):
        _point(panel, row, x, y, colors[row["backend"]])
    _labels(panel, rows, points, marks, ceilings.bytes_per_second)


def _grid(panel: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter

    panel.grid(True, which="major", color=GRID, lw=0.9, zorder=0)
    panel.tick_params(which="both", length=0, labelcolor=FAINT)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: with_unit(value, "op/s")))
    for side in panel.spines.values():
        side.set_visible(False)


def _roofs(panel: "Axes", roofs: Sequence[str], ceilings: Ceilings) -> list[Any]:
    """The memory slope, and a flat roof for each dtype that products are done in; the texts on them."""
    import numpy as np

    speed, (left, right), (bottom, top) = ceilings.bytes_per_second, panel.get_xlim(), panel.get_ylim()
    rates = {name: ceilings.rate(name) for name in roofs}
    highest = max(rates.values())
    x = np.geomspace(left, right, 400)
    panel.fill_between(x, np.minimum(speed * x, highest), top, color=SHADE, zorder=1, lw=0)
    ridge = highest / speed
    panel.plot([left, ridge], [speed * left, highest], color=ROOF, lw=2, zorder=3, solid_capstyle="round")
    place: dict[str, Any] = {"textcoords": "offset points", "size": 9.5, "va": "bottom", "color": INK}
    texts, shelf = [], highest
    words: dict[float, list[str]] = {}  # roofs too close for two lines of text share one, on the higher roof
    for name in sorted(rates, key=lambda name: -rates[name]):
        rate = rates[name]
        panel.plot([rate / speed, right], [rate, rate], color=ROOF, lw=2, zorder=3, solid_capstyle="round",
                   alpha=1 if rate == highest else 0.45)  # fmt: skip
        shelf = shelf if rate > shelf / CLOSE else rate
        words.setdefault(shelf, []).append(f"{name} {with_unit(rate, 'op/s')}")
    for rate, names in words.items():
        texts.append(panel.annotate("   ".join(names), (right, rate), (-4, 4), ha="right", **place))
    box = panel.get_window_extent()
    angle = np.degrees(np.arctan2(box.height / np.log10(top / bottom), box.width / np.log10(right / left)))
    at = max(left * 1.5, bottom / speed * 1.5)
    slope = f"memory {with_unit(speed, 'B/s')}"
    turned = {"rotation": angle, "rotation_mode": "anchor"}
    return [*texts, panel.annotate(slope, (at, speed * at), (0, 5), **turned, **place)]


def _spread(panel: "Axes", speed: float, *numbers: Sequence[float]) -> list[tuple[float, float]]:
    """The points, nudged sideways where they or their stems would hide each other, never through the roof.

    numbers: x, y, foot and tip of each.
    """
    placed: list[tuple[float, float, float]] = []
    found = []
    for x, y, foot, tip in zip(*numbers, strict=True):
        (middle, height), (_, low), (_, high) = panel.transData.transform([(x, y), (x, foot), (x, tip)])
        for step in sorted(range(-STEPS, STEPS + 1), key=abs):
            here = middle + step * NUDGE
            under = tip <= speed * panel.transData.inverted().transform((here, 0))[0] or step >= 0
            if under and all(abs(here - x) > 0.9 * NUDGE or low - ROOM > b or high + ROOM < a for x, a, b in placed):
                break
        else:
            here = middle
        placed.append((here, low, high))
        found.append((here, height))
    return [tuple(point) for point in panel.transData.inverted().transform(found)]


def _point(panel: "Axes", row: Row, x: float, y: float, color: str) -> None:
    """A call, with a stem to the fastest peer: green where it is ahead, red where it is behind."""
    if row["peers"]:
        rival = row["operations"] / min(row["peers"].values())
        panel.plot([x, x], [rival, y], color=FASTER if y >= rival else SLOWER, lw=2.2, alpha=0.75, zorder=4)
        panel.plot(x, rival, "o", ms=6.5, mfc=PAPER, mec=FAINT, mew=1.4, zorder=5)
    panel.plot(x, y, "o", ms=10, mfc=color, mec=PAPER, mew=1.2, zorder=6)


def _labels(
    panel: "Axes",
    rows: Sequence[Row],
    points: Sequence[tuple[float, float]],
    marks: Sequence[Any],
    speed: float,
) -> None:
    """As many names as fit without covering a point or one another; what stands alone comes first."""
    import numpy as np
    from matplotlib.transforms import Bbox

    figure = panel.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels = panel.transData.transform(points)
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in pixels]
    taken += [_stem(panel, row, point) for row, point in zip(rows, points, strict=True) if row["peers"]]
    taken += [mark.get_window_extent(renderer) for mark in marks]
    left, right = panel.get_xlim()
    slope = [(x, speed * x) for x in np.geomspace(left, right, 300)]
    taken += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in panel.transData.transform(slope)]
    frame = panel.get_window_extent()
    crowd = [np.sort(np.hypot(*(pixels - here).T))[1:4].sum() for here in pixels]
    with_op = len({row["op"] for row in rows}) > 1
    for index in sorted(range(len(rows)), key=lambda i: -crowd[i]):
        case = rows[index]["case"].replace("->", "→")
        text = f"{rows[index]['op']}  {case}" if with_op else case
        for dx, dy, across, up, turn in OFFSETS:
            place: Any = {"xytext": (dx, dy), "textcoords": "offset points", "ha": across, "va": up, "rotation": turn}
            label = panel.annotate(text, points[index], size=8, color=INK, zorder=7, **place)
            box = label.get_window_extent(renderer).expanded(1.02, 1.02)
            inside = box.x0 > frame.x0 and box.x1 < frame.x1 and box.y0 > frame.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _stem(panel: "Axes", row: Row, point: tuple[float, float]) -> Any:
    from matplotlib.transforms import Bbox

    rival = row["operations"] / min(row["peers"].values())
    ends = [(point[0], y) for y in sorted((point[1], rival))]
    (x, low), (_, high) = panel.transData.transform(ends)
    return Bbox.from_bounds(x - 3, low - 6, 6, high - low + 12)
