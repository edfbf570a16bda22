# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Draws docs/how_it_works.png: the three stages of one update. Run `python docs/how_it_works.py` after changing it."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GREY, TEAL, AMBER = "#1b1f24", "#8a929c", "#0f7b6c", "#c2571a"
STEPS = 8
ACTIVE = (1, 3, 5, 6)
# Under the captions that arrows pass, so that the arrows pass behind them.
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 2.5}


def main() -> None:
    """Draw and save the figure."""
    figure = Figure(figsize=(11, 5.2), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 11)
    axes.set_ylim(0, 5.2)
    axes.axis("off")

    def box(
        x: float, y: float, width: float, text: str, colour: str, filled: bool = False, height: float = 0.5
    ) -> None:
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

    def arrow(
        start: tuple[float, float], end: tuple[float, float], colour: str, style: str = "-", bend: float = 0
    ) -> None:
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

    places = [1.35 + 0.86 * step for step in range(STEPS)]
    top, bottom = 4.05, 1.95

    axes.text(0.3, 4.87, "1  Record", fontsize=12, color=INK, weight="bold")
    axes.text(
        1.45,
        4.87,
        "the stock pipeline samples without gradients; latents and velocities of a few steps are kept",
        fontsize=9.5,
        color=GREY,
    )
    axes.text(0.42, top, "noise", fontsize=9.5, color=INK, ha="center", va="center")
    previous = 0.68
    for step, x in enumerate(places):
        box(x, top, 0.52, f"step {step}", TEAL if step in ACTIVE else GREY, filled=step in ACTIVE)
        arrow((previous, top), (x - 0.28, top), GREY)
        previous = x + 0.28
    box(8.55, top, 0.72, "decode", GREY)
    arrow((previous, top), (8.17, top), GREY)
    box(9.55, top, 0.76, "reward", AMBER, filled=True)
    arrow((8.93, top), (9.15, top), GREY)

    axes.text(0.3, 3.2, "2  Score", fontsize=12, color=INK, weight="bold")
    axes.text(
        1.45,
        3.2,
        "the reward's gradient goes through the decoder to the endpoint: the adjoint. Then both are freed",
        fontsize=9.5,
        color=GREY,
        bbox=PLAIN,
    )
    box(8.55, bottom, 0.76, "adjoint", AMBER, filled=True)
    arrow((9.55, top - 0.27), (8.95, bottom + 0.1), AMBER, bend=-0.35)

    axes.text(0.3, 2.6, "3  Sweep", fontsize=12, color=INK, weight="bold")
    axes.text(
        1.45,
        2.6,
        "latest active step first: evaluate its velocity again, send weight x adjoint back, free the graph",
        fontsize=9.5,
        color=GREY,
        bbox=PLAIN,
    )
    for step in ACTIVE:
        box(places[step], bottom, 0.66, f"v({step})", TEAL, filled=True)
        arrow((places[step], top - 0.27), (places[step], bottom + 0.27), TEAL, style=(0, (2, 2)))
    following = 8.17
    for step in reversed(ACTIVE):
        arrow((following, bottom), (places[step] + 0.35, bottom), AMBER)
        following = places[step] - 0.35
    for step in ACTIVE:
        arrow((places[step], bottom - 0.27), (places[step], 1.02), TEAL)
    box((places[ACTIVE[0]] + places[ACTIVE[-1]]) / 2, 0.75, 5.0, "gradient of the LoRA (added up)", TEAL)
    axes.text(
        7.75,
        0.92,
        "A method is a row of the table:",
        fontsize=9.5,
        color=INK,
        va="center",
    )
    axes.text(
        7.75,
        0.62,
        "which steps are active, their weights, and\nthe coupling of the adjoint from step to step",
        fontsize=9.5,
        color=GREY,
        va="top",
    )
    figure.savefig(Path(__file__).with_name("how_it_works.png"))


if __name__ == "__main__":
    main()
