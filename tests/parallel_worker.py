"""What two processes do for tests/test_data_parallel.py; torchrun starts them once for all cases.

Every case compares what the processes come to together, each with its part of every batch, with what one process comes
to on the whole batches. Both work out both, so either may find the difference. The cases are in ``parallel_ddp.py`` and
``parallel_trainer.py``.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import parallel_ddp
import parallel_trainer
import torch
import torch.distributed as dist
from parallel_cases import CASES, RANK

assert parallel_ddp and parallel_trainer  # which fill CASES


def main(out: Path, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results: dict[str, str] = {}
    warnings.simplefilter("ignore")
    for name, function in CASES.items():
        if wanted and name not in wanted:
            continue
        try:
            function()
            results[name] = ""
        except Exception:  # whatever it is, the test shows it
            results[name] = traceback.format_exc()
        gc.collect()  # a wrapper's hooks go with it
        gc.freeze()  # the next collection looks at what is new only
        (out / f"{RANK}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
