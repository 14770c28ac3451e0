"""Computes the peers' numbers of docs/recipes.md anew, from the packages that are installed, and
writes them, with the versions, into the file: `python tools/recompute_recipes.py`.

It needs the peers, and is not part of CI:

    pip install pandas polars scipy librosa torchrl TA-Lib statsmodels minGRU-pytorch \
        'transformers<5'
"""

from __future__ import annotations

import datetime
import re
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any

import librosa
import numpy as np
import pandas as pd
import polars as pl
import scipy.signal
import talib
import torch
from minGRU_pytorch import minGRU
from statsmodels.tsa.api import SimpleExpSmoothing
from torchrl.objectives.value.functional import generalized_advantage_estimate
from transformers.models.deprecated.mega.configuration_mega import MegaConfig
from transformers.models.deprecated.mega.modeling_mega import MegaMultiDimensionDampedEma

RECIPES = Path(__file__).parent.parent / "docs" / "recipes.md"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
LITERAL = re.compile(
    r"peer = torch\.tensor\(.*?,\s+dtype=torch\.float64,?\s*\)  # \S+ \S+", re.DOTALL
)

SHORT = np.array([22.0, 34.0, 22.0, 18.0, 23.0])
PRICES = np.array([22.0, 34, 22, 18, 23, 34, 45, 40, 47, 46])
DAYS = [datetime.date(2026, 1, 1) + datetime.timedelta(days=n) for n in (0, 2, 9, 16, 17)]
GAPS = pd.Series([np.nan, 22.0, np.nan, 34, 22, np.nan, np.nan, 18])


def gae() -> Any:
    value = torch.tensor([0.5, 0.4, 0.9, 0.1], dtype=torch.float64)[:, None]
    next_value = torch.tensor([0.4, 0.9, 0.1, 0.3], dtype=torch.float64)[:, None]
    reward = torch.tensor([1.0, 0.0, 2.0, -1.0], dtype=torch.float64)[:, None]
    done = torch.zeros(4, 1, dtype=torch.bool)
    return generalized_advantage_estimate(0.99, 0.95, value, next_value, reward, done, done)[0]


def damped() -> Any:
    """The kernel of Mega's layer with one channel of one dimension."""
    layer = MegaMultiDimensionDampedEma(
        MegaConfig(hidden_size=1, ema_projection_size=1, bidirectional=False)
    ).double()
    with torch.no_grad():
        layer.damping_factor.fill_(0.4).logit_()
        layer.decay_factor.fill_(0.7).logit_()
        layer.ema_expansion_matrix.fill_(1.0)
        layer.kernel_projection_matrix.fill_(1.0)
        kernel = layer.get_ema_kernel(4).flatten()  # its own convolution is in float32
        return np.convolve(kernel.numpy(), [1.0, 2.0, 4.0, 8.0])[:4]


def gated() -> Any:
    """minGRU of one channel, whose input is the candidate's and its negative half the gate's."""
    layer = minGRU(1).double()
    with torch.no_grad():
        layer.to_hidden_and_gate.weight.copy_(torch.tensor([[1.0], [-0.5]]))
        return layer(torch.tensor([[[1.0], [-2.0], [4.0], [0.5]]], dtype=torch.float64))


def valid(*series: Any) -> Any:
    return np.concatenate([values[~np.isnan(values)] for values in series])


#: heading: the package, and its result
PEERS: dict[str, tuple[str, Any]] = {
    "pandas, adjust=True": ("pandas", pd.Series(SHORT).ewm(alpha=0.5).mean()),
    "pandas, times": (
        "pandas",
        np.concatenate(
            [
                pd.Series(SHORT).ewm(halflife="4D", times=pd.to_datetime(DAYS), adjust=how).mean()
                for how in (False, True)
            ]
        ),
    ),
    "pandas, missing values": (
        "pandas",
        valid(
            GAPS.ewm(alpha=0.5, adjust=False, ignore_na=True).mean().to_numpy(),
            GAPS.ewm(alpha=0.5).mean().to_numpy(),
        ),
    ),
    "Segments, as pandas groupby": (
        "pandas",
        pd.Series(PRICES[:7]).groupby([0, 0, 0, 1, 1, 1, 2]).ewm(alpha=0.5, adjust=False).mean(),
    ),
    "polars, ewm_mean_by": (
        "polars",
        pl.Series(SHORT).ewm_mean_by(pl.Series(DAYS), half_life="4d").to_numpy(),
    ),
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
    "Mega's damped EMA": ("transformers", damped()),
    "minGRU": ("minGRU-pytorch", gated()),
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
    line = f"[{numbers}], dtype=torch.float64"
    comment = f"  # {package} {version(package)}"
    if len(f"peer = torch.tensor({line}){comment}") <= 100:
        return f"peer = torch.tensor({line}){comment}"
    if len(f"    {line}") <= 100:
        return f"peer = torch.tensor(\n    {line}\n){comment}"
    if len(numbers) > 92:
        numbers = fill(numbers, 92, initial_indent="\n" + 8 * " ", subsequent_indent=8 * " ")
        numbers += ",\n    "
    return f"peer = torch.tensor(\n    [{numbers}],\n    dtype=torch.float64,\n){comment}"


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
