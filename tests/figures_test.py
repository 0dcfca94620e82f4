"""Figures: what they draw is what numpy says, and their files are what they claim to be."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.text import Text

import gradjax
from gradjax.errors import GradjaxError
from gradjax.report import figures
from gradjax.storage.results import SPECTRAL, RunValues, read_values, summed_up
from gradjax.storage.store import open_store
from gradjax.structs import ATTENTION, Example, ExampleResult, Spectrum, TokenizedExample

LAYERS = 7
COUNTS = {"slow": 11, "fast": 13}
SVG = "{http://www.w3.org/2000/svg}"


@dataclasses.dataclass(frozen=True)
class MadeUpRun(RunValues):
    matrices: pd.DataFrame  # a row per example, layer and projection


def made_up_run(
    name: str = "tiny",
    counts: dict[str, int] = COUNTS,
    layers: int = LAYERS,
    directory: str = "runs/tiny",
    change: Callable[[pd.DataFrame], pd.DataFrame] = lambda matrices: matrices,
) -> MadeUpRun:
    """Random numbers; each group's last row is unusable, and its first lacks ranks in layer 0."""
    random = np.random.default_rng(5)
    examples, matrices = [], []
    for group, count in counts.items():
        for example in range(count):
            tokens = int(random.integers(3, 900))
            examples.append((group, example, "ok", tokens + 9, tokens, random.random()))
            for layer in range(layers):
                for projection in ATTENTION:
                    norm, rank, share = random.gamma(3, size=3) * (1, 40, 0.1)
                    if example == layer == 0:
                        rank = share = np.nan
                    matrices.append((group, example, layer, projection, norm, rank, share))
        examples.append((group, count, "empty_response", 9, 0, np.nan))
    columns = ["group", "example_id", "status", "num_tokens", "num_target_tokens", "loss"]
    names = ["group", "example_id", "layer", "projection", *SPECTRAL]
    table = change(pd.DataFrame(matrices, columns=names))
    third = table["example_id"] % 3  # as in three shards
    by_example, by_layer = summed_up(table[third == part] for part in range(3))
    return MadeUpRun(
        directory=directory,
        name=name,
        manifest={
            "model": {"name": name},
            "data": {group: {"rows": count + 1} for group, count in counts.items()},
            "settings": {
                "projections": list(ATTENTION),
                "layers": list(range(layers)),
                "store_singular_values": True,
            },
        },
        layers=list(range(layers)),
        examples=pd.DataFrame(examples, columns=columns),
        by_example=by_example,
        by_layer=by_layer,
        cosines=pd.Series(dtype=float),
        matrices=table,
    )


def numbers(run: MadeUpRun, group: str, projection: str, statistic: str) -> np.ndarray:
    """[examples, layers] of what was made up."""
    rows = run.matrices.query("group == @group and projection == @projection")
    examples = rows["example_id"].nunique()
    return rows.sort_values(["example_id", "layer"])[statistic].to_numpy().reshape(examples, -1)


def lines(axes: Axes) -> list[tuple[np.ndarray, np.ndarray]]:
    return [tuple(np.asarray(values) for values in line.get_data()) for line in axes.lines]


def bands(axes: Axes) -> list[dict[float, tuple[float, float]]]:
    """Of each band, its ends at each x."""
    found = []
    for collection in axes.collections:
        points = np.concatenate([path.vertices for path in collection.get_paths()])
        found.append(
            {x: (ys.min(), ys.max()) for x in np.unique(points[:, 0]) if len(ys := at(points, x))}
        )
    return found


def at(points: np.ndarray, x: float) -> np.ndarray:
    return points[points[:, 0] == x, 1]


def svg(figure: Figure, folder: Path) -> bytes:
    figures.save(figure, folder / "figure")
    return (folder / "figure.svg").read_bytes()


def texts(image: bytes) -> list[str]:
    """What a reader of an SVG reads."""
    root = ElementTree.fromstring(image)
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def legend_handles(figure: Figure) -> dict[str, Line2D]:
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    return dict(zip(labels, legend.legend_handles, strict=True))


@pytest.mark.parametrize("statistic", SPECTRAL)
def test_layer_curves_show_means_and_their_intervals(statistic):
    run = made_up_run()
    panels = figures.layer_curves(run, "slow", "fast", statistic).axes
    assert [axes.get_title() for axes in panels] == list(ATTENTION)
    for axes in panels:
        for group, (x, y), band in zip(COUNTS, lines(axes), bands(axes), strict=True):
            values = numbers(run, group, axes.get_title(), statistic)
            known = np.isfinite(values).sum(0)
            assert known[0] == COUNTS[group] - (statistic != "nuclear_norm")
            means = np.nansum(values, 0) / known
            margin = 1.96 * np.sqrt(np.nansum((values - means) ** 2, 0) / (known - 1) / known)
            np.testing.assert_array_equal(x, range(LAYERS))
            np.testing.assert_allclose(y, means, rtol=1e-12)
            ends = np.array([band[layer] for layer in range(LAYERS)])
            if statistic == "nuclear_norm":  # on a logarithmic axis
                ends, means, margin = np.log(ends), np.log(means), margin / means
            np.testing.assert_allclose(ends, np.stack([means - margin, means + margin], 1))
        assert axes.get_yscale() == ("log" if statistic == "nuclear_norm" else "linear")
    assert "not controlled for length" in panels[0].figure.get_suptitle()


def test_nuclear_norms_share_a_scale_and_ranks_do_not():
    def change(matrices: pd.DataFrame) -> pd.DataFrame:
        matrices.loc[matrices["projection"] == "v", list(SPECTRAL)] *= 50
        return matrices

    run = made_up_run(change=change)
    norms = figures.layer_curves(run, "slow", "fast", "nuclear_norm").axes
    assert len({axes.get_ylim() for axes in norms}) == 1
    ranks = figures.layer_curves(run, "slow", "fast", "effective_rank").axes
    assert len({axes.get_ylim() for axes in ranks}) == len(ATTENTION)


def test_a_single_example_has_no_interval(tmp_path):
    figure = figures.layer_curves(made_up_run(counts={"a": 1, "b": 1}), "a", "b", "nuclear_norm")
    assert all(np.isfinite(y).all() for axes in figure.axes for _, y in lines(axes))
    assert svg(figure, tmp_path)


def test_groups_differ_in_colour_marker_and_line():
    figure = figures.layer_curves(made_up_run(), "slow", "fast", "effective_rank")
    high, low = legend_handles(figure).values()
    assert high.get_color() != low.get_color()
    assert high.get_marker() != low.get_marker()
    assert high.get_linestyle() != low.get_linestyle()
    assert list(legend_handles(figure)) == ["slow (11 examples)", "fast (13 examples)"]


@pytest.mark.parametrize("draw", [figures.layer_curves, figures.models])
def test_a_group_that_is_missing_is_named(draw):
    run = made_up_run()
    with pytest.raises(GradjaxError, match="has no group 'swift'"):
        draw([run] if draw is figures.models else run, "slow", "swift", "effective_rank")


def test_spectra_of_a_missing_group_are_refused(stored):
    run, _ = stored
    with pytest.raises(GradjaxError, match="has no group 'swift'"):
        figures.spectra(run, ["slow", "swift"], (1,))


def test_effective_rank_against_length():
    counts = {"slow": 101, "fast": 53}
    run = made_up_run(counts=counts)
    (axes,) = figures.rank_against_length(run, "slow", "fast").axes
    for group, points, line in zip(counts, axes.collections, lines(axes), strict=True):
        rows = run.examples.query("group == @group and status == 'ok'")
        tokens = rows.sort_values("example_id")["num_target_tokens"].to_numpy()
        by_projection = [numbers(run, group, p, "effective_rank") for p in ATTENTION]
        ranks = np.mean([np.nanmean(values, 1) for values in by_projection], 0)
        drawn = np.asarray(points.get_offsets())
        np.testing.assert_allclose(drawn[np.lexsort(drawn.T)], sorted_pairs(tokens, ranks))
        bins = np.array([int(t * t).bit_length() for t in tokens])
        medians = [
            (np.median(tokens[bins == number]), np.median(ranks[bins == number]))
            for number in np.unique(bins)
            if (bins == number).sum() >= 10
        ]
        assert 0 < len(medians) < len(np.unique(bins))
        np.testing.assert_allclose(np.stack(line, 1), medians)


SIDES = [("slow", "fast"), ("model: a", "b"), ("$x$", "y")]
ANSWERS = pd.DataFrame(
    {
        "statistic": 3 * ["nuclear_norm", "effective_rank"],
        "ratio": [0.25, 1.02, np.nan, np.nan, 3.0, 0.9],
        "ratio_ci_low": [0.2, 1.01, np.nan, np.nan, 0.5, 0.85],
        "ratio_ci_high": [0.3, 1.03, np.nan, np.nan, 1e9, 0.95],
        "answer": ["yes, smaller", "yes, but negligible", *(3 * ["undecided"]), "yes, smaller"],
        "pairs": [64, 64, 3, 3, 1234, 1234],
    }
)


def forest() -> Figure:
    return figures.forest(SIDES, [ANSWERS[:2], ANSWERS[2:4], ANSWERS[4:]])


def test_a_forest_shows_every_ratio_with_its_interval(tmp_path):
    figure = forest()
    assert [axes.get_title() for axes in figure.axes] == ["nuclear norm", "effective rank"]
    for axes, (_, rows) in zip(figure.axes, ANSWERS.groupby("statistic", sort=False), strict=True):
        drawn = [line for line in axes.lines if len(line.get_xdata()) == 2][:3]
        for line, (place, row) in zip(drawn, enumerate(rows.itertuples()), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [row.ratio_ci_low, row.ratio_ci_high])
            np.testing.assert_array_equal(line.get_ydata(), [place, place])
        points = [line for line in axes.lines if len(line.get_xdata()) == 1]
        np.testing.assert_array_equal([p.get_xdata()[0] for p in points], rows["ratio"])
        filled = [point.get_markerfacecolor() != "white" for point in points]
        assert filled == [answer != "undecided" for answer in rows["answer"]]
        assert [text.get_text() for text in axes.texts] == list(rows["answer"])
        left, right = axes.get_xlim()
        assert left < 1 < right < 100  # an interval without end leaves the others legible
    read = texts(svg(figure, tmp_path))
    for said in ("slow", "against fast", "64 pairs", "model: a", "$x$", "1,234 pairs"):
        assert any(said in text for text in read)


def test_equal_groups_have_a_forest_too(tmp_path):
    equal = ANSWERS[:2].assign(ratio=1.0, ratio_ci_low=1.0, ratio_ci_high=1.0, answer="no")
    assert svg(figures.forest(SIDES[:1], [equal]), tmp_path)


def test_controlled_curves_show_the_effects_of_layers(tmp_path):
    rng = np.random.default_rng(3)
    ratio = np.exp(rng.normal(0, 0.3, 2 * LAYERS))
    effects = pd.DataFrame(
        {
            "statistic": np.repeat(["nuclear_norm", "effective_rank"], LAYERS),
            "layer": np.tile(np.arange(LAYERS), 2),
            "ratio": ratio,
            "ratio_ci_low": ratio / 1.3,
            "ratio_ci_high": ratio * 1.3,
            "beyond_length": np.array(["yes", "no", "undecided"])[np.arange(2 * LAYERS) % 3],
        }
    )
    figure = figures.controlled_curves(effects, "slow", "fast")
    for axes, (_, rows) in zip(figure.axes, effects.groupby("statistic", sort=False), strict=True):
        (band,) = bands(axes)
        ends = np.array([band[layer] for layer in range(LAYERS)])
        np.testing.assert_allclose(ends, rows[["ratio_ci_low", "ratio_ci_high"]])
        curve, *marked = axes.lines[:3]
        np.testing.assert_allclose(curve.get_ydata(), rows["ratio"])
        for line, decided in zip(marked, (False, True), strict=True):
            chosen = rows[(rows["beyond_length"] == "yes") == decided]
            np.testing.assert_allclose(np.stack(line.get_data(), 1), chosen[["layer", "ratio"]])
            assert (line.get_markerfacecolor() == "white") != decided
        assert axes.get_yscale() == "log"
    assert list(legend_handles(figure)) == ["yes, adjusted over layers", "no, or undecided"]
    assert svg(figure, tmp_path)


def sorted_pairs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    pairs = np.stack([x, y], 1)
    return pairs[np.lexsort(pairs.T)]


def test_many_points_are_thinned_and_the_figure_says_so():
    counts = {"slow": 2003, "fast": 13}
    run = made_up_run(counts=counts, layers=1, change=lambda matrices: matrices.fillna(1.0))
    first, second = (figures.rank_against_length(run, "slow", "fast") for _ in range(2))
    many, few = first.axes[0].collections
    assert (len(many.get_offsets()), len(few.get_offsets())) == (2000, 13)
    np.testing.assert_array_equal(many.get_offsets(), second.axes[0].collections[0].get_offsets())
    assert list(legend_handles(first)) == [
        "slow (2,000 of 2,003 examples shown)",
        "fast (13 examples)",
    ]


def test_responses_of_one_length(tmp_path):
    run = made_up_run()  # 11 and 13 rows
    run.examples["num_target_tokens"] = 61
    figure = figures.rank_against_length(run, "slow", "fast")
    assert [len(x) for x, _ in lines(figure.axes[0])] == [1, 1]
    assert svg(figure, tmp_path)


def test_zero_gradients_leave_panels_empty(tmp_path):
    run = made_up_run(change=lambda matrices: matrices.assign(effective_rank=np.nan))
    for figure in (
        figures.layer_curves(run, "slow", "fast", "effective_rank"),
        figures.rank_against_length(run, "slow", "fast"),
    ):
        assert not any(np.isfinite(y).any() for axes in figure.axes for _, y in lines(axes))
        assert svg(figure, tmp_path)


def test_models_share_relative_depth():
    runs = [made_up_run("seven"), made_up_run("thirteen", layers=13), made_up_run("one", layers=1)]
    figure = figures.models(runs, "slow", "fast", "nuclear_norm")
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    for axes in figure.axes:
        drawn = lines(axes)
        assert [len(x) for x, _ in drawn] == [7, 7, 13, 13, 1, 1]
        for (x, y), run in zip(drawn[::2], runs, strict=True):
            np.testing.assert_allclose(x, np.linspace(0, 1, len(x)))
            values = numbers(run, "slow", axes.get_title(), "nuclear_norm")
            np.testing.assert_allclose(y, values.mean(0))
        assert [line.get_linestyle() for line in axes.lines] == ["-", "--"] * 3
        assert len({line.get_color() for line in axes.lines}) == 3
    assert list(legend_handles(figure)) == ["seven", "thirteen", "one", "slow", "fast"]


@pytest.fixture
def stored(tmp_path) -> tuple[RunValues, dict[str, list[Spectrum]]]:
    """A run in a real store, with singular values of many lengths, and what was stored."""
    random = np.random.default_rng(11)
    kept: dict[str, list[Spectrum]] = {group: [] for group in COUNTS}
    results = []
    for group, count in COUNTS.items():
        for number in range(count):
            spectra = [
                Spectrum(layer, p, 1.0, 2.0, 1.0, 1.0, 0.0, 1.0, -1.0, singular_values=values)
                for layer in range(LAYERS)
                for p in ATTENTION
                for size in [0 if number == layer == 1 else random.integers(1, 307)]
                for values in [np.sort(random.lognormal(0, 9, size).astype(np.float32))[::-1]]
            ]
            kept[group] += spectra
            tokens = np.zeros(317, np.int32)
            example = Example(group, number, f"hash {number}")
            tokenized = TokenizedExample(example, tokens, tokens == 0)
            results.append(ExampleResult(tokenized, "ok", "", 0.5, tuple(spectra)))
    settings = {
        "projections": list(ATTENTION),
        "layers": list(range(LAYERS)),
        "store_singular_values": True,
    }
    manifest = {
        "settings": settings,
        "model": {"name": "tiny"},
        "data": {group: {"rows": count} for group, count in COUNTS.items()},
        "gradient_shapes": {projection: [307, 311] for projection in ATTENTION},
        "versions": {"gradjax": gradjax.__version__},
    }
    with open_store(tmp_path / "run", settings) as store:
        store.write_manifest(manifest)
        for first in range(0, len(results), 5):
            store.append(results[first : first + 5])
    return read_values(tmp_path / "run"), kept


def test_spectra_show_quartiles_of_lists_filled_up_with_zeros(stored, tmp_path):
    run, kept = stored
    layers = (1, 5)
    figure = figures.spectra(run, list(COUNTS), layers)
    assert figure is not None
    titles = [f"{projection}, layer {layer}" for layer in layers for projection in ATTENTION]
    assert [axes.get_title() for axes in figure.axes] == titles
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        projection, layer = axes.get_title().split(", layer ")
        for group, (x, y), band in zip(COUNTS, lines(axes), bands(axes), strict=True):
            lists = [
                spectrum.singular_values
                for spectrum in kept[group]
                if (spectrum.projection, spectrum.layer) == (projection, int(layer))
            ]
            filled = np.stack([np.pad(values, (0, 307 - len(values))) for values in lists])
            lower, median, upper = np.quantile(filled, [0.25, 0.5, 0.75], axis=0)[:, x - 1]
            assert x[0] == 1
            assert x[-1] == max(map(len, lists))
            least = 1e-7 * median[0]
            assert (median == 0).any()
            assert ((median > 0) & (median <= least)).any()
            np.testing.assert_allclose(y, np.where(median > least, median, np.nan), rtol=1e-6)
            shown = x[lower > least]
            expected = np.stack([lower, upper], 1)[lower > least]
            np.testing.assert_allclose([band[i] for i in shown], expected, rtol=1e-6)
            assert set(band) <= set(shown)
    assert svg(figure, tmp_path)


def test_a_run_without_singular_values_has_no_spectra(stored):
    run, _ = stored
    run.manifest["settings"]["store_singular_values"] = False
    assert figures.spectra(run, list(COUNTS), (1,)) is None


ODD_NAMES = [
    ("$x_1$", "_hidden"),
    (r"\$a$b", "<script>alert(1)</script>"),
    ("a\x00b\u202ec\nd", "$_$"),
]


@pytest.mark.parametrize("names", ODD_NAMES)
def test_names_are_shown_as_they_are(names, tmp_path):
    counts = dict.fromkeys(names, 11)
    run = made_up_run(names[0], counts, layers=2)
    others = [made_up_run(names[1], counts, layers=2), made_up_run("_", counts, layers=2)]
    for figure, expected in (
        (figures.layer_curves(run, *names, "effective_rank"), names),
        (figures.rank_against_length(run, *names), names),
        (figures.models([run, *others], *names, "effective_rank"), (*names, *names, "_")),
    ):
        image = svg(figure, tmp_path)
        for name in expected:
            shown = "".join(c if c.isprintable() else "\ufffd" for c in name)
            found = sum(text.startswith(shown) for text in texts(image))
            assert found >= expected.count(name)
        assert b"<script" not in image


def test_long_names_keep_both_ends_and_stay_on_the_page(tmp_path):
    high, low = (f"wizardlm_{'very_' * 20}{side}" for side in ("high", "low"))
    run = made_up_run(counts={high: 2003, low: 11}, layers=1)
    for figure in (
        figures.layer_curves(run, high, low, "effective_rank"),
        figures.rank_against_length(run, high, low),
        figures.models([made_up_run("model_" * 9, {high: 2, low: 2})] * 7, high, low, SPECTRAL[0]),
    ):
        svg(figure, tmp_path)
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        ours, theirs = list(legend_handles(figure))[-2:]
        assert ours.startswith("wizardlm_")
        assert "_high" in ours
        assert "_low" in theirs


def test_all_text_can_be_read_in_print(tmp_path):
    run = made_up_run()
    for figure in (
        figures.layer_curves(run, "slow", "fast", "nuclear_norm"),
        figures.rank_against_length(run, "slow", "fast"),
        figures.models([run], "slow", "fast", "nuclear_norm"),
        forest(),
    ):
        svg(figure, tmp_path)  # ticks are made as it is drawn
        assert figure.get_figwidth() == 7
        found = [text for text in figure.findobj(Text) if text.get_text()]
        assert min(text.get_fontsize() for text in found) >= 8
        for axes in figure.axes:
            assert axes.get_xlabel()
    assert "(" in figures.layer_curves(run, "slow", "fast", SPECTRAL[0]).axes[0].get_ylabel()


def test_files_are_whole_and_equal_each_time(tmp_path):
    figure = figures.layer_curves(made_up_run(), "slow", "fast", "effective_rank")
    settings = dict(matplotlib.rcParams)
    figures.save(figure, tmp_path / "qwen2.5_0.5b")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"qwen2.5_0.5b.png", "qwen2.5_0.5b.svg"}
    assert imread(tmp_path / "qwen2.5_0.5b.png").shape[1] == 1400
    root = ElementTree.fromstring(first["qwen2.5_0.5b.svg"])
    assert root.tag == f"{SVG}svg"
    assert not list(root.iter(f"{SVG}script"))
    assert b"date>" not in first["qwen2.5_0.5b.svg"]

    figures.save(figure, tmp_path / "qwen2.5_0.5b")
    anew = figures.layer_curves(made_up_run(), "slow", "fast", "effective_rank")
    figures.save(anew, tmp_path / "anew")
    for name, data in first.items():
        assert (tmp_path / name).read_bytes() == data
        assert (tmp_path / name.replace("qwen2.5_0.5b", "anew")).read_bytes() == data
    assert dict(matplotlib.rcParams) == settings


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    figure = figures.layer_curves(made_up_run(), "slow", "fast", "effective_rank")
    figures.save(figure, tmp_path / "figure")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fills_the_disk(self, path, **_):
        Path(path).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fills_the_disk)
    with pytest.raises(GradjaxError, match=r"figure\.png cannot be written \(No space left"):
        figures.save(figure, tmp_path / "figure")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_that_is_not_there_is_named(tmp_path):
    figure = figures.layer_curves(made_up_run(), "slow", "fast", "effective_rank")
    with pytest.raises(GradjaxError, match=r"nowhere/figure\.png cannot be written"):
        figures.save(figure, tmp_path / "nowhere" / "figure")
