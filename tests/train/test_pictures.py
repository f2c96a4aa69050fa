import numpy as np
import pytest

from znn.train.pictures import draw_learning_curve, draw_side_by_side

plot = pytest.importorskip("matplotlib.pyplot")
LINES = [{"kind": "train", "round": n, "seconds": 60.0 * n, "loss": 1 / n} for n in range(1, 9)] + [
    {
        "kind": "validation",
        "round": n,
        "seconds": 60.0 * n,
        "loss": 1.1 / n,
        "pixel_error": 0.2 / n,
        "standard_error": 0.01,
        "trivial_error": 0.22,
    }
    for n in (4, 8)
]


def test_learning_curve_shows_error_below_the_trivial_one(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("znn.train.pictures._save", lambda figure, path: figures.append(figure))
    draw_learning_curve(LINES, tmp_path / "curve.png")
    loss, error = figures[0].axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [(n, 1 / n) for n in range(1, 9)])
    np.testing.assert_allclose(error.lines[0].get_xydata(), [(4, 5), (8, 2.5)])
    assert error.lines[1].get_ydata()[0] == pytest.approx(22)
    assert error.get_ylim()[0] == 0 and error.get_ylim()[1] > 22
    band = error.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.5) and band.max() == pytest.approx(7)
    plot.close("all")


def test_a_run_without_validation_still_has_its_curve(tmp_path):
    draw_learning_curve(LINES[:8], tmp_path / "curve.png")
    draw_learning_curve([], tmp_path / "empty.png")
    for name in ("curve.png", "empty.png"):
        assert plot.imread(tmp_path / name).ndim == 3
    assert not plot.get_fignums()


def test_side_by_side_shows_boundaries_dark(tmp_path):
    image = np.random.default_rng(0).standard_normal((40, 50))
    target = np.zeros((1, 40, 50))
    target[:, 20] = 1
    draw_side_by_side(image, target, np.full((1, 40, 50), np.nan), tmp_path / "a.png", "title")
    draw_side_by_side(image, target, target, tmp_path / "b.png", "title")
    unknown, known = plot.imread(tmp_path / "a.png"), plot.imread(tmp_path / "b.png")
    third = slice(2 * known.shape[1] // 3 + 20, -20)
    assert known[:, third, :3].mean() < unknown[:, third, :3].mean()
