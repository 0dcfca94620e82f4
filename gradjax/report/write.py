"""Stores -> comparisons, tables, figures and the page: what `gradjax report` writes."""

import dataclasses
import itertools
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pandas as pd
from absl import logging
from matplotlib.figure import Figure

from gradjax.config import NEGLIGIBLE, as_directory
from gradjax.errors import GradjaxError
from gradjax.report import figures, tables
from gradjax.report.clusters import with_clusters
from gradjax.report.compare import (
    COLUMNS,
    RATIO,
    Comparison,
    adjusted,
    answers,
    compare,
    interval,
    sentence,
    settled,
)
from gradjax.report.layers import layer_effects
from gradjax.report.length import rule
from gradjax.report.page import FigureImage, Page, Table, write_page
from gradjax.report.published import SOURCE, beside, published
from gradjax.report.summary import summary_table
from gradjax.storage.results import ALL, KEY, RunValues, example_values, read_values
from gradjax.storage.store import read_table

_OUTLIERS = 20  # rows shown per statistic
_OUTLYING = 8  # median absolute deviations from where a row counts as one


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """The flags of `gradjax report`."""

    runs: tuple[str, ...]
    compare: tuple[str, ...] = ()
    equal_length_runs: tuple[str, ...] = ()
    output_dir: str | None = None
    summary: bool = False
    by: str = "projection"
    layers: str = "all"
    published: str | None = None
    pair_by: str | None = None
    cluster_by: str | None = None
    negligible: float = NEGLIGIBLE

    def __post_init__(self):
        if self.equal_length_runs and len(self.equal_length_runs) != len(self.runs):
            raise GradjaxError(
                f"--equal_length_run was given {len(self.equal_length_runs)} times, --run "
                f"{len(self.runs)} times; give one for each run, in the same order"
            )
        if self.published and (len(self.compare) != 1 or self.by != "projection"):
            raise GradjaxError(
                f"--published={self.published}: expected one --compare=HIGH:LOW, the groups that "
                "the paper compares, and --by=projection"
            )
        if self.summary and (self.published or self.by != "projection"):
            raise GradjaxError(
                "--summary has none of the tables that --published and --by are about; leave them "
                "out, or leave out --summary"
            )
        if not self.negligible >= 0:
            raise GradjaxError(
                f"--negligible={self.negligible}: expected standard deviations, at least 0"
            )
        if repeated := [run for run in self.runs if self.runs.count(run) > 1]:
            raise GradjaxError(f"--run={repeated[0]} is given twice; expected different runs")
        for pair in self.compare:
            high, _, low = pair.partition(":")
            if not high or not low or high == low:
                raise GradjaxError(f"--compare={pair}: expected HIGH:LOW, two groups of the run")


@dataclasses.dataclass(frozen=True)
class Written:
    """A report: where it is, and a sentence per comparison."""

    directory: Path
    verdicts: tuple[str, ...]


def write_report(config: ReportConfig) -> Written:
    """Reads the runs, compares their groups, writes everything, the page last.

    Raises:
      GradjaxError: if a run is missing, unfinished or of one group, or a group of it is unknown
        or has no `ok` row.
    """
    asked = _asked(config)
    directory = _output_directory(config, asked.runs[0])
    verdicts = tuple(
        f"{one.model}: {sentence(one)}" if asked.several else sentence(one)
        for one in asked.comparisons
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write = _write_summary if config.summary else _write_all
        page = write(directory, asked, config, verdicts)
    except OSError as error:
        raise GradjaxError(
            f"{directory} cannot be written ({error.strerror}); give an --output_dir that can"
        ) from error
    write_page(directory / "report.html", page)
    return Written(directory, verdicts)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a report is about."""

    runs: list[RunValues]
    equal: list[RunValues]  # their equal-length runs, if given
    pairs: list[tuple[str, str]]  # groups of the first run, and but for a summary of all
    comparisons: list[Comparison]  # run by run

    @property
    def several(self) -> bool:
        """Whether a comparison has to be told by its run, too."""
        return len(self.runs) > 1


def _asked(config: ReportConfig) -> _Asked:
    runs = [_read(run, config) for run in config.runs]
    equal = [_read(run, config) for run in config.equal_length_runs]
    runs = _named_apart(runs, by_directory=config.summary)
    pairs = chosen_pairs(runs[0], config.compare)
    logging.info("Comparing %d groups", len({group for pair in pairs for group in pair}))
    comparisons = [
        compare(run, *pair, alone, config.negligible)
        for run, alone in zip(runs, equal or [None] * len(runs), strict=True)
        for pair in (chosen_pairs(run, config.compare) if config.summary else pairs)
    ]
    return _Asked(runs, equal, pairs, settled(comparisons))


def _write_all(
    directory: Path, asked: _Asked, config: ReportConfig, verdicts: Sequence[str]
) -> Page:
    """Tables and figures; returns the page, whose lists of examples are of the first run."""
    runs, comparisons, several = asked.runs, asked.comparisons, asked.several
    paper = {run.name: published(_model(run), config.published) for run in runs if config.published}
    shown = [
        _rows_by_status(directory, [*runs, *asked.equal]),
        *_statistics(directory, comparisons, several),
        *_paper_tables(directory, config.by, runs, asked.pairs, paper),
    ]
    by_layer = layer_effects(comparisons)
    _write_layers(directory, comparisons, by_layer, several)
    overview = [_forest(comparisons, several), *_curves(comparisons, by_layer, several)]
    drawn = _figures(directory, [*overview, *_drawings(runs, asked.pairs)])
    examples = _examples(runs[0])
    return Page(
        title=f"gradjax report: {runs[0].name}",
        answers=_first_screen(comparisons, several),
        verdicts=verdicts,
        overview=drawn[: len(overview)],
        rule=rule(config.negligible),
        tables=shown,
        figures=drawn[len(overview) :],
        examples=examples,
        outliers=_outliers(examples),
        not_used=_not_used(examples, ["group", "status", "reason"]),
        manifest=runs[0].manifest,
    )


def _write_summary(
    directory: Path, asked: _Asked, config: ReportConfig, verdicts: Sequence[str]
) -> Page:
    """`summary.csv`; returns a page without what the runs' own reports have."""
    runs, several = asked.runs, asked.several
    summary = summary_table(asked.comparisons)
    summary.to_csv(directory / "summary.csv", index=False)
    examples = pd.concat([run.examples.assign(run=str(run.directory)) for run in runs])
    none = pd.DataFrame(columns=[*KEY, "instruction", "output"])
    return Page(
        title=f"gradjax report: summary of {len(runs)} runs",
        answers=_first_screen(asked.comparisons, several),
        verdicts=verdicts,
        overview=_figures(directory, [_forest(asked.comparisons, several)]),
        rule=rule(config.negligible),
        tables=[
            Table("Summary", _SUMMARY_NOTE, summary.drop(columns="verdict")),
            _rows_by_status(directory, [*runs, *asked.equal]),
        ],
        figures=[],
        examples=none,
        outliers=none,
        not_used=_not_used(examples, ["run", "group", "status", "reason"]),
        manifest={str(run.directory): run.manifest for run in runs},
    )


def _read(run: str, config: ReportConfig) -> RunValues:
    values = read_values(as_directory(run), config.layers)
    return with_clusters(values, config.pair_by, config.cluster_by)


def chosen_pairs(run: RunValues, given: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs HIGH:LOW of `--compare`; the first group with each other one if none is given."""
    if given:
        return [(high, low) for high, _, low in (p.partition(":") for p in dict.fromkeys(given))]
    high, *others = run.groups
    if not others:
        raise GradjaxError(
            f"{run.directory} has one group, {high!r}, and a comparison takes two; add another "
            "with --data=GROUP=SOURCE to the command that made the run"
        )
    return [(high, low) for low in others]


def _named_apart(runs: list[RunValues], *, by_directory: bool) -> list[RunValues]:
    """The runs with names that tell them apart: models', with directories where these repeat."""
    parts = [PurePosixPath(str(run.directory)).parts for run in runs]
    tails = [_tail(own, parts) for own in parts]
    models = [run.name for run in runs]
    names = [
        tail if by_directory else f"{model} ({tail})" if models.count(model) > 1 else model
        for model, tail in zip(models, tails, strict=True)
    ]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _tail(path: tuple[str, ...], paths: Sequence[tuple[str, ...]]) -> str:
    """The end of a path that no other path has."""
    for size in range(1, len(path)):
        if sum(other[-size:] == path[-size:] for other in paths) == 1:
            return "/".join(path[-size:])
    return str(PurePosixPath(*path))


def _model(run: RunValues) -> str:
    return run.manifest["model"]["name"]


def _output_directory(config: ReportConfig, run: RunValues) -> Path:
    if config.output_dir:
        return Path(config.output_dir)
    if isinstance(run.directory, str):
        raise GradjaxError(f"--run={run.directory} is a URL; say where to write with --output_dir")
    return run.directory / ("summary" if config.summary else "report")


def _statistics(
    directory: Path, comparisons: Sequence[Comparison], several: bool
) -> Iterator[Table]:
    """The statistics' CSV files, and what the page shows of them."""
    whole = adjusted(comparisons)
    named = ["model"] if several else []
    whole[[*named, *COLUMNS]].to_csv(directory / "comparisons.csv", index=False)
    whole[["model", "comparison", *_SHOWN]].to_csv(directory / "statistics.csv", index=False)
    balances = [one.balance.assign(model=one.model, comparison=one.name) for one in comparisons]
    pd.concat(balances).to_csv(directory / "balance.csv", index=False)
    controls = pd.DataFrame([_control(comparison) for comparison in comparisons])
    if not several:
        controls = controls.drop(columns="model")
    controls.to_csv(directory / "length_control.csv", index=False)
    yield Table("Length", _LENGTH_NOTE, controls)
    for one in comparisons:
        rows = whole[(whole["model"] == one.model) & (whole["comparison"] == one.name)]
        heading = _title(one, several)
        yield Table(f"Statistics, {heading}", _STATISTICS_NOTE, rows[_SHOWN])
        yield Table(f"Balance of tokens, {heading}", _BALANCE_NOTE, one.balance)


def _rows_by_status(directory: Path, runs: Sequence[RunValues]) -> Table:
    """`rows.csv`: how many rows of each run and group have each status."""
    sizes = [run.examples.groupby(["group", "status"], sort=False).size() for run in runs]
    counts = [
        size.reindex(run.groups, level="group").reset_index(name="rows")
        for size, run in zip(sizes, runs, strict=True)
    ]
    frame = pd.concat([c.assign(run=str(r.directory)) for c, r in zip(counts, runs, strict=True)])
    frame = frame[["run", "group", "status", "rows"]]
    frame.to_csv(directory / "rows.csv", index=False)
    return Table("Rows", "Rows by status; only rows with status ok are used.", frame)


_LENGTH_NOTE = """AUROC of response length alone and of loss alone (0.5: no difference), the share
of the smaller group's rows that could be matched on length, and what the verdict rests on."""
_STATISTICS_NOTE = """Beyond length: by the rule. Ratio: high over low, of geometric means at equal
length, with the 99 % interval that decides. Beyond loss: the same at equal loss, too. Gap: high −
low of the means over examples, with a bootstrap 95 % interval. p: Mann–Whitney, adjusted over the
whole report (Benjamini–Hochberg). Matched gap: at equal length, with its 95 % interval; likewise of
the equal-length run. Rank effect: percentiles by which high ranks above low in a regression on log
lengths."""
_SUMMARY_NOTE = """A line per comparison: each statistic's answer by the rule, adjusted over all
lines, and its ratio, high over low, with the 99 % interval that decides."""
_BALANCE_NOTE = """Geometric means of tokens, and the difference of mean logarithms in standard
deviations, before and after matching."""
_SHOWN = [
    *("statistic", "projection", "beyond_length", *RATIO),
    *("beyond_loss", "n_high", "n_low", "mean_high", "mean_low", "gap", "ci_low"),
    *("ci_high", "auroc", "auroc_low", "auroc_high", "cliffs_delta", "p_adjusted", "matched_gap"),
    *("matched_ci_low", "matched_ci_high", "equal_length_gap", "equal_length_ci_low"),
    *("equal_length_ci_high", "rank_effect"),
]


def _control(comparison: Comparison) -> dict[str, object]:
    alone = comparison.equal_matched
    rows = [len(side.target) for side in alone.rows] if alone else [0, 0]
    return {
        "model": comparison.model,
        "comparison": comparison.name,
        "length_auroc": comparison.length_auroc,
        "loss_auroc": comparison.loss_auroc,
        "matched_pairs": len(comparison.matched.pairs),
        "matched_share": comparison.matched.share,
        "equal_length": comparison.equal_length,
        "equal_length_n_high": rows[0],
        "equal_length_n_low": rows[1],
        "equal_length_pairs": len(alone.pairs) if alone else 0,
        "pairs_cut": comparison.cut,
        "decided_by": comparison.primary,
    }


def _paper_tables(
    directory: Path,
    by: str,
    runs: Sequence[RunValues],
    pairs: list[tuple[str, str]],
    paper: dict[str, tuple[pd.DataFrame, pd.DataFrame]],
) -> Iterator[Table]:
    """The paper's tables as CSV, Markdown and LaTeX, and for the page.

    `paper` has the published spectra and similarities by run, if they were asked for.
    """
    suffixes: list[str] = []
    for run in runs:
        suffix = _free(f"_{_file_name(run.name)}", suffixes) if len(runs) > 1 else ""
        suffixes.append(suffix)
        spectra = tables.spectra_table(run, pairs, by)
        similarity = tables.similarity_table(run, pairs)
        if paper:
            of_spectra, of_similarity = paper[run.name]
            spectra = beside(spectra, of_spectra)
            similarity = beside(similarity, of_similarity)
        for name, note, frame in (
            ("Spectra", _SPECTRA_NOTE, spectra),
            ("Similarity", _SIMILARITY_NOTE, similarity),
        ):
            tables.save(frame, directory / f"{name.lower()}{suffix}")
            heading = f"{name}, {run.name}" if suffix else name
            if by != "example" or name != "Spectra":
                yield Table(heading, note, frame)


_SPECTRA_NOTE = f"Means over examples per layer and projection, then over layers, as in {SOURCE}."
_SIMILARITY_NOTE = f"Mean cosines of two gradients, within and between layers, as in {SOURCE}."


def _title(comparison: Comparison, several: bool) -> str:
    groups = f"{comparison.high} against {comparison.low}"
    return f"{comparison.model}: {groups}" if several else groups


def _first_screen(comparisons: Sequence[Comparison], several: bool) -> pd.DataFrame:
    """A line per comparison: what its sentence says."""
    lines = []
    for one in comparisons:
        line = {"comparison": _title(one, several), "pairs": len(one.deciding.pairs)}
        for row in answers(one).to_dict("records"):
            word = row["statistic"].replace("_", " ")
            line[word] = row["answer"]
            line[f"{word}, high ÷ low [99 %]"] = (
                interval(*(row[column] for column in RATIO)) if row["ratio"] > 0 else None
            )
            line[f"{word}, beyond loss too"] = row["beyond_loss"]
        lines.append(line)
    return pd.DataFrame(lines)


def _write_layers(
    directory: Path,
    comparisons: Sequence[Comparison],
    by_layer: Sequence[pd.DataFrame],
    several: bool,
) -> None:
    """`layers.csv`: the effects by layer."""
    models = [one.model for one in comparisons]
    whole = pd.concat(by_layer, keys=models, names=["model"]).reset_index(level="model")
    if not several:
        whole = whole.drop(columns="model")
    whole.to_csv(directory / "layers.csv", index=False)


class _Drawing(NamedTuple):
    """A figure that is to be saved, under a name."""

    caption: str
    name: str
    figure: Figure


def _forest(comparisons: Sequence[Comparison], several: bool) -> _Drawing:
    sides = [_sides(one, several) for one in comparisons]
    drawn = figures.forest(sides, [answers(one) for one in comparisons])
    caption = "Ratios of all comparisons at equal length, with 99 % intervals"
    return _Drawing(caption, "verdicts", drawn)


def _sides(comparison: Comparison, several: bool) -> tuple[str, str]:
    """The groups, the first with its run where there are several."""
    where = f"{comparison.model}: " if several else ""
    return f"{where}{comparison.high}", comparison.low


def _curves(
    comparisons: Sequence[Comparison], by_layer: Sequence[pd.DataFrame], several: bool
) -> Iterator[_Drawing]:
    """Each comparison by layer."""
    for one, effects in zip(comparisons, by_layer, strict=True):
        if effects["ratio"].notna().any():
            caption = f"By layer, at equal length (matched pairs), {_title(one, several)}"
            name = "_".join([one.model] * several + [one.high, one.low, "by_layer"])
            yield _Drawing(caption, name, figures.controlled_curves(effects, *_sides(one, several)))


def _figures(directory: Path, drawings: Iterable[_Drawing]) -> list[FigureImage]:
    """Saves figures and their list, `figures.csv`; figures of an earlier list are removed."""
    folder, listing = directory / "figures", directory / "figures.csv"
    folder.mkdir(exist_ok=True)
    before, saved, images = _listed(listing), {}, []
    for drawing in drawings:
        name = _free(_file_name(drawing.name), saved)
        figures.save(drawing.figure, folder / name)
        images.append(FigureImage(drawing.caption, (folder / f"{name}.svg").read_bytes()))
        saved[name] = drawing.caption
    for name in before - saved.keys():
        for suffix in ("png", "svg"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    pd.DataFrame(saved.items(), columns=["name", "caption"]).to_csv(listing, index=False)
    return images


def _listed(listing: Path) -> set[str]:
    """The names of an earlier call's figures; none where the list cannot be read."""
    if not listing.exists():
        return set()
    try:
        return {_file_name(str(name)) for name in pd.read_csv(listing)["name"]}
    except (ValueError, KeyError):  # pandas' faults of a file are ValueErrors
        logging.warning("%s is damaged: figures of an earlier call may be left", listing)
        return set()


def _free(name: str, taken: Container[str]) -> str:
    """The name, with a number where it is taken."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


def _drawings(runs: Sequence[RunValues], pairs: list[tuple[str, str]]) -> Iterator[_Drawing]:
    """What describes the groups."""
    for run in runs:
        where = f"{run.name}: " if len(runs) > 1 else ""
        which = f"{run.name}_" if len(runs) > 1 else ""
        layers = run.layers
        for high, low in pairs:
            title, name = f"{where}{high} against {low}", f"{which}{high}_{low}"
            for statistic, word in tables.SPECTRA.items():
                drawn = figures.layer_curves(run, high, low, statistic)
                caption = f"{word} by layer, not controlled for length, {title}"
                yield _Drawing(caption, f"{name}_{statistic}", drawn)
            drawn = figures.rank_against_length(run, high, low)
            caption = f"Effective rank against response length, {title}"
            yield _Drawing(caption, f"{name}_length", drawn)
            some = [layers[0], layers[len(layers) // 2], layers[-1]]
            drawn = figures.spectra(run, (high, low), sorted(set(some)))
            if drawn:
                yield _Drawing(f"Singular values, {title}", f"{name}_spectra", drawn)
    if len(runs) > 1:
        for high, low in pairs:
            for statistic, word in tables.SPECTRA.items():
                drawn = figures.models(runs, high, low, statistic)
                yield _Drawing(
                    f"{word} by model, not controlled for length, {high} against {low}",
                    f"models_{high}_{low}_{statistic}",
                    drawn,
                )


def _examples(run: RunValues) -> pd.DataFrame:
    """What the page lists of examples: those of one run, group by group."""
    texts = read_table(run.directory, "examples", [*KEY, "instruction", "output"]).to_pandas()
    values = example_values(run)
    means = {name: values[name, ALL] for name in ("effective_rank", "nuclear_norm")}
    examples = run.examples.join(pd.DataFrame(means), on=KEY).merge(texts, on=KEY)
    order = {group: number for number, group in enumerate(run.groups)}
    return examples.sort_values(
        KEY, key=lambda column: column.map(order) if column.name == "group" else column
    )


def _not_used(examples: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """How many rows were not used, by these columns."""
    unused = examples[examples["status"] != "ok"]
    return unused.groupby(columns, sort=False).size().rename("rows").reset_index()


def _outliers(examples: pd.DataFrame) -> pd.DataFrame:
    """The rows farthest from their group's median logarithm, in median absolute deviations."""
    found = []
    for name in ("nuclear_norm", "effective_rank", "loss"):
        logs = examples[name].where(examples[name] > 0).map(np.log)
        groups = logs.groupby(examples["group"])
        apart = logs - groups.transform("median")
        typical = apart.abs().groupby(examples["group"]).transform("median")
        score = apart.abs() / typical.where(typical > 0)
        chosen = score[score > _OUTLYING].nlargest(_OUTLIERS).index
        why = [f"{name.replace('_', ' ')} {score[i]:.0f} deviations off" for i in chosen]
        found.append(examples.loc[chosen].assign(why=why))
    return pd.concat(found)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
