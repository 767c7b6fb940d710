"""`python -m training STEP`: the steps of the recipe, in the order of the README.

Each step imports the modules that it needs. Only this module imports all others.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from training.data import Document
    from training.model import Llama

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "src" / "afterword" / "models" / "builtin" / "afterword-tiny.gguf"
MASTER = "afterword-tiny-f32.gguf"
FIRST = "checkpoint-first.pt"
SECOND = "checkpoint-second.pt"


def prepare(options: argparse.Namespace) -> None:
    """Read the corpus, hold documents out, train the tokenizer, write the token stream."""
    from training import data, rows, tokenizer

    options.work.mkdir(parents=True, exist_ok=True)
    documents = list(data.documents(options.corpus))
    kept = [document for document in documents if not document.held_out]
    held = [document for document in documents if document.held_out]
    (options.work / "held_out.json").write_text(json.dumps([[d.source, d.text] for d in held]))
    rng = random.Random(options.seed)
    texts = [d.text for d in kept if d.source != "books" or rng.random() < 0.25]
    made = tokenizer.train(texts)
    made.save(str(options.work / "tokenizer.json"))
    size = options.megabytes * 10**6
    ids = rows.stream(kept, made, size=size, seed=options.seed, shares=data.SHARES, borders=rows.borders)
    np.save(options.work / "stream.npy", ids)
    report = {
        "sha256": data.hashes(options.corpus),
        "sources": _counts(kept, held, data.SHARES),
        "stream tokens": len(ids),
    }
    (options.work / "data.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def train(options: argparse.Namespace) -> None:
    """Train the model, or continue from a checkpoint."""
    from training.model import Shape
    from training.train import train as run

    run(options.work, options.minutes, Shape(layers=options.layers, inner=options.inner))


def remix(options: argparse.Namespace) -> None:
    """Replace the token stream of the first run by that of the second."""
    from tokenizers import Tokenizer

    from training import data, rows

    kept = [document for document in data.documents(options.corpus) if not document.held_out]
    made = Tokenizer.from_file(str(options.work / "tokenizer.json"))
    size = options.megabytes * 10**6
    ids = rows.stream(
        kept,
        made,
        size=size,
        seed=options.seed,
        shares=data.SECOND_SHARES,
        borders=rows.short_borders,
        lengths=rows.SHORT_LENGTHS,
    )
    np.save(options.work / "stream.npy", ids)
    print(f"{len(ids):,} tokens")


def blend(options: argparse.Namespace) -> None:
    """Replace the token stream of the second run by that of the third, and hold out generated text too."""
    from tokenizers import Tokenizer

    from training import data, rows

    found = [*data.documents(options.corpus), *data.made(options.seed)]
    kept = [document for document in found if not document.held_out]
    held = [document for document in found if document.held_out]
    (options.work / "held_out.json").write_text(json.dumps([[d.source, d.text] for d in held]))
    tokenizer = Tokenizer.from_file(str(options.work / "tokenizer.json"))
    size = options.megabytes * 10**6
    ids = rows.blend(kept, tokenizer, size=size, seed=options.seed, shares=data.BLEND_SHARES)
    np.save(options.work / "stream.npy", ids)
    report = {"sources": _counts(kept, held, data.BLEND_SHARES), "stream tokens": len(ids)}
    text = "".join(document.text for document in found if document.source.startswith("made"))
    report["sha256 of the made text"] = hashlib.sha256(text.encode()).hexdigest()
    (options.work / "blend.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def again(options: argparse.Namespace) -> None:
    """Replace the finished run's checkpoint by a new run of the same model. The old checkpoint is kept."""
    from training.grow import again as anew
    from training.train import Run

    checkpoint = options.work / "checkpoint.pt"
    old = Run.load(checkpoint)
    old.save(options.work / SECOND)
    anew(old, options.peak).save(checkpoint)


def grow(options: argparse.Namespace) -> None:
    """Replace the finished run's checkpoint by a new run of a deeper model. The old checkpoint is kept."""
    from training.grow import TOLERANCE, difference
    from training.grow import grow as deepen
    from training.train import Run

    checkpoint, first = options.work / "checkpoint.pt", options.work / FIRST
    old = Run.load(checkpoint)
    new = deepen(old, options.layers, options.peak)
    changed = difference(old.model, new.model, np.load(options.work / "stream.npy")[:512].tolist())
    print(f"{old.model.shape.layers} to {options.layers} layers; logits differ by at most {changed:.1e}")
    if changed > TOLERANCE:
        raise SystemExit("too much")
    old.save(first)
    new.save(checkpoint)


def measure(options: argparse.Namespace) -> None:
    """Print the held-out bits per byte."""
    from training.measure import bits_per_byte, infill

    model, made = _trained(options)
    held = json.loads((options.work / "held_out.json").read_text())
    report = {"text": bits_per_byte(model, made, held), "middles": infill(model, made, held)}
    print(json.dumps(report, indent=1))


def export(options: argparse.Namespace) -> None:
    """Write the GGUF files: F32 into the work folder, Q8_0 into the package."""
    from training import export as writer

    model, made = _trained(options)
    writer.export(model, made, options.work / MASTER, quantized=False)
    SHIPPED.parent.mkdir(parents=True, exist_ok=True)
    part = SHIPPED.with_suffix(".part")
    writer.export(model, made, part, quantized=True)
    part.replace(SHIPPED)
    print(hashlib.sha256(SHIPPED.read_bytes()).hexdigest(), SHIPPED.stat().st_size, SHIPPED.name)


def verify(options: argparse.Namespace) -> None:
    """Compare the tokens and logits of llama.cpp with those of the training code."""
    from training import verify as check

    model, made = _trained(options)
    texts = [text for _, text in json.loads((options.work / "held_out.json").read_text())]
    native = check.Native(options.work / MASTER)
    print(f"same tokens for {check.same_tokens(native, made, texts)} bytes")
    ids = native.tokens(texts[0])[:50]
    difference = check.logit_difference(native, model, ids)
    print(f"logits of {len(ids)} tokens differ by at most {difference:.2e} in F32")
    print(f"and by at most {check.logit_difference(check.Native(SHIPPED), model, ids):.2e} in Q8_0")
    if difference > check.TOLERANCE:
        raise SystemExit("too much")


def samples(options: argparse.Namespace) -> None:
    """Print the samples of the shipped file."""
    from training.samples import samples as draw

    print(draw(options.model, options.seed))


def infill(options: argparse.Namespace) -> None:
    """Print the table of the twenty gaps, filled by the shipped file, and an example."""
    from training.infill import cases, example, table

    held = json.loads((options.work / "held_out.json").read_text())
    print(table(options.model, cases(held, options.seed)), example(options.model), sep="\n\n")


def _counts(kept: list["Document"], held: list["Document"], sources: Iterable[str]) -> dict[str, dict[str, int]]:
    return {
        source: {
            "documents": sum(d.source == source for d in kept),
            "bytes": sum(len(d.text.encode()) for d in kept if d.source == source),
            "held out documents": sum(d.source == source for d in held),
            "held out bytes": sum(len(d.text.encode()) for d in held if d.source == source),
        }
        for source in sources
    }


def _trained(options: argparse.Namespace) -> tuple["Llama", "Tokenizer"]:
    """The model and the tokenizer in the work folder."""
    from tokenizers import Tokenizer

    from training.train import Run

    model = Run.load(options.work / "checkpoint.pt").model.eval()
    return model, Tokenizer.from_file(str(options.work / "tokenizer.json"))


STEPS = {
    step.__name__: step
    for step in (prepare, train, remix, grow, blend, again, measure, export, verify, samples, infill)
}


def main() -> None:
    """Parse the command line and run one step."""
    parser = argparse.ArgumentParser(prog="training", description="Train Afterword's built-in model.")
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared" / "corpus")
    parser.add_argument("--work", type=Path, default=ROOT.parent / "training-work")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=60, help="text in the token stream")
    parser.add_argument("--minutes", type=float, default=66, help="the budget of the training run")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--peak", type=float, default=0.45, help="factor of the learning rates after growing")
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="model file for samples and gaps")
    options = parser.parse_args()
    STEPS[options.step](options)


if __name__ == "__main__":
    main()
