"""Rules between our parameters and another library's tensors, and the plan that they give for one model.

A rule is a pair of names and a pattern, read in both directions:

    Rule("encoder/{n}/self_attention/query", "encoder.block.{n}.layer.0.SelfAttention.q.weight", "(h k) d -> d h k")

Our names leave the stacking out: {n} is the layer's number in its stack, wherever its parameters are kept. {e} is an
expert that has a tensor of its own in the other library. The pattern says how the axes of one layer lie there and
here; without an arrow they lie alike. An axis called `n` there holds all layers, of which the rule takes one; one of
length 1 there, written so, is none here.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from mlm.models.config import ModelConfig
from mlm.models.transformer import Transformer
from mlm.trees import named_leaves

BLOCK_BYTES = 1 << 23  # what is read, turned and written at a time


class ConversionError(ValueError):
    """A checkpoint cannot be converted. The text gives the values, the rule that they break and the fix."""


@dataclass(frozen=True)
class Rule:
    """Our name, their name, and the pattern "their axes -> our axes"."""

    ours: str
    theirs: str
    pattern: str


@dataclass(frozen=True)
class Axes:
    """A pattern: groups of letters of their axes, letters of ours. Their `n` is not among ours."""

    theirs: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]

    @classmethod
    def parse(cls, pattern: str) -> "Axes":
        left, _, right = pattern.partition("->")
        found = (g.strip("()").split() for g in re.findall(r"\([^)]*\)|\S+", left))
        groups = tuple(tuple(letter for letter in group if letter != "1") for group in found)
        ours = tuple((right or left.replace("(", " ").replace(")", " ")).split())
        letters = [letter for group in groups for letter in group if letter != "n"]
        if sorted(letters) != sorted(ours):
            raise ValueError(f"pattern {pattern!r} has other letters on its two sides")
        return cls(groups, ours)


@dataclass(frozen=True)
class Piece:
    """One of their tensors, or one layer of it, and the part of our parameter that it is.

    leaf: our parameter's path. index: place of the piece on the leading axes of it. shape: of what is left, in our
    order. layer: the number to take on their axis `n`, if they have one; layers: the length of that axis.
    """

    leaf: str
    index: tuple[int, ...]
    name: str
    axes: Axes
    shape: tuple[int, ...]
    layer: int = 0
    layers: int = 0

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {**dict(zip(self.axes.ours, self.shape, strict=True)), "n": self.layers}

    @property
    def their_shape(self) -> tuple[int, ...]:
        return tuple(int(np.prod([self.sizes[letter] for letter in group])) for group in self.axes.theirs)

    def blocks(self) -> Iterator["Block"]:
        """The piece in parts of about BLOCK_BYTES, cut along the first axis of theirs."""
        if not self.axes.theirs[0]:
            yield Block(self, slice(0, 1), tuple(slice(0, n) for n in self.shape))
            return
        first = self.axes.theirs[0][0]
        size = self.sizes[first]
        step = max(1, min(size, BLOCK_BYTES * size // max(1, 4 * int(np.prod(self.shape)))))
        inner = int(np.prod([self.sizes[letter] for letter in self.axes.theirs[0][1:]]))
        place = self.axes.ours.index(first)
        for start in range(0, size, step):
            stop = min(start + step, size)
            ours = tuple(slice(start, stop) if a == place else slice(0, n) for a, n in enumerate(self.shape))
            yield Block(self, slice(start * inner, stop * inner), ours)

    def chunk(self) -> tuple[int, ...]:
        """Our shape of one block: how the parameter is cut on disk, so that a block is written and read alone."""
        return next(self.blocks()).shape


@dataclass(frozen=True)
class Block:
    """Some rows of one of their tensors, and where they lie in the piece of ours. Values keep every bit."""

    piece: Piece
    rows: slice
    ours: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """In our order."""
        return tuple(cut.stop - cut.start for cut in self.ours)

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Where it lies in our parameter."""
        return (*self.piece.index, *self.ours)

    @cached_property
    def _order(self) -> tuple[list[str], dict[str, int]]:
        flat = [letter for group in self.piece.axes.theirs for letter in group if letter != "n"]
        return flat, dict(zip(self.piece.axes.ours, self.shape, strict=True))

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """theirs: the rows, without an axis `n`."""
        flat, sizes = self._order
        grouped = theirs.reshape([sizes[letter] for letter in flat])
        return grouped.transpose([flat.index(letter) for letter in self.piece.axes.ours])

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        flat, sizes = self._order
        letters = self.piece.axes.ours
        turned = ours.transpose([letters.index(letter) for letter in flat])
        groups = [g for g in self.piece.axes.theirs if g != ("n",)]
        return turned.reshape([int(np.prod([sizes[letter] for letter in group])) for group in groups])


def plan(config: ModelConfig, rules: Sequence[Rule]) -> list[Piece]:
    """Every piece of the model, leaf by leaf. Raises LookupError when a parameter has not exactly one rule."""
    compiled = [(rule, _expression(rule.ours), Axes.parse(rule.pattern)) for rule in rules]
    pieces = []
    for leaf, shape in shapes(config).items():
        for name, lead, layers in _layers(config, leaf):
            rule, match, axes = _find(name, compiled)
            # What leads in our shape and is no letter of the pattern has a tensor for each: experts.
            spread = len(shape) - len(lead) - len(axes.ours)
            for experts in itertools.product(*(range(size) for size in shape[len(lead) : len(lead) + spread])):
                names = {**match.groupdict(), **dict(zip("e", experts))}
                index = (*lead, *experts)
                layer = int(match.groupdict().get("n", 0))
                own = shape[len(index) :]
                pieces.append(Piece(leaf, index, rule.theirs.format(**names), axes, own, layer, layers))
    return pieces


@lru_cache(maxsize=8)
def shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Path -> shape of every parameter of the model."""
    return {name: leaf.shape for name, leaf in named_leaves(Transformer(config).shapes())}


def _layers(config: ModelConfig, leaf: str) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name without stacking, index on the leading axes, layers of the stack) of what a leaf holds."""
    match = re.fullmatch(r"(encoder|decoder)/(layers|rest)/(\d+)/(.+)", leaf)
    if not match:
        yield leaf, (), 0
        return
    side, kind, place, rest = match.groups()
    stack = config.stacks()[side]
    size = len(stack.group)
    if kind == "rest":
        yield f"{side}/{stack.repeats * size + int(place)}/{rest}", (), stack.layers
        return
    for repeat in range(stack.repeats):
        yield f"{side}/{repeat * size + int(place)}/{rest}", (repeat,), stack.layers


def _expression(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)"))


def _find(name: str, rules: Sequence[tuple[Rule, re.Pattern, Axes]]) -> tuple[Rule, re.Match, Axes]:
    found = [(rule, match, axes) for rule, pattern, axes in rules if (match := pattern.fullmatch(name))]
    if len(found) != 1:
        raise LookupError(f"parameter {name} has {len(found)} rules, not one: {[rule.theirs for rule, _, _ in found]}")
    return found[0]


def by_leaf(pieces: Sequence[Piece]) -> Mapping[str, list[Piece]]:
    """The pieces of each parameter, in order."""
    return {leaf: list(group) for leaf, group in itertools.groupby(pieces, key=lambda piece: piece.leaf)}
