"""The training run: one budget of minutes, after which the learning rate is zero and the model done.

Knows the rows, the model and the optimizers; writes checkpoints, a log and its curve into the work folder.
A later run has a clock of its own; tokens and log go on from those of the run before.
"""

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.model import Llama, Shape
from training.muon import Muon
from training.rows import END, MIDDLE, PREFIX, ROW, SUFFIX

BATCH = 8192  # tokens a step
MICRO = 2048  # tokens a forward pass
LONG = 2048  # length of long rows: all at the end of a first run, every so many passes throughout a later one
LONG_FROM = 0.87  # share of the budget after which all rows of a first run are long
WARMUP = 0.02  # share of the budget
MUON_RATE, ADAM_RATE = 0.02, 0.004
SAVE_EVERY = 300  # seconds
SEED = 1
SET_BY_CALLER = torch.tensor([PREFIX, SUFFIX, MIDDLE])
KEPT = ("seconds", "step", "position", "tokens", "peak", "long_each", "middle_weight", "log")

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Run:
    """A model under training and how far it has come; what a checkpoint holds."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(SEED)
        self.model = Llama(shape)
        matrices = [weight for weight in self.model.blocks.parameters() if weight.ndim == 2]
        inner = {id(weight) for weight in matrices}
        others = [weight for weight in self.model.parameters() if id(weight) not in inner]
        self.optimizers = [
            Muon(matrices, lr=MUON_RATE, decay=0.05),
            torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.rates = [MUON_RATE, ADAM_RATE]
        self.seconds = 0.0
        self.step = 0
        self.position = 0  # in the token stream
        self.tokens = 0
        self.peak = 1.0  # factor of the learning rates
        self.long_each = 0  # every so many passes have a long row; 0: those of the end alone
        self.middle_weight = 1.0  # of a token of a middle in the loss, its end included
        self.log: list[dict[str, float]] = []
        self.stopped = False

    def save(self, path: Path) -> None:
        """Write the checkpoint; a crash while writing leaves the former one."""
        state = {name: getattr(self, name) for name in KEPT}
        state["shape"] = asdict(self.model.shape)
        state["model"] = self.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    @classmethod
    def load(cls, path: Path) -> "Run":
        state = torch.load(path, weights_only=True)
        run = cls(Shape(**state["shape"]))
        run.model.load_state_dict(state["model"])
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in KEPT:
            setattr(run, name, state.get(name, getattr(run, name)))
        return run


def rate(progress: float) -> float:
    """Share of the peak learning rate: a short rise, then a straight line to zero."""
    return min(progress / WARMUP, (1 - progress) / (1 - WARMUP))


def train(work: Path, minutes: float, shape: Shape) -> None:
    """Train, or go on from the checkpoint in the work folder, until the minutes are spent."""
    torch.set_num_threads(2)
    stream = torch.from_numpy(np.load(work / "stream.npy").astype(np.int64))
    checkpoint = work / "checkpoint.pt"
    run = Run.load(checkpoint) if checkpoint.exists() else Run(shape)
    size = sum(weight.numel() for weight in run.model.parameters())
    print(f"{size:,} parameters, {len(stream):,} tokens in the stream", flush=True)
    weights = weigh(stream, run.middle_weight)
    loss_of = torch.compile(run.model.loss, dynamic=False)
    before, last, saved = run.seconds, time.monotonic(), time.monotonic()
    start = last
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stopped", True))
    while not run.stopped:
        run.seconds = before + time.monotonic() - start
        progress = run.seconds / (60 * minutes)
        if progress >= 1:
            break
        loss = _step(run, loss_of, stream, weights, progress)
        now = time.monotonic()
        run.log.append({"seconds": round(run.seconds, 1), "tokens": run.tokens, "loss": round(loss, 4)})
        if run.step % 10 == 0:
            left = minutes - run.seconds / 60
            print(
                f"step {run.step}  loss {loss:.3f}  {BATCH / (now - last):.0f} tokens/s  "
                f"{run.tokens / 1e6:.2f}M tokens  {left:.1f} min left",
                flush=True,
            )
        last = now
        if now - saved > SAVE_EVERY:
            run.save(checkpoint)
            saved = now
    run.save(checkpoint)
    (work / "log.json").write_text(json.dumps(run.log))
    draw(run.log, work / "loss.png")


def weigh(stream: Tensor, middle: float) -> Tensor:
    """The weight of every token in the loss: `middle` in a middle, and nothing where a caller sets the token.

    Nobody asks the model where a gap begins. A first run's and a second run's loss has all tokens alike.
    """
    weights = torch.where(middles(stream), middle, 1.0)
    return weights.masked_fill(torch.isin(stream, SET_BY_CALLER), 0.0) if middle != 1 else weights


def middles(stream: Tensor) -> Tensor:
    """Which tokens belong to the middle of an infill document, the END behind it included."""
    at = torch.arange(len(stream))
    begun = torch.where(stream == MIDDLE, at, -1).cummax(0).values
    ended = torch.where(stream == END, at, -1).cummax(0).values
    return (begun > ended.roll(1)) & (begun < at) & (at > 0)


def _step(run: Run, loss_of: Loss, stream: Tensor, weights: Tensor, progress: float) -> float:
    """One batch through the model and one step of both optimizers; returns the mean loss without weights."""
    total = 0.0
    for turn in range(BATCH // MICRO):
        number = run.step * (BATCH // MICRO) + turn
        length = LONG if (number % run.long_each == 0 if run.long_each else progress >= LONG_FROM) else ROW
        rows = MICRO // length
        if run.position + MICRO >= len(stream):
            run.position = 0
        ids = slice(run.position, run.position + MICRO)
        targets = slice(run.position + 1, run.position + MICRO + 1)
        parts = stream[ids], stream[targets], weights[targets]
        loss, plain = loss_of(*(part.view(rows, length) for part in parts))
        (loss * MICRO / BATCH).backward()
        total += plain.item() * MICRO / BATCH
        run.position += MICRO
        run.tokens += MICRO
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer, peak in zip(run.optimizers, run.rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * run.peak * rate(progress)
        optimizer.step()
        optimizer.zero_grad()
    run.step += 1
    if not math.isfinite(total):
        raise ArithmeticError(f"the loss is {total} at step {run.step}")
    return total


def draw(log: list[dict[str, float]], path: Path) -> None:
    """The loss over tokens, as a picture; a line where a run begins after another."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for run in runs(log):
        tokens = [entry["tokens"] / 1e6 for entry in run]
        losses = [entry["loss"] for entry in run]
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.axvline(tokens[0], color="#888888", linewidth=0.6)
        axes.plot(tokens, losses, color="#cccccc", linewidth=0.6)
        axes.plot(tokens[width - 1 :], smooth, color="#204a87")
    axes.set(xlabel="million tokens", ylabel="loss (nats a token)", ylim=(0, 5))
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def runs(log: list[dict[str, float]]) -> list[list[dict[str, float]]]:
    """Cut the log where the clock starts anew."""
    found: list[list[dict[str, float]]] = []
    for entry in log:
        if not found or entry["seconds"] < found[-1][-1]["seconds"]:
            found.append([])
        found[-1].append(entry)
    return found
