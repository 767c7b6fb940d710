"""The training run: it has a budget in minutes, at whose end the learning rate is zero and the model is complete.

It writes checkpoints, a log and the loss curve into the work folder. A later run has a new clock, and continues the
token count and the log of the run before.
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

BATCH = 8192  # tokens per step
MICRO = 2048  # tokens per forward pass
LONG = 2048  # tokens of a long row: all rows at the end of a first run, one in `long_each` passes in a later run
LONG_FROM = 0.87  # share of the budget after which all rows of a first run are long
WARMUP = 0.02  # share of the budget
MUON_RATE, ADAM_RATE = 0.02, 0.004
SAVE_EVERY = 300  # seconds
SEED = 1
SET_BY_CALLER = torch.tensor([PREFIX, SUFFIX, MIDDLE])
KEPT = ("seconds", "step", "position", "tokens", "peak", "long_each", "middle_weight", "log")

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Run:
    """The state of a training run, which a checkpoint stores."""

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
        self.long_each = 0  # one in this many passes has a long row; 0: only the passes at the end
        self.middle_weight = 1.0  # loss weight of a token of a middle, including its end
        self.log: list[dict[str, float]] = []
        self.stopped = False

    def save(self, path: Path) -> None:
        """Write the checkpoint; a crash during the write keeps the former one."""
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
    """Train, or continue from the checkpoint in the work folder, until the budget is used."""
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
    """The loss weight of each token: `middle` in a middle, and 0 for infill tokens, which clients set.

    In the first two runs all tokens have the weight 1.
    """
    weights = torch.where(middles(stream), middle, 1.0)
    return weights.masked_fill(torch.isin(stream, SET_BY_CALLER), 0.0) if middle != 1 else weights


def middles(stream: Tensor) -> Tensor:
    """A mask of the tokens that belong to the middle of an infill document, including the END after it."""
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
    """Draw the loss over tokens, with a vertical line at the beginning of each run."""
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
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)", ylim=(0, 5))
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def runs(log: list[dict[str, float]]) -> list[list[dict[str, float]]]:
    """Split the log at each restart of the clock."""
    found: list[list[dict[str, float]]] = []
    for entry in log:
        if not found or entry["seconds"] < found[-1][-1]["seconds"]:
            found.append([])
        found[-1].append(entry)
    return found
