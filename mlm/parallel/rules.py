"""Logical axis names to mesh axes: one ordered table, for parameters and activations alike.

The rules are read from the top for each array; a mesh axis serves an array once. So an activation
("batch", "length", "embed") is split by rows over data × fsdp × expert and leaves "embed" whole, while a parameter
("embed", "mlp") is split over fsdp × tensor. A logical name without a rule is an error, never a silent replica.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.parallel.mesh import ROW_AXES, closest, divisors
from mlm.registry import nearest
from mlm.trees import map_named, named_leaves, path_name
from mlm.types import Axes, Constrain, PyTree

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

RULES: Rules = (  # logical axis, mesh axis or axes (None: whole on every device); earlier rules choose first
    ("batch", ROW_AXES),
    ("experts", "expert"),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("embed", "fsdp"),
    ("rank", "fsdp"),
    ("routes", None),
    ("codes", None),
    ("groups", ("replica", "data", "fsdp")),  # rows of tokens while they are at the experts of other devices
    ("slots", None),
    ("languages", None),
    ("kv_heads", None),
    ("head_dim", None),
    ("positions", None),
    ("length", None),
    ("layers", None),  # stacked layers are scanned over: every device needs every layer
    ("buckets", None),
)


def spec(axes: Axes, mesh: Mesh | AbstractMesh, rules: Rules = RULES, name: str = "array") -> P:
    """The partition of an array with these logical axes. Mesh axes of size 1 or absent from the mesh are left out.

    Raises ValueError, naming the array, when an axis has no rule.
    """
    known = {logical for logical, _ in rules}
    for axis in axes:
        if axis is not None and axis not in known:
            raise ValueError(
                f"{name}: no partition rule for logical axis {axis!r} of {axes}; {nearest(axis, known)} "
                f"Add a (name, mesh axis) pair to RULES in mlm/parallel/rules.py"
            )
    chosen: list[str | tuple[str, ...] | None] = [None] * len(axes)
    used: set[str] = set()
    for logical, target in rules:
        for place, axis in enumerate(axes):
            if axis != logical or chosen[place] is not None or target is None:
                continue
            wanted = (target,) if isinstance(target, str) else target
            free = tuple(a for a in wanted if mesh.shape.get(a, 1) > 1 and a not in used)
            used.update(free)
            if free:
                chosen[place] = free[0] if len(free) == 1 else free
    return P(*chosen)


def fitting(partition: P, array: jax.Array | jax.ShapeDtypeStruct) -> P:
    """The partition without the dimensions of size 1, as a quantised matrix has them where it keeps a scale."""
    return P(*(None if size == 1 else target for size, target in zip(array.shape, partition, strict=True)))


def shardings(shapes: PyTree, axes: PyTree, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> PyTree:
    """A NamedSharding for every leaf of `shapes` (anything with .shape); `axes` holds a tuple of names for each.

    Raises ValueError, naming the parameter, when the trees differ, a name has no rule, the number of names is not
    the number of dimensions, or a dimension does not divide over its mesh axes (with the nearest sizes that do).
    """

    def place(name: str, leaf, names: Axes) -> NamedSharding:
        if len(names) != len(leaf.shape):
            raise ValueError(f"{name}: shape {tuple(leaf.shape)} has {len(leaf.shape)} dimensions, axes are {names}")
        partition = spec(names, mesh, rules, name)
        for size, logical, target in zip(leaf.shape, names, partition, strict=True):
            if logical is not None:
                _check(f"{name}: {logical}", size, target, mesh)
        return NamedSharding(mesh, partition)

    return map_named(place, shapes, _aligned(shapes, axes))


def constrain(mesh: Mesh, rules: Rules = RULES) -> Constrain:
    """A function (array, logical axes) -> array that pins an activation to the mesh. On one device it does nothing.

    Raises ValueError while tracing when a name has no rule or the number of names is not the number of dimensions.
    """

    def pin(array: jax.Array, axes: Axes) -> jax.Array:
        if len(axes) != array.ndim:
            raise ValueError(f"activation of shape {array.shape} has {array.ndim} dimensions, axes are {axes}")
        partition = spec(axes, mesh, rules, "activation")
        if mesh.size == 1:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, partition))

    return pin


def check_sizes(mesh: Mesh, rules: Rules = RULES, **sizes: int) -> None:
    """Raises ValueError when a dimension does not divide over the mesh, e.g. check_sizes(mesh, batch=32, heads=6).

    The names are logical axes. Meant for the edge: before any array exists and before anything compiles.
    """
    problems = []
    for name, size in sizes.items():
        try:
            _check(name, size, spec((name,), mesh, rules, name)[0], mesh)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def parameter_table(shapes: PyTree, axes: PyTree, placed: PyTree) -> list[str]:
    """One line per parameter (path, shape, logical axes, mesh axes, count) and a last line with the total."""
    rows = [("path", "shape", "axes", "mesh", "count")]

    def add(path: str, leaf, logical: Axes, sharding: NamedSharding) -> int:
        count = math.prod(leaf.shape)
        shape = " × ".join(map(str, leaf.shape)) or "scalar"
        split = ", ".join("+".join(t) if isinstance(t, tuple) else str(t or "-") for t in sharding.spec) or "-"
        rows.append((path, shape, ", ".join(n or "-" for n in logical) or "-", split, f"{count:,}"))
        return count

    total = sum(jax.tree.leaves(map_named(add, shapes, _aligned(shapes, axes), placed)))
    rows.append(("total", "", "", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths[:4], strict=False)), row[4].rjust(widths[4])])
        for row in rows
    ]


def _check(what: str, size: int, target: str | Sequence[str] | None, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError unless `size` divides over the mesh axes of `target`."""
    over = (target,) if isinstance(target, str) else tuple(target or ())
    parts = math.prod(mesh.shape[a] for a in over)
    if size % parts == 0:
        return
    multiples = [m for m in (size // parts * parts, (size // parts + 1) * parts) if m]
    shown = " × ".join(f"{a}={mesh.shape[a]}" for a in over)
    fits = closest(parts, divisors(size)) if size else [1]
    raise ValueError(
        f"{what}={size} does not divide over {shown} ({parts} parts); nearest sizes that do: "
        f"{' or '.join(map(str, multiples))}; {size} itself divides over {', '.join(map(str, fits))}"
    )


def _aligned(shapes: PyTree, axes: PyTree) -> PyTree:
    """The axes tree in the structure of `shapes`, each leaf a plain tuple of names."""
    structure = jax.tree.structure(shapes)
    is_axes = lambda x: type(x) is tuple and all(n is None or isinstance(n, str) for n in x)  # noqa: E731
    try:
        flat = structure.flatten_up_to(axes)
        if all(is_axes(names) for names in flat):
            return structure.unflatten(flat)
    except ValueError:
        pass
    have = {path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_axes)[0]}
    want = {name for name, _ in named_leaves(shapes)}
    raise ValueError(
        f"logical axes and shapes are different trees; without axes: {sorted(want - have)[:10]}, "
        f"axes without an array: {sorted(have - want)[:10]}"
    )
