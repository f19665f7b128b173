"""Multilingual encoder-decoder and mixture-of-experts language models in JAX."""

import os

__version__ = "0.1.0"

# TensorFlow's notes on devices and caches are for its developers. Native code reads this once, when JAX or TensorFlow
# is imported; errors that matter reach Python as exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def load(run_dir, step=None, **options):
    """A trained model, ready for notebooks: `mlm.load("runs/quickstart").generate(["Good morning"], to="fr")`.

    See `mlm.session.load` for the options. Nothing heavy is imported before it is called.
    """
    from mlm import session

    return session.load(run_dir, step, **options)
