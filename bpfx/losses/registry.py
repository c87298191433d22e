"""Local losses by name, and which block has which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from bpfx.errors import BpfxError
from bpfx.losses.protocol import LocalLoss

GROUP = "bpfx.losses"  # of entry points
OTHERS = "*"  # the key for blocks that no other key names

_FACTORIES: dict[str, Callable[[], LocalLoss]] = {}


def register(factory: Callable[[], LocalLoss], name: str | None = None) -> Callable[[], LocalLoss]:
    """Make a local loss known by its name. Usable as a decorator on a :class:`bpfx.losses.LocalLoss`.

    Args:
        factory: called without arguments for every conversion that asks for the name.
        name: ``factory.name`` where it is left out.

    Raises:
        BpfxError: it has no name, or the name is another loss's.
    """
    found = name or getattr(factory, "name", "")
    if not found or not isinstance(found, str):
        raise BpfxError(f"{factory!r} has no name; give the class one, or pass name=")
    if found in _FACTORIES and not _same(_FACTORIES[found], factory):
        raise BpfxError(f"a local loss named {found!r} is registered already: {_FACTORIES[found]!r}")
    _FACTORIES[found] = factory
    return factory


def _same(one: Any, other: Any) -> bool:
    """Whether it is the same class, or the same one defined again (a notebook's cell that ran twice)."""
    where = [(getattr(f, "__module__", None), getattr(f, "__qualname__", None)) for f in (one, other)]
    return one is other or (where[0] == where[1] and isinstance(one, type) and isinstance(other, type))


def names() -> list[str]:
    """Names of all local losses, those of installed packages included."""
    return sorted({*_FACTORIES, *(point.name for point in entry_points(group=GROUP))})


def get(loss: str | LocalLoss) -> LocalLoss:
    """The local loss of that name, or the instance itself.

    Example:
        >>> get("supervised").name
        'supervised'

    Raises:
        BpfxError: no local loss has that name, or what has it is none.
    """
    if isinstance(loss, LocalLoss):
        return loss
    if not isinstance(loss, str):
        raise BpfxError(f"local_loss={loss!r}: pass a name ({', '.join(names())}) or an instance from bpfx.losses")
    if loss not in _FACTORIES:
        for point in entry_points(group=GROUP):
            if point.name == loss:
                try:
                    register(point.load(), loss)
                except ImportError as error:
                    raise BpfxError(f"local_loss={loss!r} is {point.value}, which fails to import: {error}") from error
                break
        else:
            raise BpfxError(f"local_loss={loss!r} is not known; the known ones are {', '.join(names())}")
    made = _FACTORIES[loss]()
    if not isinstance(made, LocalLoss):
        raise BpfxError(
            f"local_loss={loss!r} was registered with {_FACTORIES[loss]!r}, which made no LocalLoss: {made!r}"
        )
    return made


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A local loss and the factor its gradients are multiplied by."""

    loss: LocalLoss
    weight: float = 1.0


Choice = str | LocalLoss | tuple[str | LocalLoss, float]


class Assignment:
    """The local loss of every block.

    Args:
        choice: one loss for all blocks, or a mapping from module names (``"layer1"``: the blocks that end in it) or
            block numbers to losses, with ``"*"`` for all others (``"supervised"`` where it is left out). A pair
            ``(loss, weight)`` scales the block's local loss.
    """

    def __init__(self, choice: Choice | Mapping[Any, Choice]) -> None:
        self._by_key: dict[Any, Weighted]
        if isinstance(choice, Mapping):
            self._by_key = {key: _weighted(value, f"local_loss[{key!r}]") for key, value in choice.items()}
            for key in self._by_key:
                if not isinstance(key, (str, int)) or isinstance(key, bool):
                    raise BpfxError(f"local_loss has the key {key!r}; keys are module names, block numbers or '*'")
        else:
            self._by_key = {OTHERS: _weighted(choice, "local_loss")}
        # Blocks without a key. Nobody may be left, so what was not asked for has no say in a horizon.
        self._unnamed = OTHERS not in self._by_key
        self._others = Weighted(get("supervised")) if self._unnamed else self._by_key.pop(OTHERS)
        self.rows = self._rows()

    @property
    def losses(self) -> list[LocalLoss]:
        """Every loss that is named."""
        return [w.loss for w in (*self._by_key.values(), self._others)]

    @property
    def horizon(self) -> int:
        """The horizon that the losses ask for.

        Raises:
            BpfxError: they do not agree.
        """
        named = [w.loss for w in self._by_key.values()] if self._unnamed else self.losses
        asked = {loss.horizon: loss.name for loss in named} or {1: self._others.loss.name}
        if len(asked) > 1:
            words = ", ".join(f"{name} {h}" for h, name in sorted(asked.items()))
            raise BpfxError(f"the local losses ask for different horizons ({words}); pass horizon=")
        return next(iter(asked))

    @property
    def label_free(self) -> bool:
        """Whether none of them needs a task loss."""
        return all(loss.label_free for loss in self.losses)

    def _rows(self) -> LocalLoss | None:
        making = [loss for loss in self.losses if loss.rows > 1]
        for other in making[1:]:
            if type(other) is not type(making[0]) or vars(other) != vars(making[0]):
                raise BpfxError(
                    f"{making[0].name} and {other.name} each make rows of their own from a batch; give all blocks that "
                    "have such a loss the same instance"
                )
        return making[0] if making else None

    def of(self, index: int, modules: Sequence[str]) -> Weighted:
        """The loss of one block.

        Args:
            index: of the block.
            modules: paths of its modules, in order.
        """
        if index in self._by_key:
            return self._by_key[index]
        last = modules[-1] if modules else ""
        keys = [k for k in self._by_key if isinstance(k, str) and (last == k or last.startswith(f"{k}."))]
        return self._by_key[max(keys, key=len)] if keys else self._others

    def wanting(self) -> str:
        """Which loss needs a task loss, in words."""
        name = next(loss.name for loss in self.losses if not loss.label_free)
        if self._unnamed and name == self._others.loss.name:
            return f"the local loss {name!r}, of the model's output and of blocks without a key (add '*' for another),"
        return f"the local loss {name!r}"

    def check(self, blocks: Sequence[tuple[int, Sequence[str], str]]) -> None:
        """Raise where a key names no block.

        Args:
            blocks: index, module paths and name of every block that has a local loss, or would have with a smaller
                horizon.

        Raises:
            BpfxError: which key, and what the blocks are.
        """
        used = [self.of(index, modules) for index, modules, _ in blocks]
        for key, weighted in self._by_key.items():
            if not any(weighted is w for w in used):
                shown = ", ".join(f"{i} ({name})" for i, _, name in blocks[:8])
                raise BpfxError(
                    f"local_loss has the key {key!r}, but no block with a local loss has that number or ends in a "
                    f"module of that name; the blocks are {shown or 'none: the model is one block'}"
                )


def _weighted(value: Choice, where: str) -> Weighted:
    if isinstance(value, tuple):
        if len(value) != 2 or isinstance(value[1], bool) or not isinstance(value[1], (int, float)):
            raise BpfxError(f"{where}={value!r}: pass a loss, or a pair (loss, weight)")
        if not 0 < value[1] < float("inf"):
            raise BpfxError(f"{where}: the weight is {value[1]!r}, it must be positive and finite")
        return Weighted(get(value[0]), float(value[1]))
    return Weighted(get(value))
