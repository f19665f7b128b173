"""One contract for every optimizer, and what each is known by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.training.optimizers import OPTIMIZERS, ema, make_optimizer, state_axes
from mlm.trees import named_leaves

LAYERS = 3
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "query": ("layers", "embed", "heads", "head_dim"),
        "out": ("layers", "heads", "head_dim", "embed"),
        "up": ("layers", "embed", "mlp"),
        "scale": ("layers", "embed"),
    },
    "position": ("heads", "buckets"),
    "head": ("embed", "vocab"),
}
SIZES = {"vocab": 136, "embed": 128, "heads": 4, "head_dim": 32, "mlp": 128, "layers": LAYERS, "buckets": 8}
IS_AXES = {"is_leaf": lambda x: isinstance(x, tuple)}


def tree(seed, scale=0.1):
    """Parameters or gradients. Square layers (embed = mlp = heads x head_dim = 128): sizes tell nothing apart."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda axes: jnp.asarray(rng.normal(0, scale, [SIZES[a] for a in axes]), jnp.float32), AXES, **IS_AXES
    )


def build(name, params, axes=AXES, learning_rate=0.05, **options):
    return make_optimizer(name, learning_rate=learning_rate, **options)(axes, params)


def run(optimizer, params, gradients):
    """Parameters and state after one jitted update per tree of gradients."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


every = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


@every
def test_comes_down_a_quadratic(name):
    target, params = tree(0), tree(1)
    loss = lambda p: optax.tree.norm(jax.tree.map(jnp.subtract, p, target), squared=True)  # noqa: E731
    optimizer = build(name, params, learning_rate=0.02)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, before = optimizer.init(params), loss(params)
    for _ in range(40):
        params, state = step(params, state)
    assert loss(params) < 0.5 * before


@every
@pytest.mark.parametrize(
    "options", [{}, {"clip_norm": 1.0, "freeze": ("layers/query",)}], ids=["plain", "clip, freeze"]
)
def test_state_keeps_its_form(name, options):
    params = tree(0)
    optimizer = build(name, params, **options)
    before = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, before, params)
    form = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)  # noqa: E731
    assert form(before) == form(after)
    assert form(updates) == form(jax.eval_shape(lambda: params))


@every
def test_stacked_layers_train_as_unstacked_ones(name):
    """Layer i is 10^i times larger than layer 0, in weights and in gradients: any statistic over layers would show."""
    stretch = lambda t: {  # noqa: E731
        **t,
        "layers": {k: x * 10.0 ** jnp.arange(LAYERS).reshape(-1, *[1] * (x.ndim - 1)) for k, x in t["layers"].items()},
    }

    def unstack(t):
        layers = [{k: x[i] for k, x in t["layers"].items()} for i in range(LAYERS)]
        return {**t, "layers": layers}

    params, gradients = stretch(tree(0)), [stretch(tree(seed, 1.0)) for seed in (1, 2, 3)]
    axes = {**AXES, "layers": [{k: a[1:] for k, a in AXES["layers"].items()} for _ in range(LAYERS)]}
    stacked, _ = run(build(name, params), params, gradients)
    unstacked, _ = run(build(name, unstack(params), axes), unstack(params), [unstack(g) for g in gradients])
    assert_close(unstack(stacked), unstacked, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "freeze": ("embedding",)}], ids=["plain", "clip, freeze"])
def test_every_leaf_of_the_state_has_axes(name, options):
    params = tree(0)
    optimizer = build(name, params, **options)
    state = jax.eval_shape(optimizer.init, params)
    axes = state_axes(optimizer, jax.eval_shape(lambda: params), AXES)
    known = dict(named_leaves(AXES, **IS_AXES))
    seen = set()
    for (path, leaf), got in zip(named_leaves(state), jax.tree.structure(state).flatten_up_to(axes), strict=True):
        assert len(got) == len(leaf.shape), path
        owner = next((p for p in known if path.endswith(p)), None)
        if owner is None:
            assert set(got) <= {None}, path
            continue
        seen.add(owner)
        assert leaf.shape == tuple(SIZES[a] for a in got), path
        if "/row/" in path or "/column/" in path or path.startswith(("row/", "column/")):
            embed = tuple(a for a in known[owner] if a in ("layers", "embed"))
            rest = tuple(a for a in known[owner] if a != "embed")
            first = known[owner].index("embed") == len(embed) - 1  # the embedding dimension comes first: it is the row
            assert got == (embed if ("row/" in path) == first else rest), path
        else:
            assert got == known[owner], path
    assert seen == set(known) - set(options.get("freeze", ()))


def test_axes_of_states_that_are_not_ours():
    """optax's own Adafactor keeps placeholders of size 1 and factors by size alone."""
    shapes = {"w": jax.ShapeDtypeStruct((3, 200, 300), jnp.float32), "b": jax.ShapeDtypeStruct((127,), jnp.float32)}
    optimizer = optax.adafactor(1e-3)
    axes = state_axes(optimizer, shapes, {"w": ("layers", "embed", "mlp"), "b": ("embed",)})
    state = jax.eval_shape(optimizer.init, shapes)
    names = ["/".join(path.split("/")[-2:]) for path, _ in named_leaves(state)]
    factored = dict(zip(names, jax.tree.structure(state).flatten_up_to(axes), strict=True))
    assert factored["v_row/w"] == ("layers", "embed")
    assert factored["v_col/w"] == ("layers", "mlp")
    assert factored["v/b"] == ("embed",)
    assert factored["v/w"] == factored["v_row/b"] == (None,)


@every
def test_split_parameters_train_as_whole_ones(name):
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    place = lambda axes: NamedSharding(mesh, P(*(rules.get(a) for a in axes)))  # noqa: E731
    params, gradients = tree(0), [tree(1), tree(2)]
    optimizer = build(name, params, clip_norm=1.0)
    want, _ = run(optimizer, params, gradients)

    layout = jax.tree.map(place, AXES, **IS_AXES)
    abstract = jax.eval_shape(optimizer.init, params)
    state_layout = jax.tree.map(lambda _, axes: place(axes), abstract, state_axes(optimizer, params, AXES))
    params, gradients = jax.device_put(params, layout), [jax.device_put(g, layout) for g in gradients]
    state = jax.jit(optimizer.init, out_shardings=state_layout)(params)
    step = jax.jit(optimizer.update, out_shardings=(layout, state_layout))
    for g in gradients:
        updates, state = step(g, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert_close(params, want, rtol=1e-4, atol=1e-5)


@every
def test_frozen_parameters_keep_every_bit_and_take_no_memory(name):
    params = tree(0)
    params["layers"]["query"] = params["layers"]["query"].at[0, 0, 0, 0].set(-0.0)
    gradients = tree(1)
    # A frozen gradient spoils nothing, clipping included.
    gradients["embedding"] = jnp.full_like(gradients["embedding"], jnp.nan)
    optimizer = build(name, params, clip_norm=1.0, freeze=("embedding", "layers/(query|scale)"), weight_decay=0.5)
    after, state = run(optimizer, params, [gradients, gradients])
    frozen = {"embedding", "layers/query", "layers/scale"}
    before = dict(named_leaves(params))
    for path, leaf in named_leaves(after):
        same = np.asarray(leaf).tobytes() == np.asarray(before[path]).tobytes()
        assert same == (path in frozen), path
        assert np.isfinite(leaf).all()
    assert not [path for path, _ in named_leaves(state) if path.endswith(tuple(frozen))]


def test_clipping_is_by_the_norm_of_all_gradients():
    """sqrt(3^2 + 4^2) = 5, clipped to 1: a fifth. Adam's first moment after a step is 0.1 of it."""
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    optimizer = build("adamw", params, {"a": ("embed",), "b": ("embed",)}, clip_norm=1.0)
    _, state = optimizer.update({"a": jnp.array([3.0]), "b": jnp.array([-4.0])}, optimizer.init(params), params)
    moments = {path[-4:]: float(x[0]) for path, x in named_leaves(state) if "mu" in path}
    assert moments == pytest.approx({"mu/a": 0.1 * 0.6, "mu/b": -0.1 * 0.8})


def test_adamw_decays_matrices_only():
    """Zero gradients: what moves is the decay, p (1 - rate x decay)."""
    params = tree(0)
    after, _ = run(
        build("adamw", params, learning_rate=0.1, weight_decay=0.5), params, [jax.tree.map(jnp.zeros_like, params)]
    )
    for (path, old), (_, new) in zip(named_leaves(params), named_leaves(after), strict=True):
        np.testing.assert_allclose(new, old if path == "layers/scale" else 0.95 * old, rtol=1e-6, err_msg=path)


def test_adamw_rms_golden():
    """First step of Adam is the sign; times rms(p) of the layer, at least 1e-3.

    Layer 0 holds (3, 4): rms sqrt(12.5) = 3.5355, step 0.1 x 3.5355. Layer 1 holds zeros: step 0.1 x 0.001.
    """
    params = {"w": jnp.array([[3.0, 4.0], [0.0, 0.0]])}
    optimizer = build("adamw_rms", params, {"w": ("layers", "embed")}, learning_rate=0.1)
    after, _ = run(optimizer, params, [{"w": jnp.array([[1.0, -2.0], [5.0, -6.0]])}])
    np.testing.assert_allclose(after["w"], [[3 - 0.35355, 4 + 0.35355], [-1e-4, 1e-4]], rtol=1e-4)


def test_muon_orthogonalises_each_layer_as_the_matrix_it_is():
    """Singular values of every layer's D x (H K) update are near each other, whatever the gradient's were.

    Quintic Newton-Schulz leaves them within about [0.7, 1.2]; consistent_rms = 0.2 makes the update's rms 0.2 x rate.
    """
    params, gradients = tree(0), tree(1)
    gradients["layers"]["query"] *= 10.0 ** jnp.arange(LAYERS).reshape(-1, 1, 1, 1)
    optimizer = build("muon", params, learning_rate=0.1, weight_decay=0.0)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    for path, shape in (("query", (128, 128)), ("out", (128, 128)), ("up", (128, 128))):
        for layer in np.asarray(updates["layers"][path]):
            values = np.linalg.svd(layer.reshape(shape), compute_uv=False)
            assert values[0] / values[int(0.9 * len(values))] < 2.5, path
            assert np.sqrt(np.mean(layer**2)) == pytest.approx(0.1 * 0.2, rel=0.2), path
    size = np.abs(np.asarray(updates["embedding"])).ravel()
    assert np.mean(np.isclose(size, np.median(size), rtol=1e-2)) > 0.99  # Adam's first step is the sign


def test_ema_golden():
    """0.9 x 1 + 0.1 x 2 = 1.1, then 0.9 x 1.1 + 0.1 x 2 = 1.19; kept in the average's own type."""
    average, params = {"w": jnp.ones(())}, {"w": jnp.full((), 2.0, jnp.bfloat16)}
    once = ema(average, params, 0.9)
    assert float(once["w"]) == pytest.approx(1.1)
    assert float(ema(once, params, 0.9)["w"]) == pytest.approx(1.19)
    assert once["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "axes", "error", "message"),
    [
        ({"name": "adafctor"}, {"w": ("embed",)}, KeyError, "did you mean 'adafactor'"),
        (
            {"name": "adamw", "weight_decy": 1.0},
            {"w": ("embed",)},
            TypeError,
            "no option 'weight_decy'.*'weight_decay'",
        ),
        ({"name": "adamw", "freeze": ("v",)}, {"w": ("embed",)}, ValueError, "pattern 'v' matches no parameter"),
        ({"name": "adamw"}, {"v": ("embed",)}, ValueError, "parameter 'w' has no logical axes"),
        ({"name": "adamw"}, {"w": ("embed", "mlp")}, ValueError, "name every dimension"),
    ],
)
def test_errors_come_before_training(arguments, axes, error, message):
    with pytest.raises(error, match=message):
        make_optimizer(**arguments, learning_rate=0.1)(axes, {"w": jnp.zeros(3)})
