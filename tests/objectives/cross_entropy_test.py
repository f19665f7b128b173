"""The head's loss: exact against the plain loss in float64, whatever slices, tiles and mesh; and lean, as compiled."""

import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.objectives import cross_entropy
from mlm.objectives.cross_entropy import head_cross_entropy, token_cross_entropy

B, T, D, V = 4, 7, 16, 101
TERMS = [
    {},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2, "label_smoothing": 0.2},
    {"z_loss": 1e-2, "label_smoothing": 0.1, "softcap": 3.0},
]


def problem(vocab=V, dtype=jnp.float64, rows=B):
    """hidden, kernel, targets, weights; logits of a few nats, some weights zero."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (rows, T, D), jnp.float32).astype(dtype)
    kernel = jax.random.normal(keys[1], (D, vocab), jnp.float32).astype(dtype)
    targets = jax.random.randint(keys[2], (rows, T), 0, vocab, jnp.int32)
    weights = jax.random.uniform(keys[3], (rows, T), jnp.float32).astype(dtype)
    return hidden, kernel, targets, jnp.where(weights < 0.3, 0, weights)


def plain(hidden, kernel, targets, weights, bias=None, softcap=None, **terms):
    logits = jnp.einsum("BTD,DV->BTV", hidden, kernel)
    logits = logits if bias is None else logits + bias
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    return token_cross_entropy(logits, targets, weights, **terms)


def graded(loss, *arrays):
    """(loss, statistics), gradients of hidden, kernel, weights and, where there is one, bias."""
    numbers = (0, 1, 3, 4)[: len(arrays) - 1]
    return jax.jit(jax.value_and_grad(loss, argnums=numbers, has_aux=True))(*arrays)


def a_bias(vocab=V):
    return jax.random.normal(jax.random.key(1), (vocab,), jnp.float32).astype(jnp.float64)


def assert_equal(got, want, rtol):
    """Relative to the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), 1e-30)


@pytest.fixture
def tiles_of_a_few_columns(monkeypatch):
    """4 KiB of temporaries: tiles of 4096 / 16 / (16 x 8) = 2 columns in float64, 4 in float32."""
    monkeypatch.setattr(cross_entropy, "MEMORY", {"cpu": 2**12})


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_value_statistics_and_gradients_equal_the_plain_loss_in_float64(terms, chunk, tiles_of_a_few_columns):
    with jax.enable_x64(True):
        arrays = problem()
        got = graded(lambda *a: head_cross_entropy(*a, chunk=chunk, **terms), *arrays)
        want = graded(lambda *a: plain(*a, **terms), *arrays)
        assert got[0][0].dtype == jnp.float64
        assert_equal(got, want, 1e-10)


@pytest.mark.parametrize("chunk", [3, None])
def test_a_bias_per_token_equals_the_plain_loss_in_float64(chunk, tiles_of_a_few_columns):
    with jax.enable_x64(True):
        arrays = (*problem(), a_bias())
        terms = TERMS[-1]
        got = graded(lambda *a: head_cross_entropy(*a[:4], bias=a[4], chunk=chunk, **terms), *arrays)
        want = graded(lambda *a: plain(*a, **terms), *arrays)
        assert len(got[1]) == 4
        assert_equal(got, want, 1e-10)


def test_the_cotangent_scales_every_gradient():
    """The gradients are ready before it is known: loss / 13, as a mean over 13 tokens would ask for."""
    with jax.enable_x64(True):
        arrays = problem()
        got = graded(lambda *a: (head_cross_entropy(*a, z_loss=0.1, chunk=2)[0] / 13.0, None), *arrays)
        want = graded(lambda *a: (plain(*a, z_loss=0.1)[0] / 13.0, None), *arrays)
        assert_equal(got, want, 1e-10)


def test_z_loss_pulls_along_the_softmax():
    """d (log Z)^2 / d logits = 2 log Z softmax; with an identity kernel hidden is the logits."""
    hidden, _, targets, weights = problem(dtype=jnp.float32)
    kernel = jnp.eye(D)
    targets = targets % D
    with_z = jax.grad(lambda h: head_cross_entropy(h, kernel, targets, weights, z_loss=0.5)[0])(hidden)
    without = jax.grad(lambda h: head_cross_entropy(h, kernel, targets, weights)[0])(hidden)
    log_z = jax.nn.logsumexp(hidden, axis=-1, keepdims=True)
    want = 0.5 * 2 * log_z * jax.nn.softmax(hidden, axis=-1) * weights[..., None]
    np.testing.assert_allclose(with_z - without, want, atol=1e-5)


def test_label_smoothing_golden():
    """e = 0.1, V = 4: target .9 and three times .1/3. Entropy -(.9 ln .9 + .1 ln(.1/3)) = .0948 + .3401 = .4349.

    Uniform logits cost ln 4 = 1.3863 before the entropy is subtracted; the smoothed target itself costs 0.
    """
    one = jnp.ones((1, 1))
    target = jnp.zeros((1, 1), jnp.int32)
    uniform, _ = head_cross_entropy(jnp.zeros((1, 1, 4)), jnp.eye(4), target, one, label_smoothing=0.1)
    assert float(uniform) == pytest.approx(1.3863 - 0.4349, abs=1e-4)
    perfect = jnp.log(jnp.array([0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3]))[None, None]
    for loss, _ in (
        head_cross_entropy(perfect, jnp.eye(4), target, one, label_smoothing=0.1),
        token_cross_entropy(perfect, target, one, label_smoothing=0.1),
    ):
        assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_statistics_against_numpy():
    hidden, kernel, targets, weights = problem(dtype=jnp.float32)
    _, stats = head_cross_entropy(hidden, kernel, targets, weights, label_smoothing=0.3, z_loss=0.1, chunk=2)
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    label = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(stats.nll, log_z - label, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.log_z, log_z, rtol=1e-5)
    np.testing.assert_array_equal(stats.correct, logits.argmax(-1) == np.asarray(targets))


def test_a_tie_is_no_answer():
    """Equal logits, as of a model that knows nothing: no target counts as found, first or not."""
    targets = jnp.arange(V, dtype=jnp.int32)[None, :]
    arrays = (jnp.zeros((1, V, D)), jnp.ones((D, V)), targets, jnp.ones((1, V)))
    assert not head_cross_entropy(*arrays, chunk=10)[1].correct.any()
    assert not plain(*arrays)[1].correct.any()


@pytest.mark.parametrize("vocab", [5096, 5100])
def test_bfloat16_inputs_accumulate_in_float32(vocab):
    """The known trap: log Z summed in bfloat16, or zero columns taken for logits, is off by tenths of a nat."""
    hidden, kernel, targets, weights = problem(vocab, jnp.bfloat16)
    loss, stats = head_cross_entropy(hidden, kernel, targets, weights.astype(jnp.float32), chunk=3)
    assert loss.dtype == stats.log_z.dtype == jnp.float32
    exact = plain(*(x.astype(jnp.float32) for x in (hidden, kernel)), targets, weights.astype(jnp.float32))[1]
    np.testing.assert_allclose(stats.log_z, exact.log_z, rtol=1e-5)
    gradient = jax.grad(lambda k: head_cross_entropy(hidden, k, targets, weights, chunk=3)[0])(kernel)
    assert gradient.dtype == jnp.bfloat16
    master = kernel.astype(jnp.float32)  # the kernel's own type is kept for its gradient: masters stay float32
    assert jax.grad(lambda k: head_cross_entropy(hidden, k, targets, weights)[0])(master).dtype == jnp.float32


MESHES = [
    {"tensor": 8},
    {"data": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"replica": 2, "expert": 2, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
]


def make_mesh(sizes):
    assert len(jax.devices()) == 8
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def split(sizes, arrays):
    """A mesh of these sizes, and the arrays laid out on it: rows over everything but tensor, kernel over tensor."""
    mesh = make_mesh(sizes)
    rows = P(tuple(name for name in sizes if name != "tensor") or None)
    columns = P(None, "tensor" if "tensor" in sizes else None)
    places = (rows, columns, rows, rows)
    return mesh, [jax.device_put(x, NamedSharding(mesh, p)) for x, p in zip(arrays, places, strict=True)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_numbers_of_one_device(sizes, tiles_of_a_few_columns):
    terms = {"z_loss": 1e-2, "label_smoothing": 0.1, "softcap": 3.0}
    with jax.enable_x64(True):
        arrays = problem(vocab=104, rows=8)
        want = graded(lambda *a: plain(*a, **terms), *arrays)
        mesh, placed = split(sizes, arrays)
        got = graded(lambda *a: head_cross_entropy(*a, chunk=2, mesh=mesh, **terms), *placed)
        assert_equal(got, want, 1e-10)


def test_every_device_adds_its_own_part_of_a_bias(tiles_of_a_few_columns):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    with jax.enable_x64(True):
        arrays, bias = problem(vocab=104, rows=8), a_bias(104)
        want = graded(plain, *arrays, bias)
        mesh, placed = split(sizes, arrays)
        bias = jax.device_put(bias, NamedSharding(mesh, P("tensor")))
        got = graded(lambda *a: head_cross_entropy(*a[:4], bias=a[4], chunk=2, mesh=mesh), *placed, bias)
        assert_equal(got, want, 1e-10)


@pytest.mark.parametrize(("rows", "vocab"), [(3, 104), (8, 101), (3, 101)])
def test_what_does_not_divide_over_the_mesh_is_still_right(rows, vocab):
    with jax.enable_x64(True):
        arrays = problem(vocab=vocab, rows=rows)
        want = graded(lambda *a: plain(*a, z_loss=0.1), *arrays)
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        got = graded(lambda *a: head_cross_entropy(*a, chunk=2, mesh=mesh, z_loss=0.1), *arrays)
        assert_equal(got, want, 1e-10)


def collectives(text):
    """(operation, elements, inside a loop?) of every collective of a compiled module."""
    calls, found, name = {}, [], None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[1]
        for kind, callee in re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line):
            calls.setdefault(name, []).append((kind, callee))
        operation = re.search(
            r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line
        )
        if operation:
            shapes = re.findall(r"\[([\d,]*)\]", operation[1])
            found.append((operation[2], sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes), name))
    looped, front = set(), [c for refs in calls.values() for kind, c in refs if kind == "body"]
    while front:
        inner = front.pop()
        if inner not in looped:
            looped.add(inner)
            front += [c for _, c in calls.get(inner, [])]
    return [(operation, size, where in looped) for operation, size, where in found]


def compiled(sizes, ambient=False):
    mesh, placed = split(sizes, problem(1024, jnp.float32, rows=8))
    given = None if ambient else mesh
    loss = lambda *a: head_cross_entropy(*a, chunk=2, mesh=given, z_loss=1e-4, label_smoothing=0.1)  # noqa: E731
    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        return collectives(jax.jit(step).lower(*placed).compile().as_text())


@pytest.mark.parametrize("ambient", [False, True], ids=["mesh given", "ambient mesh"])
def test_a_split_vocabulary_is_never_gathered(ambient):
    """Per position and slice a few numbers cross the devices; the only arrays are the gradient of hidden, once."""
    found = compiled({"tensor": 8}, ambient)
    assert {operation for operation, _, _ in found} == {"all-reduce"}
    large = [(size, looped) for _, size, looped in found if size > 4 * 8 * 2]  # 4 statistics of 8 rows x 2 positions
    assert large == [(8 * T * D, False)]


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "tensor": 2}], ids=str)
def test_the_kernel_gradient_crosses_the_devices_once(sizes):
    """Not once per slice, as partitioning the scan automatically would do."""
    share = D * 1024 // sizes.get("tensor", 1)
    assert [(o, looped) for o, size, looped in compiled(sizes) if size >= share] == [("all-reduce", False)]


def test_under_fsdp_the_kernel_gradient_leaves_in_pieces():
    found = [(o, looped) for o, size, looped in compiled({"fsdp": 8}) if size >= D * 1024 // 8]
    assert ("reduce-scatter", False) in found
    assert not any(looped for _, looped in found)


def test_evaluation_computes_no_gradient():
    """Forward: one product of 2 B T D V; with gradients three of them. The rest is a few operations per logit."""
    arrays = problem(vocab=4096, dtype=jnp.float32)

    def flops(function):
        return jax.jit(function).lower(*arrays).compile().cost_analysis()["flops"] / (2 * B * T * D * 4096)

    assert flops(head_cross_entropy) < 1.6
    assert flops(jax.grad(lambda *a: head_cross_entropy(*a)[0], argnums=(0, 1))) > 2.9


def test_no_more_than_a_slice_of_logits_is_held():
    """B T V x 4 bytes = 29 MB of logits; one position's slice is 1.1 MB, and the gradients 4 MB."""
    rows, length, vocab = 8, 28, 32768
    arrays = (
        jnp.zeros((rows, length, 32)),
        jnp.zeros((32, vocab)),
        jnp.zeros((rows, length), jnp.int32),
        jnp.ones((rows, length)),
    )
    step = jax.value_and_grad(lambda *a: head_cross_entropy(*a, chunk=1)[0], argnums=(0, 1))
    memory = jax.jit(step).lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 9e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must lie in \[0, 1\)"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"chunk": 0}, "chunk=0 target positions must be at least 1"),
    ],
)
def test_bad_options_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        head_cross_entropy(*problem(dtype=jnp.float32), **options)
