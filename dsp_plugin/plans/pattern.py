"""Patterns that name the dims of a tensor, as in einops: ``(b t) 1+s c`` is frames of patches behind a class token.

An item stands for one dim of the tensor. It is a name, a number, ``_`` for a dim that is of no interest, or names in
parentheses whose product it is. ``k+`` before it, ``+k`` behind it are tokens of another kind in front of or behind the
ones named: class tokens, registers. ``k`` is a number, or a name for as many as there are. In a plan ``s+k`` has them
behind where s is a name of its tokens; without that knowledge, two names are ``k+s``, and ``(s)+k`` says the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError

_ITEM = re.compile(
    r"(?:(?P<before>\w+)\+)?(?:(?P<name>\w+)|\((?P<names>\s*[a-zA-Z]\w*(?:\s+[a-zA-Z]\w*)*\s*)\))(?:\+(?P<behind>\w+))?"
)


@dataclass(frozen=True)
class Group:
    """One dim of a tensor: the product of ``names``, with further tokens before and behind."""

    names: tuple[str, ...]
    before: str | None = None
    behind: str | None = None

    @property
    def extended(self) -> bool:
        """Whether further tokens lie along this dim."""
        return self.before is not None or self.behind is not None


@dataclass(frozen=True)
class Extra:
    """Further tokens along one dim: ``count`` of them for every index of the other ``names``."""

    names: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Parts:
    """A tensor taken apart: the tokens named with one dim a name, and what lies before and behind them.

    ``before`` and ``behind`` have one dim a name of the other groups, and one for the further tokens.
    """

    main: Tensor
    before: Tensor | None
    behind: Tensor | None


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern."""

    text: str
    groups: tuple[Group, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in memory order."""
        return tuple(name for group in self.groups for name in group.names)

    @property
    def extra_names(self) -> tuple[str, ...]:
        """The dims of the further tokens but for their own, in memory order; as `names` where there are none."""
        return tuple(name for group in self.groups for name in group.names if not group.extended)

    @property
    def extra_place(self) -> int | None:
        """Among the dims of the further tokens the place of their own."""
        place = 0
        for group in self.groups:
            if group.extended:
                return place
            place += len(group.names)
        return None

    @property
    def extra_dims(self) -> tuple[str, ...]:
        """The dims of the further tokens, in memory order; the empty name for their own."""
        place = self.extra_place
        names = self.extra_names
        return names if place is None else (*names[:place], "", *names[place:])

    @property
    def extra_along(self) -> int | None:
        """The dim of the tensor along which further tokens lie."""
        return next((dim for dim, group in enumerate(self.groups) if group.extended), None)

    def solve(self, shape: Sequence[int], known: Mapping[str, int], setting: str) -> dict[str, int]:
        """The sizes of all names, those of further tokens included, from a shape and what is known already.

        Raises:
            SequenceParallelConfigError: the shape does not fit, or leaves sizes open.
        """
        if len(shape) != len(self.groups):
            raise self._misfit(setting, shape, f"it names {len(self.groups)} dims")
        sizes = {name: size for name, size in known.items() if not name.isdecimal()}
        for group, length in zip(self.groups, shape, strict=True):
            self._solve_group(group, length, shape, sizes, setting)
        return sizes

    def _solve_group(
        self, group: Group, length: int, shape: Sequence[int], sizes: dict[str, int], setting: str
    ) -> None:
        unknown = _unknown(group, sizes)
        if len(unknown) > 1:
            raise self._misfit(setting, shape, f"{' and '.join(unknown)} cannot both be told from {length}")
        extras = [extra for extra in (group.before, group.behind) if extra is not None and extra not in unknown]
        rest = length - sum(_size(extra, sizes) for extra in extras)
        whole = prod(_size(name, sizes) for name in group.names if name not in unknown)
        if not unknown:
            if rest != whole and "_" not in group.names:
                raise self._misfit(setting, shape, f"{_text(group)} should be {whole + length - rest}")
            return
        (name,) = unknown
        if name in group.names:
            if whole == 0 or rest < 0 or rest % whole:
                raise self._misfit(setting, shape, f"{rest} entries of {_text(group)} are no multiple of {whole}")
            sizes[name] = rest // whole
        else:
            if rest < whole:
                raise self._misfit(setting, shape, f"{_text(group)} has at least {whole} entries")
            sizes[name] = rest - whole

    def extras(self, sizes: Mapping[str, int]) -> tuple[Extra, ...]:
        """The further tokens, at these sizes."""
        return tuple(
            Extra(self.extra_names, _size(extra, sizes))
            for group in self.groups
            for extra in (group.before, group.behind)
            if extra is not None
        )

    def take_apart(self, x: Tensor, sizes: Mapping[str, int]) -> Parts:
        """``x`` by names. ``sizes`` are those of ``x`` itself, so local ones where it is sharded."""
        along = self.extra_along
        before = behind = None
        if along is not None:
            group = self.groups[along]
            front = _size(group.before, sizes) if group.before is not None else 0
            back = _size(group.behind, sizes) if group.behind is not None else 0
            if group.before is not None:
                before = self._unfolded(x.narrow(along, 0, front), sizes, along)
            if group.behind is not None:
                behind = self._unfolded(x.narrow(along, x.shape[along] - back, back), sizes, along)
            x = x.narrow(along, front, x.shape[along] - front - back)
        return Parts(self._unfolded(x, sizes, None), before, behind)

    def put_together(self, parts: Parts) -> Tensor:
        """The reverse of `take_apart`."""
        along = self.extra_along
        pieces = [(parts.before, along), (parts.main, None), (parts.behind, along)]
        folded = [self._folded(piece, extra) for piece, extra in pieces if piece is not None]
        return folded[0] if len(folded) == 1 else torch.cat(folded, dim=along if along is not None else 0)

    def _unfolded(self, x: Tensor, sizes: Mapping[str, int], extra_along: int | None) -> Tensor:
        shape: list[int] = []
        for dim, group in enumerate(self.groups):
            whole = dim == extra_along or len(group.names) == 1
            shape += [x.shape[dim]] if whole else [_size(name, sizes) for name in group.names]
        return x.reshape(shape)

    def _folded(self, x: Tensor, extra_along: int | None) -> Tensor:
        shape: list[int] = []
        place = 0
        for dim, group in enumerate(self.groups):
            width = 1 if dim == extra_along else len(group.names)
            shape.append(prod(x.shape[place : place + width]))
            place += width
        return x.reshape(shape)

    def _misfit(self, setting: str, shape: Sequence[int], why: str) -> SequenceParallelConfigError:
        return SequenceParallelConfigError(
            setting=setting,
            value=self.text,
            why=f"it was given sizes {tuple(shape)}, but {why}",
            remedy="name every dim of the tensor in memory order, and pass it whole; sizes that no shape tells go into "
            "plan.inputs or plan.sizes",
        )


@lru_cache(maxsize=256)
def parse(text: str, setting: str = "pattern") -> Pattern:
    """The pattern that ``text`` describes.

    Raises:
        SequenceParallelConfigError: it is no pattern.
    """
    groups = []
    rest = text.strip()
    while rest:
        found = _ITEM.match(rest)
        if found is None or (found.end() < len(rest) and not rest[found.end()].isspace()):
            raise _unreadable(text, setting, f"cannot be read from {rest!r} on")
        names, before, behind = tuple((found["names"] or found["name"]).split()), found["before"], found["behind"]
        if before is not None and behind is None and names[0].isdecimal() and not before.isdecimal():
            # A number beside a name is how many further tokens there are, on either side.
            names, before, behind = (before,), None, names[0]
        groups.append(Group(names, before, behind))
        rest = rest[found.end() :].lstrip()
    named = [name for group in groups for name in group.names if _is_name(name)]
    if not groups or len(named) != len(set(named)):
        raise _unreadable(text, setting, "expected a distinct name for each dim")
    if sum(group.extended for group in groups) > 1:
        raise _unreadable(text, setting, "has further tokens (k+ or +k) along more than one dim")
    return Pattern(text, tuple(groups))


def unambiguous(text: str, tokens: Collection[str]) -> str:
    """``s+k`` as ``(s)+k`` where s is one of ``tokens`` and k is not: by itself it would have s further ones."""

    def written(found: re.Match[str]) -> str:
        first, second = found.groups()
        return f"({first})+{second}" if first in tokens and second not in tokens else found[0]

    return re.sub(r"(?<![\w+)])(\w+)\+(\w+)(?![\w+(])", written, text)


def alternative(text: str, ndim: int, setting: str) -> Pattern | None:
    """Of patterns separated by ``|`` the one for tensors of ``ndim`` dims; None if there is none."""
    patterns = [parse(part.strip(), setting) for part in text.split("|")]
    return next((pattern for pattern in patterns if len(pattern.groups) == ndim), None)


def _is_name(name: str) -> bool:
    return name != "_" and not name.isdecimal()


def _unknown(group: Group, sizes: Mapping[str, int]) -> list[str]:
    extras = [extra for extra in (group.before, group.behind) if extra is not None]
    return [name for name in (*group.names, *extras) if _is_name(name) and name not in sizes]


def _size(name: str, sizes: Mapping[str, int]) -> int:
    if name.isdecimal():
        return int(name)
    return sizes[name] if name != "_" else 1


def _text(group: Group) -> str:
    core = group.names[0] if len(group.names) == 1 else f"({' '.join(group.names)})"
    return f"{group.before + '+' if group.before else ''}{core}{'+' + group.behind if group.behind else ''}"


def _unreadable(text: str, setting: str, why: str) -> SequenceParallelConfigError:
    return SequenceParallelConfigError(
        setting=setting,
        value=text,
        why=why,
        remedy='write "b t s c"; for dims that lie in one "(b t) s c", for a class token in front "(b t) 1+s c"',
    )
