"""Multilingual encoder-decoder and mixture-of-experts language models in JAX."""

__version__ = "0.1.0"


def load(run_dir, step=None, **options):
    """A trained model, ready for notebooks: `mlm.load("runs/quickstart").generate(["Good morning"], to="fr")`.

    See `mlm.session.load` for the options. Nothing heavy is imported before it is called.
    """
    from mlm import session

    return session.load(run_dir, step, **options)
