"""Learn how much to smooth: one alpha per channel, trained by gradient descent through ema_ext.ema.

    python examples/learn_smoothing.py --out docs/img/learn_smoothing.png

Simple exponential smoothing forecasts the next value of a series by its exponential moving average
so far. How much to smooth depends on the series: yesterday's temperature says much about today's,
yesterday's rain little. Four years of daily weather in Seattle (vega_datasets, from NOAA) show it:
alpha, one for each of four channels, is trained with Adam on the first three years; the error is
that of the fourth, beside a fixed alpha of 2/22 and the best single alpha for all channels,
trained the same way.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn
from tqdm import trange
from vega_datasets import data

import ema_ext

CHANNELS = {
    "temp_max": "highest temperature (°C)",
    "temp_min": "lowest temperature (°C)",
    "wind": "wind speed (m/s)",
    "precipitation": "precipitation (mm)",
}
FIXED_ALPHA = 2 / 22
HELD_OUT = 365  # days
WARM_UP = 30  # days, before which a forecast hangs on the first value


class Smoothing(nn.Module):
    """Forecasts x[:, n+1] by the moving average of x[:, :n+1]; alpha, in (0, 1), is learned.

    x and the forecast are of shape (channels, days).
    """

    def __init__(self, alphas: int, start: float = FIXED_ALPHA) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.logit(torch.full((alphas, 1), start)))

    @property
    def alpha(self) -> Tensor:
        return torch.sigmoid(self.logit)

    def forward(self, x: Tensor) -> Tensor:
        return ema_ext.ema(x, self.alpha)


def weather() -> Tensor:
    """Daily weather in Seattle, 2012 to 2015: (channels, days)."""
    table = data.seattle_weather()
    return torch.tensor(table[list(CHANNELS)].to_numpy(), dtype=torch.float32).T.contiguous()


def squared_errors(model: Smoothing, x: Tensor) -> Tensor:
    """Of the forecast for each day but the first: (channels, days - 1)."""
    return (model(x)[:, :-1] - x[:, 1:]).square()


def train(model: Smoothing, x: Tensor, steps: int, name: str) -> Tensor:
    """Fit alpha; returns it after every step, of shape (steps, alphas)."""
    scale = x.var(dim=1, keepdim=True)  # so that each channel counts alike
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    path = []
    for _ in trange(steps, desc=name):
        optimizer.zero_grad()
        loss = (squared_errors(model, x)[:, WARM_UP:] / scale).mean()
        loss.backward()
        optimizer.step()
        path.append(model.alpha.detach().flatten())
    return torch.stack(path)


@torch.no_grad()
def held_out_error(model: Smoothing, x: Tensor) -> Tensor:
    """Root mean squared error of each channel over the last year."""
    return squared_errors(model, x)[:, -HELD_OUT:].mean(dim=1).sqrt()


@torch.no_grad()
def draw(x: Tensor, fixed: Smoothing, learned: Smoothing, path: Tensor, out: Path) -> None:
    """The last 90 days with both forecasts, and alpha as it was learned."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colors = ["#d55e00", "#0072b2", "#009e73", "#cc79a7"]
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplot_mosaic([[name, "alpha"] for name in CHANNELS], width_ratios=[2, 1])
    days = torch.arange(-90, 0)
    for i, (name, label) in enumerate(CHANNELS.items()):
        axes[name].plot(days, x[i, -90:], ".", color="#888888", label="measured")
        for model, color, kind in ((fixed, "#222222", "fixed"), (learned, colors[i], "learned")):
            alpha = float(model.alpha[min(i, len(model.alpha) - 1)])
            text = f"forecast, {kind} alpha {alpha:.2f}"
            style = "--" if kind == "fixed" else "-"
            axes[name].plot(days, model(x)[i, -91:-1], style, color=color, label=text)
        axes[name].set_title(label, loc="left", fontsize=10)
        axes[name].legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
        low, high = axes[name].get_ylim()
        axes[name].set_ylim(low, high + 0.25 * (high - low))  # room for the legend
        axes["alpha"].plot(path[:, i], color=colors[i])
        end = (len(path), float(path[-1, i]))
        side = "top" if name in ("temp_max", "precipitation") else "bottom"
        text = label.split(" (")[0]
        axes["alpha"].annotate(text, end, color=colors[i], ha="right", va=side)
    axes["precipitation"].set_xlabel("day, counted from the end of the held-out year")
    axes["alpha"].axhline(FIXED_ALPHA, color="#222222", linestyle="--", linewidth=1)
    axes["alpha"].set(xlabel="training step", ylim=(0, 1))
    axes["alpha"].set_title("alpha of each channel as it is learned", loc="left", fontsize=10)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("learn_smoothing.png"))
    parser.add_argument("--steps", type=int, default=800, help="steps of Adam")
    options = parser.parse_args()

    began = time.perf_counter()
    x = weather()
    past = x[:, :-HELD_OUT]
    fixed, shared, learned = Smoothing(1), Smoothing(1), Smoothing(len(CHANNELS))
    train(shared, past, options.steps, "one alpha for all")
    path = train(learned, past, options.steps, "alpha per channel")

    models = (fixed, shared, learned)
    errors = [held_out_error(model, x) for model in models]
    heading = "root mean squared error, held-out year"
    print(f"\n{heading:<46}{'fixed':>9}{'shared':>9}{'learned':>9}")
    for label, alpha, *row in zip(CHANNELS.values(), learned.alpha.flatten(), *errors, strict=True):
        print(f"{label:<28}learned alpha {alpha:.2f}" + "".join(f"{e:9.3f}" for e in row))
    gains = [1 - float((errors[2] / other).mean()) for other in errors[:2]]
    print(
        f"alpha: fixed {fixed.alpha.item():.2f}, shared by all channels {shared.alpha.item():.2f}"
    )
    print(f"learned: {gains[0]:.1%} below fixed and {gains[1]:.1%} below shared, channels averaged")
    draw(x, fixed, learned, path, options.out)
    print(f"{time.perf_counter() - began:.0f} s; plot in {options.out}")


if __name__ == "__main__":
    main()
