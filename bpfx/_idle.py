"""Optimizer state and parameters of blocks that do not run now: away from the device, fetched one block ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from bpfx._shelf import Parked


class IdleState:
    """Keeps optimizer state, and where asked parameters, at home between uses.

    Args:
        optimizers: by block, in the order in which blocks are stepped.
        parameters: every parameter of the model and the heads, by name.
        state_home, parameter_home: where they wait; ``None`` for where they are.
    """

    def __init__(
        self,
        optimizers: Mapping[int, torch.optim.Optimizer],
        parameters: Mapping[str, Tensor],
        state_home: torch.device | None,
        parameter_home: torch.device | None,
    ) -> None:
        self.optimizers, self.state_home = optimizers, state_home
        self._order = list(optimizers)
        self._state: dict[tuple[int, str], Parked] = {}
        self._parameters = parameters if parameter_home is not None else {}
        self._home = parameter_home
        self._parked: dict[str, Parked] = {}
        self._resident: set[str] = set(self._parameters)
        self._coming: set[str] = set()
        self.release()

    # --- optimizer state ----------------------------------------------------------------------------------------------

    @contextmanager
    def stepping(self, k: int, backwards: bool = False) -> Iterator[None]:
        """Around the step of block k: its state on the device; the next block's on its way.

        Args:
            k: the block.
            backwards: the sweep goes against the order in which blocks are usually stepped.
        """
        try:
            self._move(k, "fetch")
            yield
        finally:
            self._move(k, "put_back")
        place = self._order.index(k) + (-1 if backwards else 1)
        if backwards and place < 0:
            place = 0  # the next step begins with the first block again, or fetches what it needs
        following = self._order[place % len(self._order)]
        for _, _, parked in self._entries(following):
            parked.prefetch()

    def _move(self, k: int, way: str) -> None:
        if self.state_home is None:
            return
        for state, key, parked in self._entries(k):
            if way == "fetch":
                state[key] = parked.fetch()
            else:
                parked.put_back()
                state[key] = parked.home

    def _entries(self, k: int) -> list[tuple[dict[str, Tensor], str, Parked]]:
        """Every tensor of block k's optimizer state; one that is new begins to live at home here."""
        found: list[tuple[dict[str, Tensor], str, Parked]] = []
        if self.state_home is None:
            return found
        for parameter, state in self.optimizers[k].state.items():
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.dim() == 0:
                    continue  # step counters stay where the optimizer wants them
                place = (id(parameter), key)
                parked = self._state.get(place)
                if parked is None or (value is not parked.home and value is not parked.fetched):
                    parked = self._state[place] = Parked(value, self.state_home)
                found.append((state, key, parked))
        return found

    def park(self) -> None:
        """All optimizer state home: what was loaded comes to the device."""
        for k in self._order:
            self._move(k, "put_back")

    def settle(self) -> None:
        """Wait for the copies that are under way, so that what is at home may be read."""
        parked = [*self._state.values(), *self._parked.values()]
        for device in {p.device for p in parked if p.away and p.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    # --- parameters ---------------------------------------------------------------------------------------------------

    def use(self, names: Iterable[str], ahead: Iterable[str] = ()) -> None:
        """Bring these parameters to the device and send the others home, but those that are needed next."""
        if self._home is None:
            return
        wanted = set(names) & self._parameters.keys()
        following = set(ahead) & self._parameters.keys()
        self._send_home(self._resident - wanted - following)
        for name in wanted - self._resident:
            self._parameters[name].data = self._parked[name].fetch()
            self._resident.add(name)
        for name in self._coming - wanted - following:
            self._parked[name].release()
        self._coming = following - self._resident
        for name in self._coming:
            self._parked[name].prefetch()

    @contextmanager
    def everything(self) -> Iterator[None]:
        """All parameters on their device."""
        self.use(self._parameters)
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """All parameters home."""
        self.use(())

    def _send_home(self, names: set[str]) -> None:
        for name in names:
            parameter = self._parameters[name]
            parked = self._parked.get(name)
            if parked is None or not parked.holds(parameter.data):
                parked = self._parked[name] = Parked(parameter.data, self._home)
            else:
                parked.put_back()
            parameter.data = parked.home
            self._resident.discard(name)
