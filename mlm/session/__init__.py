"""A trained model in a notebook: `mlm.load(run_dir)`, then `.generate(texts)`, `.score(pairs)`, `.evaluate(task)`.

    run = mlm.load("runs/quickstart")
    run.generate(["Where is the station?"], to="fr")
    run.generate(texts, to="fr", from_="en")                   # where the model is told both, as NLLB is
    run.generate(texts, "fr", "sample", n_best=32, choose="mbr")  # one of 32: see mlm.session.choosing
    run.score([("Good morning", "Bonjour")], to="fr")          # log P(target | source), nats
    run.generate(run.few_shot(texts, examples, shots=4))       # examples before each text
    run.evaluate("tatoeba.translate.en.fr", num_examples=100)  # metrics, loss and bits per byte by language

A run directory holds all that is needed: the model's shape, its vocabulary, the lengths and tasks it was trained with.
"""

from mlm.session.loading import load
from mlm.session.records import Hypothesis, Ranked, Source
from mlm.session.session import Session

__all__ = ["Hypothesis", "Ranked", "Session", "Source", "load"]
