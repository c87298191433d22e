"""`bpfx compare`: one model and data set, trained in every way that a reader would ask about; one table, one report.

Rows are ways of training (`ROWS`); each is trained twice, with as many iterations as BP and with as much time as BP.
A comparison lives in a folder. Its compare.json is written after every run and is the source of everything else, so a
comparison that was stopped goes on where it was.
"""

from bpfx.compare.rows import ROWS, Row
from bpfx.compare.session import resume, start
from bpfx.compare.settings import Settings

__all__ = ["ROWS", "Row", "Settings", "resume", "start"]
