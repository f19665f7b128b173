"""Adafactor against T5X's rules, written once more in NumPy float64 for one unstacked matrix or vector at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.training.adafactor import MatrixView, matrix_view
from mlm.training.optimizers import make_optimizer


class T5XAdafactor:
    """Shazeer & Stern 2018 with T5X's defaults. A matrix with both sides >= 128 is factored."""

    def __init__(self, p, factored=True, beta1=None, clipping=1.0, scale=True, decay=0.8, weight_decay=0.0):
        self.p, self.step = np.array(p, np.float64), 0
        self.factored = factored and p.ndim == 2 and min(p.shape) >= 128
        self.beta1, self.clipping, self.scale, self.decay, self.weight_decay = (
            beta1,
            clipping,
            scale,
            decay,
            weight_decay,
        )
        self.v = np.zeros(p.shape)
        self.rows, self.columns = (np.zeros(p.shape[0]), np.zeros(p.shape[-1])) if self.factored else (None, None)
        self.m = np.zeros(p.shape)

    def update(self, g, rate):
        g = np.array(g, np.float64)
        beta2 = 1 - (self.step + 1.0) ** -self.decay
        if self.scale:
            rate = rate * max(np.sqrt(np.mean(self.p**2)), 1e-3)
        square = g * g + 1e-30
        if self.factored:
            self.rows = beta2 * self.rows + (1 - beta2) * square.mean(1)
            self.columns = beta2 * self.columns + (1 - beta2) * square.mean(0)
            y = g * ((self.rows / self.rows.mean()) ** -0.5)[:, None] * (self.columns**-0.5)[None, :]
        else:
            self.v = beta2 * self.v + (1 - beta2) * square
            y = g * self.v**-0.5
        if self.clipping is not None:
            y /= max(1.0, np.sqrt(np.mean(y * y)) / self.clipping)
        step = rate * y
        if self.beta1 is not None:
            step = self.m = self.beta1 * self.m + (1 - self.beta1) * step
        self.p = (1 - self.weight_decay) * self.p - step
        self.step += 1
        return self.p


CASES = {
    "factored matrix": ((130, 140), ("embed", "mlp"), (130, 140)),
    "head": ((140, 130), ("embed", "vocab"), (140, 130)),
    "attention in": ((130, 4, 40), ("embed", "heads", "head_dim"), (130, 160)),
    "attention out": ((4, 40, 130), ("heads", "head_dim", "embed"), (160, 130)),
    "small matrix": ((20, 300), ("embed", "mlp"), (20, 300)),
    "position table": ((200, 300), ("heads", "buckets"), None),
    "scale": ((130,), ("embed",), (130,)),
    "tiny weights": ((130,), ("embed",), (130,)),
}
OPTIONS = [
    ({}, {}),
    ({"beta1": 0.9}, {"beta1": 0.9}),
    ({"weight_decay": 0.01}, {"weight_decay": 0.01}),
    ({"factored": False, "clipping_threshold": None}, {"factored": False, "clipping": None}),
    ({"multiply_by_parameter_scale": False, "decay_exponent": 0.5}, {"scale": False, "decay": 0.5}),
]


def draw(seed, shape, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: str(o[0]))
def test_every_kind_of_parameter_follows_t5x_for_several_steps(options):
    """Gradients change in size from step to step, so that clipping bites at some. Rates change too."""
    ours, theirs = options
    scales = {name: 1e-4 if name == "tiny weights" else 0.5 for name in CASES}
    params = {name: draw(1, shape, scales[name]) for name, (shape, _, _) in CASES.items()}
    axes = {name: axes for name, (_, axes, _) in CASES.items()}
    # A position table has no "embed" side: T5X leaves it unfactored.
    references = {
        name: T5XAdafactor(params[name].reshape(fold or shape), **{**theirs, **({} if fold else {"factored": False})})
        for name, (shape, _, fold) in CASES.items()
    }
    schedule = lambda step: 0.1 / (step + 1)  # noqa: E731
    optimizer = make_optimizer("adafactor", learning_rate=schedule, **ours)(axes, params)
    state = optimizer.init(params)
    params = jax.tree.map(jnp.asarray, params)
    update = jax.jit(optimizer.update)
    for step in range(5):
        gradients = {name: draw(10 + step, p.shape, 10.0 ** (step % 3)) for name, p in params.items()}
        updates, state = update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, reference in references.items():
            want = reference.update(gradients[name].reshape(reference.p.shape), schedule(step)).reshape(
                params[name].shape
            )
            np.testing.assert_allclose(params[name], want, rtol=2e-5, atol=2e-6, err_msg=f"{name}, step {step}")


def test_memory_is_rows_plus_columns():
    """[2, 130, 4, 40] attention kernels: 2 x 130 + 2 x 160 numbers instead of 2 x 130 x 160."""
    params = {"w": jnp.zeros((2, 130, 4, 40))}
    state = make_optimizer("adafactor", learning_rate=1.0)(
        {"w": ("layers", "embed", "heads", "head_dim")}, params
    ).init(params)
    assert state.row["w"].shape == (2, 130)
    assert state.column["w"].shape == (2, 4, 40)
    assert len(jax.tree.leaves(state)) == 3  # and the count


@pytest.mark.parametrize(
    ("axes", "view"),
    [
        (("layers", "embed", "heads", "head_dim"), MatrixView((0,), (1,), (2, 3), (1, 2, 3))),
        (("layers", "heads", "head_dim", "embed"), MatrixView((0,), (1, 2), (3,), (1, 2, 3))),
        (("layers", "experts", "embed", "mlp"), MatrixView((0, 1), (2,), (3,), (2, 3))),
        (("layers", "embed", "experts"), MatrixView((0,), (1,), (2,), (1, 2))),  # a router is one matrix
        (("vocab", "embed"), MatrixView((), (0,), (1,), (0, 1))),
        (("layers", "embed"), MatrixView((0,), (), (), (1,))),
        (("heads", "buckets"), MatrixView((), (), (), (0, 1))),
        ((), MatrixView((), (), (), ())),
    ],
)
def test_matrix_view(axes, view):
    assert matrix_view(axes) == view


def test_the_parameters_are_needed():
    params = {"w": jnp.ones((3,))}
    optimizer = make_optimizer("adafactor", learning_rate=1.0)({"w": ("embed",)}, params)
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
        optimizer.update(params, optimizer.init(params))
