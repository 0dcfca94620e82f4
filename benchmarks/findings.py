"""The numbers of docs/findings.md that need no model: of the paper's tables and released subsets.

  python -m benchmarks.findings --data=DIR

DIR holds wizardlm/METRIC_{high,low}.json and reasoning/{high_s1,low_gsm8k,gsm8k_fast}.json, as
the paper released them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags

from gradjax.checkpoints.resolve import load_tokenizer, resolve
from gradjax.cli.app import start
from gradjax.report.compare import auroc
from gradjax.report.length import standard_difference
from gradjax.report.matching import Rows, match
from gradjax.report.published import published_table
from gradjax.score.judge import parse_difficulty, parse_tags
from gradjax.storage.results import text_hashes

METRICS = {"difficulty": "diff", "instag": "instag", "reward": "reward", "ifd_gpt2": "ifd_gpt2"}
PAIRS = {f"wizardlm {m}": (f"wizardlm/{m}_high", f"wizardlm/{m}_low") for m in METRICS} | {
    "s1.1 : GSM8K": ("reasoning/high_s1", "reasoning/low_gsm8k"),
    "GSM8K : bare answers": ("reasoning/low_gsm8k", "reasoning/gsm8k_fast"),
}
LIMIT = 4096  # tokens, the paper's

_AGREEMENTS = ("equal", "only gradjax", "only stored", "unequal")

flags.DEFINE_string("data", None, "the directory of the released subsets", required=True)


def read(directory: Path, name: str) -> pd.DataFrame:
    """A subset's rows, with the lengths of instruction and response in characters."""
    rows = pd.DataFrame(json.loads((directory / f"{name}.json").read_text()))
    return rows.assign(
        characters=rows["output"].str.len(), prompt_characters=rows["instruction"].str.len()
    )


def claims() -> pd.DataFrame:
    """In how many cells of the published tables each claim of the paper holds."""
    # The paper prints some experiments twice, not always with the same digits: the first counts.
    cell = ["model", "experiment", "statistic", "projection"]
    spectra = published_table("spectra").drop_duplicates(cell)
    gap = spectra["gap"]  # as printed: of numbers that were rounded less
    spectra = spectra.assign(larger=gap > 0, equal=gap == 0, smaller=gap < 0)
    keys = ["statistic", "dataset", "metric"]
    return spectra.groupby(keys, sort=False)[["larger", "equal", "smaller"]].sum()


def other_claims() -> pd.DataFrame:
    """Cells in which s1.1 has a larger effective rank than every instruction subset; cosines."""
    spectra = published_table("spectra")
    ranks = spectra[spectra["statistic"] == "effective_rank"]
    instruction = ranks[ranks["dataset"].isin(["wizardlm", "magpie", "openhermes"])]
    cell = ["model", "projection"]
    most = instruction.groupby(cell)[["high", "low"]].max().max(axis=1)
    s1 = ranks[ranks["dataset"] == "reasoning"].groupby(cell)["high"].min()
    cosines = published_table("similarity")[["high", "low"]].abs().to_numpy().max()
    return pd.DataFrame(
        {
            "s1.1 largest": [(s1 > most.loc[s1.index]).sum()],
            "of": [len(s1)],
            "largest |cosine|": [cosines],
        }
    )


def lengths(directory: Path) -> pd.DataFrame:
    """AUROC of response and prompt length between the two sides of every pair."""
    found = {}
    for name, (high, low) in PAIRS.items():
        sides = read(directory, high), read(directory, low)
        found[name] = {
            column: auroc(*(side[column].to_numpy(float) for side in sides))
            for column in ("characters", "prompt_characters")
        }
    return pd.DataFrame.from_dict(found, orient="index")


def correlations(directory: Path) -> pd.DataFrame:
    """Spearman's ρ of each metric with length, over the different rows of all subsets."""
    names = [name for m in METRICS for name in PAIRS[f"wizardlm {m}"]]
    rows = pd.concat([read(directory, name) for name in names])
    rows = rows.drop_duplicates(["instruction", "output"])
    found = {}
    for column in METRICS.values():
        known = rows[rows[column].notna()]
        result: dict[str, float] = {"rows": len(known)}
        for length in ("characters", "prompt_characters"):
            result[length] = known[column].corr(known[length], method="spearman")
        found[column] = result
    return pd.DataFrame.from_dict(found, orient="index")


def ties(directory: Path) -> pd.DataFrame:
    """The worst value of every selection, and how many of its rows have just that value."""
    found = {}
    for metric, column in METRICS.items():
        for side, worst in (("high", "min"), ("low", "max")):
            values = read(directory, f"wizardlm/{metric}_{side}")[column].dropna()
            cutoff = values.agg(worst)
            at = int((values == cutoff).sum())
            found[f"{metric} {side}"] = {"cutoff": cutoff, "rows at it": at, "rows": len(values)}
    return pd.DataFrame.from_dict(found, orient="index")


def pairs(directory: Path) -> pd.DataFrame:
    """Pairs of rows of like response length, by uncut tokens of the embedded tokenizer."""
    tokenizer = load_tokenizer(resolve("demo").directory)
    found = {}
    for name, names in PAIRS.items():
        sides = []
        for rows in (read(directory, one) for one in names):
            counts = [
                [len(tokenizer(text, verbose=False).input_ids) for text in rows[column]]
                for column in ("output", "instruction")
            ]
            hashes = text_hashes(rows["instruction"], rows["output"])
            columns = (hashes[name].to_numpy() for name in ("cluster", "text"))
            sides.append(Rows(np.array(counts[0]), np.array(counts[1]), *columns))
        matched = match(sides[0], sides[1])
        high, low = (
            units.means(rows.logs)[matched.pairs[:, i], 1]
            for i, (units, rows) in enumerate(zip(matched.units, sides, strict=True))
        )
        apart = standard_difference(high, low) if len(high) else np.nan
        found[name] = {
            "prompts": min(len(units.clusters) for units in matched.units),
            "pairs": len(matched.pairs),
            "of one prompt": matched.paired,
            "prompts, standard deviations apart": apart,
        }
    return pd.DataFrame.from_dict(found, orient="index")


def cut(directory: Path) -> pd.DataFrame:
    """How many rows have more than 4,096 tokens, by the embedded tokenizer and rules of thumb."""
    tokenizer = load_tokenizer(resolve("demo").directory)
    found = {}
    for name in sorted({name for pair in PAIRS.values() for name in pair}):
        rows = read(directory, name)
        texts = rows["instruction"] + "\n" + rows["output"]
        tokens = np.array([len(tokenizer(text, verbose=False).input_ids) for text in texts])
        characters = texts.str.len()
        found[name] = {
            "embedded tokenizer": int((tokens > LIMIT).sum()),
            "characters / 3": int((characters > 3 * LIMIT).sum()),
            "characters / 4": int((characters > 4 * LIMIT).sum()),
            "rows": len(rows),
        }
    return pd.DataFrame.from_dict(found, orient="index")


def judged(directory: Path) -> pd.DataFrame:
    """The stored raw answers of the judge as gradjax parses them, against the stored numbers."""
    found: dict[str, dict[str, Any]] = {}
    for raw, column, parse in (
        ("raw_diff", "diff", parse_difficulty),
        ("raw_instag", "instag", lambda answer: len(parse_tags(answer) or []) or None),
    ):
        counts: dict[str, int] = dict.fromkeys(_AGREEMENTS, 0)
        for name in (name for m in METRICS for name in PAIRS[f"wizardlm {m}"]):
            for row in read(directory, name).to_dict("records"):
                ours, stored = parse(row[raw]), row[column]
                counts[_agreement(ours, None if pd.isna(stored) else stored)] += 1
        found[column] = counts
    return pd.DataFrame.from_dict(found, orient="index")


def _agreement(ours: float | None, stored: float | None) -> str:
    if ours == stored:
        return "equal"
    if stored is None:
        return "only gradjax"
    return "only stored" if ours is None else "unequal"


def main(_: list[str]) -> None:
    """Prints every table."""
    directory = Path(flags.FLAGS.data)
    print(f"Cells of the paper's tables, high against low\n{claims().to_string()}\n")
    print(f"{(other_claims.__doc__ or '').strip()}\n{other_claims().to_string(index=False)}\n")
    for work in (lengths, pairs, correlations, ties, cut, judged):
        title = (work.__doc__ or "").strip().rstrip(".")
        print(f"{title}\n{work(directory).to_string(float_format='{:.3f}'.format)}\n")


if __name__ == "__main__":
    start(main)
