"""The studies' plots: each is a picture, and shows what the tables say."""

import matplotlib.image
import pytest

from bertkd.study.plots import plot_losses, plot_score_bars, plot_score_curves


def assert_drawn(path):
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 300
    assert image.shape[1] > 600
    assert image[..., :3].std() > 0.01


def test_each_plot_writes_a_picture(tmp_path):
    steps = list(range(1, 50))
    losses = {"att_kl": (steps, [1 / s for s in steps]), "pool": (steps, [0.0 for _ in steps])}
    assert_drawn(plot_losses(losses, tmp_path / "loss.png", "Loss"))
    curves = {"MRR": ([0, 20, 40], [0.2, 0.3, 0.4]), "Spearman": ([0, 20, 40], [0.4, 0.8, 0.9])}
    references = {"MRR": {"teacher": 0.44}}
    assert_drawn(
        plot_score_curves(curves, tmp_path / "scores.png", "Scores", references=references)
    )
    scores = {"teacher": {"MRR": [0.44]}, "student": {"MRR": [0.41, 0.43], "Spearman": [0.9, 0.91]}}
    assert_drawn(plot_score_bars(scores, tmp_path / "bars.png", "Bars"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bars.png",
        "loss.png",
        "scores.png",
    ]


def test_whiskers_are_the_standard_deviations_of_the_tables(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.errorbar", lambda self, x, y, yerr, **_: drawn.append((y, yerr))
    )
    scores = {"teacher": {"MRR": [0.5]}, "student": {"MRR": [1.0, 2.0, 6.0]}}
    plot_score_bars(scores, tmp_path / "bars.png", "Bars")
    (means, spreads) = drawn.pop()
    assert not drawn
    # Of 1, 2 and 6: mean 3, sum of squares 4 + 1 + 9 = 14, n - 1 = 2.
    assert means == [3.0]
    assert spreads == [pytest.approx(7**0.5)]


def test_nothing_to_plot_is_refused(tmp_path):
    for plot in (plot_losses, plot_score_curves, plot_score_bars):
        with pytest.raises(ValueError, match="empty"):
            plot({}, tmp_path / "x.png", "nothing")
