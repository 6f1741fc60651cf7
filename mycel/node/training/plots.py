"""Pictures of a run: its loss against the tokens trained on, with who was lost and who came, as PNG and SVG.

Drawn with matplotlib's objects, without the state that pyplot keeps for a whole process; imported when it is needed.

Ring: shell (writes files).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mycel.node.training.metrics import StepMetrics
from mycel.protocols.errors import AccessDenied, ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["can_plot", "plot_loss", "plot_losses"]

# Blue, orange, green, purple, red, grey: told apart by most eyes, also by those that see fewer colours.
_COLORS = ("#2c6fbb", "#e07b1a", "#2a9d5c", "#8e5bb5", "#c8413b", "#6b7280")
_INK, _FAINT, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_LOST, _JOINED = "#c8413b", "#2a9d5c"
# The smoothed line follows about this share of the run's steps.
_SMOOTHING = 0.01


def can_plot() -> bool:
    """Whether matplotlib is there."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def plot_loss(metrics: Sequence[StepMetrics], out_stem: Path, title: str) -> tuple[Path, Path]:
    """One run: loss above, tokens per second below, marks where peers were lost or joined. `out_stem`.png and .svg.

    Raises ConfigError if there is nothing to draw or to draw with, or the files cannot be written.
    """
    metrics = _drawable(metrics, title)
    figure, (losses, rates) = _figure(title, heights=(3, 1))
    _draw_loss(losses, metrics, _COLORS[0], "loss")
    _mark_changes(losses, metrics)
    known = [(m.tokens, m.tokens_per_s) for m in metrics if m.tokens_per_s is not None]
    rates.plot([x for x, _ in known], [y for _, y in known], color=_FAINT, linewidth=1.2)
    rates.set_ylim(bottom=0, top=1.15 * max((y for _, y in known), default=1.0) or 1.0)
    rates.set_ylabel("tokens/s")
    rates.yaxis.set_major_formatter("{x:,.0f}")
    figure.align_ylabels()
    rates.set_xlabel("tokens")
    losses.legend(loc="upper right", frameon=False, labelcolor=_INK)
    return _save(figure, out_stem)


def plot_losses(runs: Mapping[str, Sequence[StepMetrics]], out_stem: Path, title: str) -> tuple[Path, Path]:
    """Several runs in one picture, by the name that the legend shows. Raises as `plot_loss` does."""
    drawable = {label: _drawable(metrics, label) for label, metrics in runs.items()}
    if not drawable:
        raise ConfigError("there is no run to draw")
    figure, (losses,) = _figure(title, heights=(1,))
    for index, (label, metrics) in enumerate(drawable.items()):
        # Equal runs lie on each other: those below are drawn wider, so that they can be seen.
        _draw_loss(losses, metrics, _COLORS[index % len(_COLORS)], label, width=1.6 + 1.6 * (len(drawable) - 1 - index))
    losses.set_xlabel("tokens")
    losses.legend(loc="upper right", frameon=False, labelcolor=_INK)
    return _save(figure, out_stem)


def smoothed(values: Sequence[float], keep: float) -> list[float]:
    """A mean over neighbours on both sides, so that it does not lag: sum_j keep^|i-j| v_j / sum_j keep^|i-j|.

    >>> smoothed([4.0, 2.0, 2.0], 0.5)
    [3.142857142857143, 2.5, 2.2857142857142856]
    """
    before, after = _weighed(values, keep), _weighed(values[::-1], keep)[::-1]
    return [
        (total + total_after - value) / (weight + weight_after - 1.0)
        for value, (total, weight), (total_after, weight_after) in zip(values, before, after, strict=True)
    ]


def _weighed(values: Sequence[float], keep: float) -> list[tuple[float, float]]:
    """For each value the sum of it and those before, and the sum of their weights: keep^distance."""
    total = weight = 0.0
    sums = []
    for value in values:
        total, weight = total * keep + value, weight * keep + 1.0
        sums.append((total, weight))
    return sums


def _drawable(metrics: Sequence[StepMetrics], name: str) -> list[StepMetrics]:
    known = [record for record in metrics if record.loss is not None]
    if not known:
        raise ConfigError(f"{name}: no step with a loss, so there is nothing to draw")
    return known


def _draw_loss(axes: Axes, metrics: Sequence[StepMetrics], color: str, label: str, width: float = 1.8) -> None:
    tokens = [record.tokens for record in metrics]
    losses = [record.loss for record in metrics if record.loss is not None]
    span = max(2.0, _SMOOTHING * len(losses))
    axes.plot(tokens, losses, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(tokens, smoothed(losses, 1 - 1 / span), color=color, linewidth=width, label=label)
    if len(losses) == 1:
        axes.plot(tokens, losses, color=color, marker="o")


def _mark_changes(axes: Axes, metrics: Sequence[StepMetrics]) -> None:
    """A line for each step after which peers were lost (dashed) or had joined (dotted)."""
    named: set[str] = set()
    for record in metrics:
        for peers, color, style, name in (
            (record.lost, _LOST, (0, (5, 3)), "peer lost"),
            (record.joined, _JOINED, (0, (1, 2)), "peer joined"),
        ):
            if peers:
                shown = name if name not in named else "_nolegend_"
                axes.axvline(record.tokens, color=color, linestyle=style, linewidth=1.2, zorder=1, label=shown)
                named.add(name)


def _figure(title: str, heights: Sequence[int]) -> tuple[Figure, Sequence[Axes]]:
    """Axes above each other, of these relative heights, with one axis of tokens."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        raise ConfigError("matplotlib draws the plots and is not installed: pip install 'mycel[train]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    grid: Any = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    all_axes: list[Axes] = [row[0] for row in grid]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=9)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        axes.margins(x=0.01)
    all_axes[0].set_title(_plain(title), color=_INK, fontsize=12, loc="left")
    all_axes[0].set_ylabel("loss (nats per token)")
    all_axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    return figure, all_axes


def _plain(text: str) -> str:
    """matplotlib reads what stands between dollar signs as a formula."""
    return text.replace("$", r"\$")


def _short(count: float) -> str:
    """ "250k", "1.5M": a number of tokens at a tick."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:g}{unit}"
    return f"{count:g}"


def _save(figure: Figure, out_stem: Path) -> tuple[Path, Path]:
    """Both files. Agg and the SVG writer are chosen by the name; no date, so that equal runs give equal files."""
    png, svg = (out_stem.with_name(out_stem.name + suffix) for suffix in (".png", ".svg"))
    try:
        out_stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=150)
        figure.savefig(svg, metadata={"Date": None})
    except OSError as error:
        raise AccessDenied(f"cannot write {png}: {error.strerror}") from None
    return png, svg
