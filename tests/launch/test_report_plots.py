"""Contract: a plot's legend names every curve inside the picture, however many and long the names are.

Not checked here: which plots a report has (test_report.py), nor how they look.
"""

from __future__ import annotations

import pytest
from matplotlib import pyplot as plt

from launch.report_plots import STYLE, add_legend


@pytest.mark.parametrize(("count", "words"), [(2, 1), (7, 4), (7, 9), (1, 30)])
def test_the_legend_lies_inside(count: int, words: int) -> None:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        for number in range(count):
            axes.plot([0, 1], [number, 0], label=" ".join([f"curve-{number}"] * words)[:80])
        add_legend(figure)
        figure.canvas.draw()
        (legend,) = figure.legends
        box, height = legend.get_window_extent(), axes.get_window_extent().height
        plt.close(figure)
    assert len(legend.get_texts()) == count
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0
    assert height > 100
