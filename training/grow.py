"""Starts a further run after a finished one: of a deeper model with the same outputs at first, or of the same model.

A new block is a copy of the block before it whose output projections are zero. It adds nothing to its input, but starts
with trained queries, keys, values and features.
"""

from dataclasses import replace

import torch

from training.model import Llama, Shape
from training.train import Run

TOLERANCE = 1e-4


def again(old: Run, peak: float) -> Run:
    """A further run of the same model, with a higher loss weight of middles."""
    return _after(old, old.model.shape, old.model.state_dict(), peak, long_each=8, middle_weight=5.0)


def grow(old: Run, layers: int, peak: float) -> Run:
    """A new run of the deeper model: new optimizers and clock, with the log and token count of the old run."""
    shape = replace(old.model.shape, layers=layers)
    return _after(old, shape, _deeper(old.model, layers), peak, long_each=4, middle_weight=1.0)


def _after(
    old: Run, shape: Shape, weights: dict[str, torch.Tensor], peak: float, *, long_each: int, middle_weight: float
) -> Run:
    new = Run(shape)
    new.model.load_state_dict(weights)
    new.log, new.tokens, new.peak = old.log, old.tokens, peak
    new.long_each, new.middle_weight = long_each, middle_weight
    return new


def _deeper(model: Llama, layers: int) -> dict[str, torch.Tensor]:
    before = model.state_dict()
    after = {name: weight for name, weight in before.items() if not name.startswith("blocks.")}
    sources = [layer * model.shape.layers // layers for layer in range(layers)]
    for layer, source in enumerate(sources):
        copied = layer > 0 and sources[layer - 1] == source
        for name in model.blocks[source].state_dict():
            weight = before[f"blocks.{source}.{name}"]
            silent = copied and name in ("attention.out.weight", "feed_forward.down.weight")
            after[f"blocks.{layer}.{name}"] = torch.zeros_like(weight) if silent else weight.clone()
    return after


@torch.no_grad()
def difference(old: Llama, new: Llama, ids: list[int]) -> float:
    """The greatest absolute difference between the logits of the models."""
    return (old(torch.tensor([ids])) - new(torch.tensor([ids]))).abs().max().item()
