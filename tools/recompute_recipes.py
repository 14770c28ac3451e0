"""Computes the peers' numbers of docs/recipes.md anew, from the packages that are installed, and
writes them, with the versions, into the file: `python tools/recompute_recipes.py`.

It needs pandas, scipy, librosa, torchrl, TA-Lib and statsmodels, and is not part of CI.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pandas as pd
import scipy.signal
import talib
import torch
from statsmodels.tsa.api import SimpleExpSmoothing
from torchrl.objectives.value.functional import generalized_advantage_estimate

RECIPES = Path(__file__).parent.parent / "docs" / "recipes.md"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
LITERAL = re.compile(r"peer = torch\.tensor\(.*?, dtype=torch\.float64\)  # \S+ \S+", re.DOTALL)

SHORT = np.array([22.0, 34.0, 22.0, 18.0, 23.0])
PRICES = np.array([22.0, 34, 22, 18, 23, 34, 45, 40, 47, 46])


def gae() -> Any:
    value = torch.tensor([0.5, 0.4, 0.9, 0.1], dtype=torch.float64)[:, None]
    next_value = torch.tensor([0.4, 0.9, 0.1, 0.3], dtype=torch.float64)[:, None]
    reward = torch.tensor([1.0, 0.0, 2.0, -1.0], dtype=torch.float64)[:, None]
    done = torch.zeros(4, 1, dtype=torch.bool)
    return generalized_advantage_estimate(0.99, 0.95, value, next_value, reward, done, done)[0]


def damped() -> Any:
    y, alpha, delta = [0.0], 0.4, 0.7
    for x in (1.0, 2.0, 4.0, 8.0):
        y.append((1 - alpha * delta) * y[-1] + alpha * x)
    return y[1:]


def valid(*series: Any) -> Any:
    return np.concatenate([values[~np.isnan(values)] for values in series])


#: heading: the package, and its result
PEERS: dict[str, tuple[str, Any]] = {
    "pandas, adjust=True": ("pandas", pd.Series(SHORT).ewm(alpha=0.5).mean()),
    "pandas, min_periods": (
        "pandas",
        pd.Series(SHORT).ewm(span=3, adjust=False, min_periods=3).mean().dropna(),
    ),
    "scipy.signal.lfilter": (
        "scipy",
        scipy.signal.lfilter([1 / 3], [1, 1 / 3 - 1], [1.0, 2.0, 4.0, 8.0]),
    ),
    "scipy.signal.filtfilt": (
        "scipy",
        scipy.signal.filtfilt([0.3], [1, -0.7], [1.0, 2.0, 4.0, 8.0, 3.0], padtype=None),
    ),
    "PCEN as librosa": ("librosa", librosa.pcen(np.array([[1.0, 5, 3, 40, 2, 7]]))),
    "GAE as torchrl": ("torchrl", gae()),
    "DEMA and TEMA as TA-Lib": ("TA-Lib", valid(talib.DEMA(PRICES, 3), talib.TEMA(PRICES, 3))),
    "MACD as TA-Lib": ("TA-Lib", valid(*talib.MACD(PRICES, 2, 4, 3)[:2])),
    "RSI as TA-Lib": ("TA-Lib", valid(talib.RSI(PRICES, 3))),
    "Mega's damped EMA": ("formula", damped()),
    "Exponential smoothing as statsmodels": (
        "statsmodels",
        SimpleExpSmoothing(SHORT, initialization_method="known", initial_level=20.0)
        .fit(smoothing_level=0.3, optimized=False)
        .fittedvalues,
    ),
}


def literal(package: str, values: Any) -> str:
    """The line of the recipe that states the peer's numbers."""
    numbers = ", ".join(f"{value:.10g}" for value in np.asarray(values).ravel())
    release = "2022" if package == "formula" else version(package)
    return f"peer = torch.tensor(\n    [{numbers}], dtype=torch.float64)  # {package} {release}"


def main() -> None:
    text = RECIPES.read_text(encoding="utf-8")
    headings = [match[1] for match in SECTION.finditer(text) if LITERAL.search(match[2])]
    if set(headings) != set(PEERS):
        raise SystemExit(f"recipes and peers differ: {sorted(set(headings) ^ set(PEERS))}")

    def renewed(match: re.Match[str]) -> str:
        if match[1] not in PEERS:
            return match[0]
        return LITERAL.sub(lambda _: literal(*PEERS[match[1]]), match[0])

    RECIPES.write_text(SECTION.sub(renewed, text), encoding="utf-8")


if __name__ == "__main__":
    main()
