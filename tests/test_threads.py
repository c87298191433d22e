"""Several models, several threads and several processes at once: each gives what it gives alone."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same_bits, seed_all
from torch import Tensor, nn

import bpfx


class Signed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign() + x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def model(seed: int, width: int = 8, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(dropout), nn.Tanh(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(width, 3))


def batch(number: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(number)
    return torch.randn(5, 6, generator=draw), torch.randint(3, (5,), generator=draw)


def train(step: bpfx.Step, steps: int, first: int = 0) -> list[Tensor]:
    """Drop-in training without random draws but those of each iteration's own seed."""
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for number in range(first, first + steps):
        loss = step(*batch(number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def everything(step: bpfx.Step) -> dict[str, Any]:
    return dict(step.state_dict())


# --- two models in one process ---------------------------------------------------------------------------------------


def test_two_converted_models_share_nothing() -> None:
    """Trained by turns, with dropout and offsets, each ends where it ends alone."""

    def run(together: bool) -> list[dict[str, Any]]:
        nets = [model(k, dropout=0.3) for k in range(2)]
        seed_all(3)
        steps = [bpfx.convert(net, F.cross_entropy, batch(0), blocks=["4"]) for net in nets]
        order = (
            [(t, k) for t in range(6) for k in range(2)] if together else [(t, k) for k in range(2) for t in range(6)]
        )
        optimizers = [torch.optim.SGD(step.parameters(), lr=0.1) for step in steps]
        for t, k in order:
            seed_all(10 * t + k)
            steps[k](*batch(t)).backward()
            optimizers[k].step()
            optimizers[k].zero_grad()
        return [everything(step) for step in steps]

    assert_same_bits(run(together=True), run(together=False))


def test_two_converted_models_have_no_object_in_common() -> None:
    steps = [bpfx.convert(model(0), F.cross_entropy, batch(0), blocks=["4"]) for _ in range(2)]
    for step in steps:
        train(step, 2)
        bpfx.BlockTrainer(step, functools.partial(torch.optim.SGD, lr=0.1)).step(*batch(2))
    places = [{t.data_ptr() for t in everything(step).values() if isinstance(t, Tensor)} for step in steps]
    assert not places[0] & places[1]
    assert steps[0].offset is not steps[1].offset, "changing one step's settings would change the other's"
    assert steps[0].offset_state is not steps[1].offset_state
    assert steps[0].diagnostics is not steps[1].diagnostics


def test_converting_leaves_the_generators_of_the_process_alone() -> None:
    seed_all(5)
    before = torch.get_rng_state(), random.getstate()
    net = model(0)  # seeds
    seed_all(5)
    step = bpfx.convert(net, F.cross_entropy, batch(0), blocks=["4"])
    bpfx.audit(step)
    step.evaluate_blocks(*batch(1))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


# --- two threads -----------------------------------------------------------------------------------------------------


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """The results of functions that begin together, each in a thread of its own."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def run(k: int) -> None:
        try:
            begin.wait()
            results[k] = works[k]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def job(k: int, net: nn.Module) -> Callable[[], Any]:
    def work() -> Any:
        found = []
        for _ in range(2):  # converting while the other steps, and stepping while the other converts
            step = bpfx.convert(net, F.cross_entropy, batch(k), blocks=["4"])
            with torch.no_grad():
                for head in step.heads.parameters():
                    head.fill_(0.01)  # heads begin with random numbers, which the threads draw from one generator
            trainer = bpfx.BlockTrainer(step, functools.partial(torch.optim.SGD, lr=0.1), micro_batches=2)
            losses = train(step, 4, k) + [trainer.step(*batch(t)) for t in range(3)]
            found.append([losses, everything(step), [block.opaque for block in step.plan.blocks]])
        return found

    return work


def test_two_threads_convert_and_step_as_one_after_the_other() -> None:
    nets = lambda: [model(k, 8 + 4 * k) for k in range(2)]  # noqa: E731
    expected = [job(k, net)() for k, net in enumerate(nets())]
    assert_same_bits(at_once(*(job(k, net) for k, net in enumerate(nets()))), expected)


def test_recomputing_draws_the_same_while_another_thread_draws() -> None:
    """The loss is linear in each weight, so a gradient times its weight is the loss: with other draws it is not."""

    def work(seed: int) -> Callable[[], list[float]]:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Dropout(0.5), nn.Linear(8, 3, bias=False)).double()
        pair = batch(seed)[0].double(), torch.zeros(5)
        step = bpfx.convert(net, lambda output, y: output.sum() + 0 * y.sum(), pair, blocks=["2"], offset=None)

        def run() -> list[float]:
            worst = []
            for _ in range(60):
                found = step.run_bp(*pair)
                products = [float((found.grads[n] * p.detach()).sum() / found.loss) for n, p in net.named_parameters()]
                worst.append(max(abs(p - 1) for p in products))
            return worst

        return run

    for worst in at_once(work(1), work(2)):
        assert max(worst) < 1e-6


def test_functions_of_another_thread_are_not_taken_for_the_models() -> None:
    """While a model is captured its custom functions are looked for."""
    stop, x = threading.Event(), torch.randn(3, requires_grad=True)

    def busy() -> None:
        while not stop.is_set():
            Signed.apply(x).sum().backward()

    other = threading.Thread(target=busy)
    other.start()
    try:
        step = bpfx.convert(model(0), F.cross_entropy, batch(0), blocks=["4"])
    finally:
        stop.set()
        other.join()
    assert not any(block.opaque for block in step.plan.blocks)


def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not() -> None:
    from bpfx import _alone

    held, done = threading.Event(), threading.Event()

    @_alone.alone
    def hold() -> None:
        held.set()
        done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    process = os.fork()
    if process == 0:
        _alone.alone(lambda: os._exit(7))()
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7


# --- two processes ---------------------------------------------------------------------------------------------------

COMPILING = """
import sys, torch
from torch import nn
import bpfx
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
batch = torch.randn(5, 6), torch.randint(3, (5,))
step = bpfx.convert(net, nn.functional.cross_entropy, batch, blocks=2, offset=None, compile="inductor")
print([float(loss) for loss in step.run_local(*batch).local_losses])
"""


@pytest.mark.filterwarnings("ignore")
def test_two_processes_compile_with_inductor_into_one_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILING]
    begun = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=240) for process in begun]
    assert [process.returncode for process in begun] == [0, 0], said
    assert said[0][0] == said[1][0]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(5, 6), torch.randint(3, (5,))
    assert eval(said[0][0])[-1] == pytest.approx(float(F.cross_entropy(net(x), y)), rel=1e-5)
