"""Smooth a series that is larger than memory: chunk by chunk, and on from where it was killed.

    python examples/stream.py --make 500 series.f32    # a noisy series of 500 million samples, 2 GB
    python examples/stream.py series.f32 smooth.f32 --alpha 1e-4 --memory 256

Both files hold float32 samples and nothing else. They are read and written through numpy.memmap, a
window at a time; what goes from chunk to chunk is one number, the state that `ema` returns. After
each chunk the output is flushed to disk and a small file beside it, `smooth.f32.progress`, is
replaced as a whole: position and state. So a run that is killed at any moment, by `kill -9` or by a
power cut, goes on at its last full chunk when the same command is given again, and the result is
the same to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import ema_ext

BYTES = 4  # of a sample
MIB = 2**20


def smooth(source: Path, target: Path, alpha: float, chunk: int, pause: float = 0.0) -> int:
    """Write the average of source's samples to target; returns how many had been done before.

    `chunk` is the number of samples in memory at a time. `pause` makes each chunk take so many
    seconds longer, for whoever wants to see a run killed.
    """
    length = source.stat().st_size // BYTES
    progress = target.with_name(target.name + ".progress")
    task = {"source": str(source.resolve()), "length": length, "alpha": alpha, "chunk": chunk}
    begun, state = read_progress(progress, task)
    if not begun:
        with target.open("wb") as file:
            file.truncate(length * BYTES)
    bar = tqdm(total=length, initial=begun, unit="sample", unit_scale=True, desc=target.name)
    for start in range(begun, length, chunk):
        stop = min(start + chunk, length)
        y, next_state = ema_ext.ema(
            torch.from_numpy(np.array(window(source, start, stop, "r"))),
            alpha,
            initial_state=state,
            return_state=True,
        )
        state = float(next_state)
        out = window(target, start, stop, "r+")
        out[:] = y.numpy()
        out.flush()
        write_progress(progress, task | {"position": stop, "state": state})
        bar.update(stop - start)
        time.sleep(pause)
    bar.close()
    progress.unlink(missing_ok=True)
    return begun


def window(path: Path, start: int, stop: int, mode: str) -> np.memmap:
    """Samples start to stop; its pages leave the process with it."""
    return np.memmap(path, np.float32, mode, offset=start * BYTES, shape=(stop - start,))


def read_progress(path: Path, task: dict[str, object]) -> tuple[int, float | None]:
    """The position and the state to go on from; (0, None) where nothing has been done.

    Raises ValueError if what has been done was another task.
    """
    if not path.exists():
        return 0, None
    found = json.loads(path.read_text())
    position, state = found.pop("position"), found.pop("state")
    if found != task:
        raise ValueError(f"{path} belongs to {found}, not to {task}: remove it to begin anew")
    return position, state


def write_progress(path: Path, progress: dict[str, object]) -> None:
    """Replace the file as a whole: at any moment either the old one or the new one is there."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        json.dump(progress, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def make(path: Path, length: int, chunk: int) -> None:
    """A random walk in noise."""
    generator, level = np.random.default_rng(0), 0.0
    with path.open("wb") as file:
        for start in tqdm(range(0, length, chunk), desc=path.name):
            count = min(chunk, length - start)
            walk = level + np.cumsum(generator.normal(0, 0.01, count))
            level = walk[-1]
            (walk + generator.normal(0, 1, count)).astype(np.float32).tofile(file)


def peak_bytes() -> int:
    """The most memory that this process has held, its share of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="file of float32 samples")
    parser.add_argument("target", type=Path, nargs="?", help="file to write the average to")
    parser.add_argument("--alpha", type=float, default=1e-4, help="weight of a new sample")
    parser.add_argument("--memory", type=int, default=256, help="MiB for samples, at most")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait after each chunk")
    parser.add_argument("--make", type=float, help="write a series of so many million samples")
    options = parser.parse_args()

    # At once there are: the window of the source, its copy, y, and the window of the target.
    chunk = max(1, options.memory * MIB // (4 * BYTES))
    if options.make:
        make(options.source, int(options.make * 1e6), 2**20)
        return
    if options.target is None:
        parser.error("target is missing")
    before, began = peak_bytes(), time.perf_counter()
    done = smooth(options.source, options.target, options.alpha, chunk, options.pause)
    seconds = time.perf_counter() - began
    size = options.source.stat().st_size
    if done:
        print(f"went on at sample {done:,}")
    print(
        f"{size / MIB:,.0f} MiB in {seconds:.1f} s; peak of memory {peak_bytes() / MIB:,.0f} MiB, "
        f"of which {before / MIB:,.0f} were there before the first sample"
    )


if __name__ == "__main__":
    main()
