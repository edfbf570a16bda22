# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Draws docs/how_it_works.png: the three stages of one update. Run `python docs/how_it_works.py` after changing it."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GREY, TEAL, AMBER = "#1b1f24", "#8a929c", "#0f7b6c", "#c2571a"
STEPS = 8
ACTIVE = (1, 3, 5, 6)
# Under the captions that arrows pass, so that the arrows pass behind them.
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 2.5}
PLACES = [1.35 + 0.86 * step for step in range(STEPS)]
TOP, BOTTOM = 4.05, 1.95
Point = tuple[float, float]


def box(
    axes: Axes, x: float, y: float, width: float, text: str, colour: str, filled: bool = False, height: float = 0.5
) -> None:
    """A box around a text, centred at a point."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=colour if filled else "white",
            edgecolor=colour,
            linewidth=1.4,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9.5, color="white" if filled else INK)


def arrow(axes: Axes, start: Point, end: Point, colour: str, style: Any = "-", bend: float = 0) -> None:
    """An arrow from a point to another."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            color=colour,
            linestyle=style,
            linewidth=1.4,
            shrinkA=2,
            shrinkB=2,
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def caption(axes: Axes, y: float, title: str, text: str, **style: Any) -> None:
    """The title of a stage, and what happens in it."""
    axes.text(0.3, y, title, fontsize=12, color=INK, weight="bold")
    axes.text(1.45, y, text, fontsize=9.5, color=GREY, **style)


def draw_recording(axes: Axes) -> None:
    """The steps of a rollout, then decoder and reward."""
    text = "the stock pipeline samples without gradients; latents and velocities of a few steps are kept"
    caption(axes, 4.87, "1  Record", text)
    axes.text(0.42, TOP, "noise", fontsize=9.5, color=INK, ha="center", va="center")
    previous = 0.68
    for step, x in enumerate(PLACES):
        box(axes, x, TOP, 0.52, f"step {step}", TEAL if step in ACTIVE else GREY, filled=step in ACTIVE)
        arrow(axes, (previous, TOP), (x - 0.28, TOP), GREY)
        previous = x + 0.28
    box(axes, 8.55, TOP, 0.72, "decode", GREY)
    arrow(axes, (previous, TOP), (8.17, TOP), GREY)
    box(axes, 9.55, TOP, 0.76, "reward", AMBER, filled=True)
    arrow(axes, (8.93, TOP), (9.15, TOP), GREY)


def draw_scoring(axes: Axes) -> None:
    """From the reward to the adjoint."""
    text = "the reward's gradient goes through the decoder to the endpoint: the adjoint. Then both are freed"
    caption(axes, 3.2, "2  Score", text, bbox=PLAIN)
    box(axes, 8.55, BOTTOM, 0.76, "adjoint", AMBER, filled=True)
    arrow(axes, (9.55, TOP - 0.27), (8.95, BOTTOM + 0.1), AMBER, bend=-0.35)


def draw_sweep(axes: Axes) -> None:
    """The active steps, from the latest to the first."""
    text = "latest active step first: evaluate its velocity again, send weight x adjoint back, free the graph"
    caption(axes, 2.6, "3  Sweep", text, bbox=PLAIN)
    for step in ACTIVE:
        box(axes, PLACES[step], BOTTOM, 0.66, f"v({step})", TEAL, filled=True)
        arrow(axes, (PLACES[step], TOP - 0.27), (PLACES[step], BOTTOM + 0.27), TEAL, style=(0, (2, 2)))
    following = 8.17
    for step in reversed(ACTIVE):
        arrow(axes, (following, BOTTOM), (PLACES[step] + 0.35, BOTTOM), AMBER)
        following = PLACES[step] - 0.35
    for step in ACTIVE:
        arrow(axes, (PLACES[step], BOTTOM - 0.27), (PLACES[step], 1.02), TEAL)
    box(axes, (PLACES[ACTIVE[0]] + PLACES[ACTIVE[-1]]) / 2, 0.75, 5.0, "gradient of the LoRA (added up)", TEAL)
    axes.text(7.75, 0.92, "A method is a row of the table:", fontsize=9.5, color=INK, va="center")
    text = "which steps are active, their weights, and\nthe coupling of the adjoint from step to step"
    axes.text(7.75, 0.62, text, fontsize=9.5, color=GREY, va="top")


def main() -> None:
    """Draw and save the figure."""
    figure = Figure(figsize=(11, 5.2), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 11)
    axes.set_ylim(0, 5.2)
    axes.axis("off")
    for draw in (draw_recording, draw_scoring, draw_sweep):
        draw(axes)
    figure.savefig(Path(__file__).with_name("how_it_works.png"))


if __name__ == "__main__":
    main()
