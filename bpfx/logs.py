"""Where diagnostics go: a table, a CSV file, TensorBoard, or any function that takes a dictionary of numbers.

What a listener gets is flat, one dictionary per refresh and one per window of local losses:

    {"iteration": 8, "cosine": 0.41, "period": 4, "block0/cosine": 0.35, "block0/ratio": 0.93, …}
    {"iteration": 49, "block0/loss": 1.31, "block1/loss": 0.87, …}

Of several processes that torchrun starts, the writers of the first one write: what they measure together is the same.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpfx._ranks import is_rank_zero
from bpfx.errors import BpfxError, BpfxWarning

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from bpfx.step import Step

__all__ = ["LOSSES", "REFRESHES", "CsvWriter", "Listener", "Scalars", "TensorBoardWriter", "scalars", "table"]

Scalars = dict[str, float]
Listener = Callable[[Scalars], Any]

REFRESHES = (
    *("cosine", "ratio", "staleness", "spread", "descent", "bp", "local"),
    *("norm", "alpha", "lam", "period"),
)
LOSSES = ("loss",)
_KEY = re.compile(r"block(\d+)/(\w+)")


def scalars(record: Mapping[str, Any]) -> Scalars:
    """One record of ``step.diagnostics.refreshes`` as a flat dictionary; what is ``None`` is left out.

    Example:
        >>> scalars({"iteration": 4, "cosine": 0.5, "blocks": [{"block": 0, "cosine": 0.5, "staleness": None}]})
        {'iteration': 4, 'cosine': 0.5, 'block0/cosine': 0.5}
    """
    flat: Scalars = {name: value for name, value in record.items() if _is_number(value)}
    for block in record["blocks"]:
        flat |= {f"block{block['block']}/{name}": v for name, v in block.items() if name != "block" and _is_number(v)}
    return flat


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _by_block(flat: Mapping[str, float]) -> dict[int, Scalars]:
    blocks: dict[int, Scalars] = {}
    for key, value in flat.items():
        found = _KEY.fullmatch(key)
        if found:
            blocks.setdefault(int(found[1]), {})[found[2]] = value
    return blocks


class Listeners:
    """The functions that hear of what is measured. One that fails is removed, with a warning, and training goes on."""

    def __init__(self) -> None:
        self._callbacks: dict[object, Listener] = {}

    def add(self, callback: Listener) -> Callable[[], None]:
        """Take a function; the call that removes it again."""
        token = object()  # the same function may listen twice
        self._callbacks[token] = callback

        def remove() -> None:
            self._callbacks.pop(token, None)

        return remove

    def tell(self, flat: Mapping[str, float]) -> None:
        """Call them all, each with a dictionary of its own."""
        failed = []
        for token, callback in list(self._callbacks.items()):
            try:
                callback(dict(flat))
            # In the middle of a step: an error passed on would leave a new offset with an old gradient.
            except Exception as error:
                self._callbacks.pop(token, None)
                failed.append((callback, error))
        for callback, reason in failed:  # once all are told, since a warning may be made an error
            name = getattr(callback, "__qualname__", type(callback).__qualname__)
            warnings.warn(
                f"the listener {name} failed at iteration {flat['iteration']} and hears no more: "
                f"{type(reason).__name__}: {reason}",
                BpfxWarning,
                stacklevel=3,
            )


class CsvWriter:
    """A listener that writes one row per block and refresh.

    The file has one header and its iterations only go up. A refresh at or before the last one written (a run that went
    back to a checkpoint, a step that failed and is tried again) replaces every row from there on. Each refresh is one
    write, so a killed process leaves whole rows; the half of one that a full disk leaves is dropped by the next writer.

    Args:
        path: of the file; begun where there is none and continued where there is, folders included.
        columns: of a block, by name: :data:`REFRESHES`, or :data:`LOSSES` for the local losses instead.
        every_rank: write in every process of torch.distributed, not in the first one only; to be given a path each.

    Raises:
        BpfxError: the file is there and holds something else, or is a folder; a column of another name.

    Example:
        >>> remove = step.diagnostics.listen(CsvWriter("refreshes.csv"))  # doctest: +SKIP
    """

    def __init__(self, path: str | Path, columns: Sequence[str] = REFRESHES, every_rank: bool = False) -> None:
        if isinstance(columns, str) or not columns or not {*columns} <= {*REFRESHES, *LOSSES}:
            known = f"{', '.join(REFRESHES)} of refreshes, {', '.join(LOSSES)} of local losses"
            raise BpfxError(f"CsvWriter(columns={columns!r}): pass a list of names out of {known}")
        self.path, self.columns = Path(path), ("iteration", "block", *columns)
        self.last = -1  # iteration of the last rows
        self._writes = every_rank or is_rank_zero()
        if not self._writes:
            return
        if self.path.is_dir():
            raise BpfxError(f"CsvWriter({str(path)!r}): that is a folder; pass the path of a file in it")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or not self.path.stat().st_size:
            self._append([self.columns])
        self._rewind(None)

    def __call__(self, flat: Mapping[str, float]) -> None:
        if not self._writes:
            return
        rows = [
            [flat["iteration"], block, *(values.get(name, "") for name in self.columns[2:])]
            for block, values in sorted(_by_block(flat).items())
            if not values.keys().isdisjoint(self.columns)
        ]
        if not rows:
            return
        if flat["iteration"] <= self.last:
            self._rewind(int(flat["iteration"]))
        self._append(rows)
        self.last = int(flat["iteration"])

    def resume(self, step: Step) -> None:
        """Make the file that of a step whose state was just loaded: nothing from its iteration on, nothing missing.

        Refreshes that were written after the checkpoint go, and come again as training takes them again. Those that the
        file lacks (it was lost, say) are written from ``step.diagnostics``, as far back as that reaches.

        Example:
            >>> step.load_state_dict(torch.load("step.pt"))  # doctest: +SKIP
            >>> writer = CsvWriter("refreshes.csv")  # doctest: +SKIP
            >>> writer.resume(step)  # doctest: +SKIP
            >>> step.diagnostics.listen(writer)  # doctest: +SKIP
        """
        if not self._writes:
            return
        records = step.diagnostics.refreshes
        self._rewind(step.iteration)
        if any(record["iteration"] == self.last for record in records):
            self._rewind(self.last)  # not every block of it may have reached the disk
        for record in records:
            if record["iteration"] > self.last:
                self(scalars(record))

    def _append(self, rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        # Opened anew each time: nothing to close, and nothing that waits in a buffer when the process ends.
        with self.path.open("ab") as file:
            file.write(text.getvalue().encode())

    def _rewind(self, iteration: int | None) -> None:
        """Cut the file before the first row of this iteration or a later one, or before a line without its end."""
        self.last, end = -1, 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if not number and not f"{','.join(self.columns)}\n".encode().startswith(line):
                    raise BpfxError(f"{self.path} holds something else: its first line is not {','.join(self.columns)}")
                if not line.endswith(b"\n"):
                    break
                if number:
                    at = self._iteration(line, number + 1)
                    if iteration is not None and at >= iteration:
                        break
                    self.last = at
                end += len(line)
            whole = file.seek(0, io.SEEK_END) == end
        if not whole:
            with self.path.open("r+b") as file:
                file.truncate(end)
        if not end:
            self._append([self.columns])

    def _iteration(self, line: bytes, number: int) -> int:
        cells = line.split(b",")
        if len(cells) != len(self.columns) or not cells[0].isdigit():
            raise BpfxError(f"{self.path} cannot be continued: line {number} is no row of {len(self.columns)} cells")
        return int(cells[0])


class TensorBoardWriter:
    """A listener that writes TensorBoard events, one scalar per key and flushed at once.

    Args:
        folder: of the events; ``tensorboard --logdir FOLDER`` shows them.
        start: iteration at which a resumed run goes on: TensorBoard hides what was written from there on before.
        every_rank: as for :class:`CsvWriter`.

    Raises:
        BpfxError: tensorboard is not installed; the folder is a file.

    Example:
        >>> writer = TensorBoardWriter("runs/first", start=step.iteration or None)  # doctest: +SKIP
        >>> remove = step.diagnostics.listen(writer)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, start: int | None = None, every_rank: bool = False) -> None:
        made, writes = summary_writer(), every_rank or is_rank_zero()
        if Path(folder).is_file():
            raise BpfxError(f"TensorBoardWriter({str(folder)!r}): that is a file; pass a folder for the events")
        self._writer: SummaryWriter | None = made(str(folder), purge_step=start) if writes else None

    def __call__(self, flat: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        iteration = int(flat["iteration"])
        for key, value in flat.items():
            if key != "iteration":
                self._writer.add_scalar(key, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Close the file; the writer takes nothing more."""
        if self._writer is not None:
            self._writer.close()


def summary_writer() -> type[SummaryWriter]:
    """PyTorch's writer of events.

    Raises:
        BpfxError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BpfxError("TensorBoard events need tensorboard: pip install 'bpfx[tensorboard]'") from None
    return SummaryWriter


_SHOWN = {
    "cosine": "cosine",
    "ratio": "ratio",
    "staleness": "staleness",
    "spread": "spread",
    "descent": "descent",
    "bp": "|g_BP|",
    "local": "|g_local|",
    "norm": "|Δ|",
    "alpha": "α",
    "lam": "λ",
    "period": "K",
    "loss": "local loss",
}


def table(step: Step) -> str:
    """The latest refresh and the latest window of local losses as text, a line per block.

    A column without any value is left out; a single value that is missing is a dash.

    Example:
        >>> import torch, bpfx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
        >>> step = bpfx.convert(net, torch.nn.functional.cross_entropy, (x, y), blocks=2)
        >>> loss = step(x, y)
        >>> print(table(step).partition(":")[0])
        refresh at iteration 0
    """
    diagnostics = step.diagnostics
    blocks: dict[int, Scalars] = {}
    titles = []
    if diagnostics.refreshes:
        record = diagnostics.refreshes[-1]
        blocks = _by_block(scalars(record))
        titles.append(f"refresh at iteration {record['iteration']}: mean cosine {record['cosine']:.3f}")
    if diagnostics.learning.windows:
        titles.append("local losses: means over the last window")
        for k, mean in diagnostics.learning.windows[-1].items():
            blocks.setdefault(k, {})["loss"] = mean
    if not blocks:
        return "nothing measured yet: no refresh, and no window of local losses"
    columns = [name for name in _SHOWN if any(name in values for values in blocks.values())]
    lines = [["block", *(_SHOWN[name] for name in columns), "modules"]]
    names = {block.index: block.name for block in step.plan.blocks}
    for k, values in sorted(blocks.items()):
        cells = [f"{values[name]:.4g}" if name in values else "–" for name in columns]
        lines.append([str(k), *cells, names.get(k, "")])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False)), line[-1]])
        for line in lines
    ]
    return "\n".join(["; ".join(titles), *(line.rstrip() for line in aligned)])
