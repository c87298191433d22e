"""The offset's two forms, what scales it, and the iterations in which exact BP takes its place."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
import zoo
from oracles import (
    assert_buffers,
    assert_gradients,
    bp_oracle,
    detached_oracle,
    drop_in,
    seed_all,
)
from test_exactness import combine, convert, of_heads, of_model, setting
from torch import Tensor, nn
from torch.nn import functional as F
from twins import case_of, cuts_of

import bpfx
from bpfx._correction import EXACT, LOCAL, REFRESH
from bpfx._period import Pace, PeriodRule

# --- forms and scales -------------------------------------------------------------------------------------------------

CASES = [  # form, α, λ
    ("A", 1.0, 1.0),
    ("A", 0.5, 0.7),
    ("B", 1.0, 1.0),
    ("B", 0.5, 1.0),
    ("B", 0.0, 1.0),
    ("B", 0.3, 0.6),
]


@pytest.mark.parametrize(("form", "alpha", "lam"), CASES)
def test_gradients_of_a_refresh_and_of_the_step_after_it(form: str, alpha: float, lam: float) -> None:
    """At a refresh and one step later, with another batch order of draws, g̃ is what the formula says."""
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(period=2, form=form, alpha=alpha, lam=lam, decay=0.5))
    first = bp_oracle(case, 0), detached_oracle(case, step.heads, cuts, 0)
    inside = 1.0 if form == "A" else alpha
    delta = combine(lambda g, own: g - inside * own, first[0].grads, of_model(first[1]))
    for t in range(2):
        now = detached_oracle(case, step.heads, cuts, t)
        found = drop_in(step, case.batch, seed=t)
        names = set(step.plan.blocks[-1].parameter_names)
        expected = {}
        for name, own in of_model(now).items():
            scale = 1.0 if form == "B" and name in names else alpha
            offset = torch.zeros_like(own) if name in names else delta[name]
            expected[name] = scale * own + lam * 0.5**t * offset
        assert_gradients(of_model(found), expected)
        assert_gradients(of_heads(found), of_heads(now))


def test_control_variate_with_alpha_one_is_form_a_and_with_zero_the_stale_bp_gradient() -> None:
    found = {}
    for form, alpha in (("A", 1.0), ("B", 1.0), ("B", 0.0)):
        torch.manual_seed(0)  # the same heads
        case, cuts = setting("eager")
        step = convert(case, cuts, offset=bpfx.Offset(period=3, form=form, alpha=alpha))
        bp = bp_oracle(case, 0)
        for t in range(2):
            found[form, alpha] = of_model(drop_in(step, case.batch, seed=t))
    assert_gradients(found["B", 1.0], found["A", 1.0])
    inner = set(step.offset_state)
    stale = found["B", 0.0]
    assert_gradients({n: stale[n] for n in inner}, {n: bp.grads[n] for n in inner})


@pytest.mark.parametrize("clip", [0.1, 0.5, 1e9])
def test_clip_bounds_the_offset_block_by_block(clip: float) -> None:
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(period=1, clip=clip))
    bp, local = bp_oracle(case, 0), of_model(detached_oracle(case, step.heads, cuts, 0))
    found = of_model(drop_in(step, case.batch, seed=0))
    logged = {record["block"]: record["lam"] for record in step.diagnostics.refreshes[0]["blocks"]}
    for block in step.plan.blocks[:-1]:
        names = block.parameter_names
        added = norm({n: found[n] - local[n] for n in names})
        limit = clip * norm({n: local[n] for n in names})
        whole = norm({n: bp.grads[n] - local[n] for n in names})
        assert added == pytest.approx(min(limit, whole), rel=1e-6)
        assert logged[block.index] == pytest.approx(min(limit / whole, 1.0) if whole else 1.0, rel=1e-6)


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors.values()))


def test_a_list_is_a_schedule() -> None:
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(period=1, lam=[1.0, 0.0]))
    bp, local = bp_oracle(case, 0), of_model(detached_oracle(case, step.heads, cuts, 1))
    assert_gradients(of_model(drop_in(step, case.batch, seed=0)), bp.grads)
    assert_gradients(of_model(drop_in(step, case.batch, seed=1)), local)


@pytest.mark.parametrize("alpha", ["auto", [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]])
def test_a_changing_alpha_holds_until_the_next_refresh(alpha: Any) -> None:
    """At frozen weights and draws form B is BP's gradient in every iteration, whatever α is at each."""
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(period=3, form="B", alpha=alpha))
    bp = bp_oracle(case, 0)
    for _ in range(6):
        assert_gradients(of_model(drop_in(step, case.batch, seed=0)), bp.grads)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_form_b_keeps_the_gradients_of_tied_parameters(alpha: float) -> None:
    entry = zoo.ZOO["gpt2"]  # embedding and unembedding are one
    case = entry.case()
    step = convert(case, entry.cuts, offset=bpfx.Offset(period=2, form="B", alpha=alpha))
    assert step._correction.shared
    for _ in range(2):
        bp = bp_oracle(case, 0)
        assert_gradients(of_model(drop_in(step, case.batch, seed=0)), bp.grads)


def test_norms_of_sums_are_those_of_the_stored_offsets() -> None:
    x, y = torch.randn(8, 6, dtype=torch.double), torch.randint(0, 3, (8,))
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    offset = bpfx.Offset(period=2, micro_batches=4)
    step = bpfx.convert(net, functools.partial(F.cross_entropy, reduction="sum"), (x, y), blocks=["2"], offset=offset)
    step(x, y)
    (block,) = step.diagnostics.refreshes[-1]["blocks"]
    assert block["norm"] == pytest.approx(norm(dict(step.offset_state)), rel=1e-9)


# --- exact steps ------------------------------------------------------------------------------------------------------


def auto(case: Any, cuts: Any, **options: Any) -> Any:
    return convert(case, cuts, offset=bpfx.Offset(**options))


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("name", ["convnet", "gpt2", "branch_inside", "lstm", "unet"])
def test_exact_steps_are_bp_and_heads_learn_on(name: str, horizon: int) -> None:
    """The iterations between a rule's first refreshes: BP gradients, heads' own local gradients, statistics once."""
    case, cuts = setting("eager") if name == "convnet" else (zoo.ZOO[name].case(), zoo.ZOO[name].cuts)
    step = convert(case, cuts, horizon=horizon, offset=bpfx.Offset())
    for t in range(3):
        assert step._correction.kind(t) == (REFRESH if t == 0 else EXACT)
        bp = bp_oracle(case, t)
        expected = expected_heads(case, step, t)
        found = drop_in(step, case.batch, seed=t)
        assert_gradients(of_model(found), bp.grads)
        if expected or of_heads(found):  # with as few blocks as the horizon there are no heads
            assert_gradients(of_heads(found), expected)
        assert_buffers(found.buffers, bp.buffers)
        assert torch.allclose(found.loss, bp.loss, rtol=1e-5)


def expected_heads(case: Any, step: Any, seed: int) -> dict[str, Tensor]:
    """The heads' gradients in a local step; model, heads and generators are left as they were."""
    state = copy.deepcopy(dict(step.named_buffers()))
    seed_all(seed)
    batch = case.batch
    grads = step.run_local(**batch).grads if isinstance(batch, dict) else step.run_local(*batch).grads
    with torch.no_grad():
        for n, b in step.named_buffers():
            b.copy_(state[n])
    return {n: g for n, g in grads.items() if n.startswith("bpfx.heads.")}


def test_exact_steps_in_pieces_are_bp_as_well() -> None:
    case = zoo.mlp(4, dtype=torch.float64)
    step = convert(case, zoo.MLP_CUTS, offset=bpfx.Offset(micro_batches=2))
    for t in range(2):
        bp = bp_oracle(case, t)
        assert_gradients(of_model(drop_in(step, case.batch, seed=t)), bp.grads)
    assert len(step.diagnostics.learning._sum) == len(step.plan.blocks), "every block's loss was seen"


@pytest.mark.parametrize("options", [{"lam": "auto"}, {"micro_batches": 2}, {"lam": 0.5, "alpha": 0.5}, {"clip": 0.1}])
def test_every_step_of_an_exact_phase_is_bp(options: dict[str, Any]) -> None:
    """With BatchNorm: refreshes in pieces aside, which see other statistics."""
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(**options))
    for t in range(4):
        bp = bp_oracle(case, t)
        found = drop_in(step, case.batch, seed=t)
        if t or step.offset.micro_batches == 1:
            assert_gradients(of_model(found), bp.grads)
        assert_buffers(found.buffers, bp.buffers)


def test_local_losses_of_exact_steps_are_those_of_all_blocks() -> None:
    windows = []
    for bounds in ((1, 1), (4, 4)):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)], nn.Linear(6, 3))
        x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
        step = bpfx.convert(net, F.cross_entropy, (x, y), blocks=["1", "2", "3"], offset=bpfx.Offset(bounds=bounds))
        trainer = bpfx.BlockTrainer(step, functools.partial(torch.optim.SGD, lr=1e-9), micro_batches=2)
        for _ in range(50):
            trainer.step(x, y)
            assert list(trainer.local_losses) == [0, 1, 2, 3]
        windows.append(step.diagnostics.learning.windows[0])
    assert windows[0] == pytest.approx(windows[1], rel=1e-4)


@pytest.mark.parametrize(("name", "horizon"), [("convnet", 1), ("convnet", 2), ("gpt2_no_mask", 1), ("unet", 2)])
def test_heads_learn_alike_in_both_orders_of_an_exact_step(name: str, horizon: int) -> None:
    """Heads, model, statistics and local losses; without dropout, whose draws come in another order."""
    found = []
    for one_by_one in (False, True):
        case = case_of(name, 6, quiet=True, dtype=torch.float64)
        torch.manual_seed(0)  # the heads' weights
        step = convert(case, cuts_of(name), horizon=horizon, offset=bpfx.Offset(bounds=(1, 1)))
        trainer = bpfx.BlockTrainer(step, functools.partial(torch.optim.SGD, lr=0.1), micro_batches=2)
        trainer._one_by_one = one_by_one
        for _ in range(2):
            trainer.step(**case.batch) if isinstance(case.batch, dict) else trainer.step(*case.batch)
        found.append((step.state_dict(), dict(trainer.local_losses)))
        assert step._correction.kind(1) == EXACT
    tensors = [{n: t for n, t in state.items() if isinstance(t, Tensor)} for state, _ in found]
    assert any(n.startswith("heads.") for n in tensors[0]) or horizon > 1
    torch.testing.assert_close(tensors[0], tensors[1], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_memory_budget_rules_out_exact_steps_that_do_not_fit() -> None:
    net = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(16)])
    model = nn.Sequential(net, nn.Linear(64, 4))
    batch = torch.randn(2048, 64), torch.randint(0, 4, (2048,))
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=16)
    trainer = bpfx.BlockTrainer(step, functools.partial(torch.optim.SGD, lr=0.01), micro_batches=4)
    predicted = trainer.predict(*batch)
    between = (predicted["refresh_serial"].peak_bytes + predicted["bp_serial"].peak_bytes) // 2
    step.plan.budget = between
    with pytest.warns(bpfx.BpfxWarning, match="exact BP steps would take"):
        bpfx.BlockTrainer(step, functools.partial(torch.optim.SGD, lr=0.01), micro_batches=4)
    assert not step._correction.rule.exact
    assert [trainer.step(*batch) is not None and step._correction.kind(t) for t in range(1, 4)] == [LOCAL] * 3


@pytest.mark.parametrize(("micro_batches", "one_by_one"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.1, "clip": "global"}])
@pytest.mark.parametrize("tied", [False, True])
def test_a_trainer_with_the_default_offset_begins_as_plain_training(
    micro_batches: int, one_by_one: bool, clip: dict[str, Any], tied: bool
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)], nn.Linear(6, 3)).double()
    if tied:
        net[2][0].weight = net[0][0].weight
    plain = copy.deepcopy(net)
    x, y = torch.randn(8, 6, dtype=torch.double), torch.randint(0, 3, (8,))
    step = bpfx.convert(net, F.cross_entropy, (x, y), blocks=["1", "2", "3", "4"])
    heads = copy.deepcopy(step.heads)
    trainer = bpfx.BlockTrainer(step, functools.partial(torch.optim.SGD, lr=0.1), micro_batches=micro_batches, **clip)
    trainer._one_by_one = one_by_one
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    kinds = []
    for t in range(4):
        kinds.append(step._correction.kind(t))
        trainer.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        if clip and kinds[-1] == EXACT:
            continue  # the norm has the heads' gradients in it: not plain training's
        optimizer.step()
        if not clip:
            for found, expected in zip(net.parameters(), plain.parameters(), strict=True):
                assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert kinds == [REFRESH, EXACT, EXACT, EXACT]
    for before, after in zip(heads.parameters(), step.heads.parameters(), strict=True):
        assert not torch.equal(before, after), "heads learn in exact steps as well"


# --- the rule ---------------------------------------------------------------------------------------------------------


def kinds(rule: PeriodRule, count: int, descent: Any) -> str:
    """A letter per iteration: Refresh, Exact, Local."""
    letters = ""
    for t in range(count):
        kind = rule.kind(t)
        letters += kind[0].upper()
        if kind == REFRESH:
            rule.measured(t, dict(enumerate(descent(t))))
    return letters


RULES = [
    ({"period": 3}, -1.0, "RLLRLLRLLRLL"),
    ({"period": 1}, 0.5, "RRRRR"),
    ({}, -0.2, "REEE" * 4 + ("R" + "E" * 11 + "REEE") * 3),  # the offset leads away: exact for ever
    ({}, 0.02, "REEE" * 4 + ("R" + "E" * 11 + "REEE") * 3),  # neither here nor there: exact costs time only
    ({}, 0.5, "REEE" * 4 + "RLLL" * 4),  # lasts: four pairs decide
    ({"bounds": (1, 16)}, 0.5, "REEE" * 4 + "RLLL" * 4 + "RLLLLLLL" * 4 + "R" + "L" * 15),
    ({"bounds": (2, 8)}, 0.5, "RL" * 4 + "RLLL" * 4 + "RLLLLLLL"),
    ({"bounds": (2, 2)}, -0.5, "RLRLRLRL"),
    ({}, [0.9, 0.9, -0.6], "REEE" * 4 + ("R" + "E" * 11 + "REEE") * 3),  # one block's offset overshoots
    ({"bounds": (1, 3)}, 0.5, "REEE" * 4 + "R" + "E" * 11),  # no period between 1 and 4 is worth it
]


@pytest.mark.parametrize(("options", "descent", "expected"), RULES)
def test_the_period_follows_the_offsets(options: dict[str, Any], descent: Any, expected: str) -> None:
    rule = PeriodRule(bpfx.Offset(**options))
    descents = descent if isinstance(descent, list) else [descent]
    assert kinds(rule, len(expected), lambda t: descents) == expected


def test_a_period_that_has_become_too_long_is_given_up() -> None:
    rule = PeriodRule(bpfx.Offset())
    letters = kinds(rule, 100, lambda t: [0.5 if t < 30 else -0.5])
    assert "RLLL" in letters[:30] and "L" not in letters[60:] and letters[60:].count("R") < 10


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([-0.2], "RLLL" + "REEE"),  # on trial: one refresh is enough
        ([-0.05], "RLLL" * 4 + "REEE"),  # not clearly: the mean of four
        ([0.9, -0.6], "RLLL" * 2 + "REEE"),  # a block in which Δ leads up twice
    ],
)
def test_a_period_on_trial_is_given_up(after: list[float], expected: str) -> None:
    rule = PeriodRule(bpfx.Offset())
    assert kinds(rule, 16 + len(expected), lambda t: [0.5] if t <= 16 else after)[16:] == expected


def test_blocks_that_lead_up_by_turns_are_no_reason_to_go_back() -> None:
    rule = PeriodRule(bpfx.Offset())
    turns = kinds(rule, 60, lambda t: [-0.6, 0.9, 0.9] if t // 4 % 2 else [0.9, -0.6, 0.9])
    assert turns[16:] == "RLLL" * 11


def test_a_rule_goes_on_where_it_was_saved() -> None:
    def descent(t: int) -> list[float]:
        return [0.3 if t < 25 else -0.1]

    whole = kinds(PeriodRule(bpfx.Offset()), 60, descent)
    rule = PeriodRule(bpfx.Offset())
    begun = kinds(rule, 23, descent)
    again = PeriodRule(bpfx.Offset())
    again.load(rule.state())
    rest = ""
    for t in range(23, 60):
        kind = again.kind(t)
        rest += kind[0].upper()
        if kind == REFRESH:
            again.measured(t, dict(enumerate(descent(t))))
    assert begun + rest == whole


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0), (2.0, 0), (20.0, 1)])
def test_only_a_jump_of_the_movement_is_news(factor: float, expected: int) -> None:
    torch.manual_seed(0)
    weight = torch.zeros(200)
    pace = Pace(lambda: [weight])
    heard = []
    for t in range(40):
        heard.append(pace.jumped(t))
        weight += 0.01 * (factor if t >= 20 else 1.0) * torch.randn(200)
    told = [h for h in heard if h is not None]
    assert len(told) == expected and all(factor / 2 < h < factor * 2 for h in told)


def test_messages_of_settings() -> None:
    wrong = [
        ({"period": 0}, "period=0"),
        ({"period": "often"}, "'auto'"),
        ({"lam": -0.5}, "lam=-0.5"),
        ({"lam": []}, "lam=\\[\\]"),
        ({"lam": [1.0, -1.0]}, "at least 0"),
        ({"alpha": "auto"}, "form='B'"),
        ({"form": "C"}, "form='C'"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"clip": 0}, "clip=0"),
        ({"bounds": (8, 4)}, "bounds"),
        ({"bounds": 4}, "bounds"),
        ({"period": 4, "bounds": (1, 8)}, "bounds are those of period='auto'"),
        ({"match": -1}, "match=-1"),
    ]
    for options, words in wrong:
        with pytest.raises(bpfx.BpfxError, match=words):
            bpfx.Offset(**options)


def test_a_schedule_shorter_than_the_run_stops_before_anything_changes() -> None:
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(period=2, lam=[1.0, 0.9]))
    for t in range(2):
        drop_in(step, case.batch, seed=t)
    before = copy.deepcopy(step.state_dict())
    with pytest.raises(bpfx.BpfxError, match=r"no value for iteration 2 \(it has 2 values\)"):
        step(*case.batch)
    after = step.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if isinstance(before[n], Tensor))
    assert before["_extra_state"]["correction"]["rule"] == after["_extra_state"]["correction"]["rule"]


def test_offsets_of_a_loaded_state_do_not_reach_other_steps() -> None:
    with_offset = convert(zoo.mlp(4), zoo.MLP_CUTS, offset=bpfx.Offset(period=2))
    drop_in(with_offset, zoo.mlp(4).batch)
    one, other = (convert(zoo.mlp(4), zoo.MLP_CUTS, offset=None) for _ in range(2))
    one.load_state_dict(with_offset.state_dict())
    assert len(with_offset.offset_state) > 0 and len(one.offset_state) == len(other.offset_state) == 0
    assert one._kind() == LOCAL


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_a_jump_is_seen_with_accumulated_gradients_and_no_other_pace_is_one(accumulated: int) -> None:
    torch.manual_seed(0)
    weight = torch.zeros(200)
    pace, heard = Pace(lambda: [weight]), {}
    for t in range(120):
        told = pace.jumped(t)
        if told is not None:
            heard[t] = told
        if t % accumulated == 0:
            rate = 0.01 * abs(math.cos(t / 10))  # restarts of a schedule are no news
            weight += (rate if t < 90 else 0.5) * torch.randn(200)
    assert heard and all(90 < t < 90 + 4 * accumulated for t in heard)
