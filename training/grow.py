"""A deeper model from a trained one, which at first computes the very same.

Knows the model and the run. A new block is a copy of the block before it whose output projections are zero: it adds
nothing to its input, yet has trained queries, keys, values and features to start from.
"""

from dataclasses import replace

import torch

from training.model import Llama
from training.train import Run

TOLERANCE = 1e-4


def grow(old: Run, layers: int, peak: float) -> Run:
    """A run of its own for the deeper model: new optimizers, its clock at zero, the log and tokens so far."""
    new = Run(replace(old.model.shape, layers=layers))
    new.model.load_state_dict(_deeper(old.model, layers))
    new.log, new.tokens, new.peak = old.log, old.tokens, peak
    new.mixed = True
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
    """The greatest difference of any logit."""
    return (old(torch.tensor([ids])) - new(torch.tensor([ids]))).abs().max().item()
