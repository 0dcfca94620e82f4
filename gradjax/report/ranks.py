"""How far two groups' ranks lie apart. Imports nothing that the extra `report` installs."""

import numpy as np
from scipy import stats


def auroc(high: np.ndarray, low: np.ndarray) -> float:
    """P(high > low) + P(high = low) / 2."""
    return float(stats.mannwhitneyu(high, low).statistic / (len(high) * len(low)))
