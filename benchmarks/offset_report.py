"""The report of `offset.py`: targets, tables and plot from the runs that are stored."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Run = dict[str, Any]
Rows = dict[str, list[Run]]

TITLES = {
    "scratch": "From scratch",
    "tuning": "Fine-tuning on twice as many classes, small rate",
    "tuning-fast": "Fine-tuning on twice as many classes, four times that rate",
    "lokr": "LoKr on a pretrained convolutional network",
    "lora": "LoRA on a pretrained ViT-S/14",
}
LABELS = {
    "bp": "BP",
    "small": "BP on a quarter of every batch",
    "probe": "linear probe",
    "local": "local: supervised",
    "local-predsim": "local: predsim",
    "local-auglocal": "local: auglocal",
    "offset": "offset (default)",
    "offset-k4": "offset, K=4, λ=1",
    "offset-k4-matched": "offset, K=4, match=1",
    "offset-k4-variate": "offset, K=4, form B, α=auto",
    "offset-k4-lambda": "offset, K=4, λ=auto",
    "fresh": "offset, K=1, 25 samples",
    "predsim-offset": "predsim + offset (default)",
    "auglocal-offset": "auglocal + offset (default)",
}
LOCAL = ("local", "local-predsim", "local-auglocal")
CLOSE, GAP, TIME, MEMORY, AHEAD = 2.0, 8.0, 1.6, 0.25, 1.0  # the targets: points, points, × BP, of BP's, points
LOOPS = {"drop_in": "drop-in loop", "serial": "BlockTrainer over 4 micro-batches"}
COLUMNS = (
    "| row | seeds | test accuracy % | each seed | above local | below BP | refresh / exact / local | time, × BP "
    "| processor time, × BP | peak, drop-in | peak, trainer | cosine | note |"
)
ABOUT = (
    "Accuracy: mean ± standard deviation over seeds, percent of the test images; points above local and below BP are "
    "means of differences at equal seeds, local being the plain local training with supervised heads. Shares: of the "
    "iterations that were a refresh, an exact BP step or a local step. Time: a step with its optimizer step, averaged "
    "over the whole training, refreshes included, against BP steps of a twin timed in between (medians by kind of "
    "step, weighted by how often it came; mean over seeds, minimum and maximum in brackets); the processor's time "
    "leaves other work on the machine out. Peak: of forward, backward and optimizer step above the state, of the most "
    "expensive kind of step (named), as a share of BP's: in the drop-in loop, and with `BlockTrainer` over 4 "
    "micro-batches. Cosine: of local and BP gradient, mean over blocks and refreshes."
)


def newest(runs: dict[str, Run], part: str) -> dict[str, Any]:
    """The settings of the run of a part that was made last."""
    return max((r for r in runs.values() if r["part"] == part), key=lambda run: run["date"])["settings"]


def grouped(runs: dict[str, Run], part: str) -> Rows:
    """Runs of a part's newest settings by row, their seeds in order."""
    settings = newest(runs, part)
    shown = [run for run in runs.values() if run["part"] == part and run["settings"] == settings]
    found: Rows = {name: [] for name in LABELS}
    for run in sorted(shown, key=lambda run: run["seed"]):
        found[run["row"]].append(run)
    return {name: row for name, row in found.items() if row}


def finished(row: list[Run]) -> dict[int, Run]:
    """By seed."""
    return {run["seed"]: run for run in row if run["status"] == "finished"}


def differences(rows: Rows, one: str, other: str) -> list[float]:
    """Points that one row is above another, at the seeds that both have."""
    a, b = finished(rows.get(one, [])), finished(rows.get(other, []))
    return [a[s]["accuracy_percent"] - b[s]["accuracy_percent"] for s in a if s in b]


def accuracies(rows: Rows, name: str) -> list[float]:
    return [run["accuracy_percent"] for run in finished(rows.get(name, [])).values()]


def times(rows: Rows, name: str, kind: str = "wall") -> list[float]:
    return [run[kind]["average"] for run in finished(rows.get(name, [])).values()]


def peak(rows: Rows, name: str, loop: str) -> tuple[float, str] | None:
    """The most expensive kind of step in a loop, its peak as a share of BP's, and which one it is."""
    for run in finished(rows.get(name, [])).values():
        peaks = run.get("peak_bytes", {})
        if peaks.get(loop):
            kind, size = max(peaks[loop].items(), key=lambda item: item[1])
            return size / peaks["bp"], kind
    return None


# --- the targets ------------------------------------------------------------------------------------------------------

Verdict = tuple[str, bool | None, str]  # target, whether it is met (None: not known), what was found


def verdicts(part: str, rows: Rows) -> list[Verdict]:
    """Every target of a part."""
    gap = differences(rows, "offset", "bp")
    found: list[Verdict] = []
    if part == "scratch":
        plain = [name for name in LOCAL if differences(rows, "offset", name)]
        best = max(plain, key=lambda name: statistics.fmean(accuracies(rows, name)), default="local")
        ahead = differences(rows, "offset", best) if len(plain) == len(LOCAL) else []
        text = f"default offset at least {AHEAD:g} point above the best plain local row"
        found.append(at_least(text, ahead, AHEAD, f"{{}} points above {LABELS[best]}"))
    found.append(at_least(f"default offset within {CLOSE:g} points of BP", gap, -CLOSE, "{} points from BP"))
    if part != "scratch":
        below = [-d for d in differences(rows, "local", "bp")]
        text = f"plain local at least {GAP:g} points below BP"
        found.append(at_least(text, below, GAP, "{} points below BP"))
        took = times(rows, "offset")
        met = statistics.fmean(took) <= TIME if took else None
        found.append((f"average step time at most {TIME:g} × BP's", met, f"{mean(took)} ×" if took else ""))
        found.append(smallest_peak(rows))
    lost = [-d for d in differences(rows, "offset", "local")]
    text = "default offset never below plain local by more than one standard deviation"
    own = accuracies(rows, "local")
    if len(lost) < 2 or len(own) < 2:
        return [*found, (text, None, "needs two seeds")]
    deviation = statistics.stdev(own)
    words = f"{-statistics.fmean(lost):+.1f} points, local's deviation {deviation:.1f}"
    return [*found, (text, statistics.fmean(lost) <= deviation, words)]


def at_least(target: str, values: list[float], limit: float, words: str) -> Verdict:
    if not values:
        return target, None, ""
    return target, statistics.fmean(values) >= limit, words.format(f"{mean(values, '+')}")


def smallest_peak(rows: Rows) -> Verdict:
    """In the loops that reach it; both are said."""
    target = f"peak at most {100 * MEMORY:g} % of BP's, in one of the loops"
    found = {words: peak(rows, "offset", loop) for loop, words in LOOPS.items()}
    known = {words: value for words, value in found.items() if value is not None}
    if not known:
        return target, None, ""
    reached = [words for words, value in known.items() if value[0] <= MEMORY]
    said = "; ".join(f"{words} {100 * share:.1f} % ({kind})" for words, (share, kind) in known.items())
    met = True if reached else None if len(known) < len(found) else False
    return target, met, f"{said}; reached by: {', '.join(reached) or 'none'}"


def judged(part: str, rows: Rows, settings: dict[str, Any]) -> list[str]:
    """The targets of a part as lines of a table."""
    if settings["try_out"]:
        return [f"| {TITLES[part]} | a try-out with sizes of its own | not judged | |"]
    words = {True: "met", False: "**missed**", None: "not known"}
    seeds = len(finished(rows.get("offset", [])))
    lines = []
    for target, met, found in verdicts(part, rows):
        few = f" ({seeds} of 3 seeds)" if met is not None and seeds < 3 else ""
        lines.append(f"| {TITLES[part]} | {target} | {words[met]}{few} | {found} |")
    return lines


# --- the tables -------------------------------------------------------------------------------------------------------


def markdown(runs: dict[str, Run]) -> str:
    """The whole report; every row as it came out."""
    parts = [part for part in TITLES if any(run["part"] == part for run in runs.values())]
    rows = {part: grouped(runs, part) for part in parts}
    lines = ["# Does the offset with its defaults serve every regime?", "", "## Targets", ""]
    lines += ["| part | target | verdict | found |", "|---|---|---|---|"]
    for part in parts:
        lines += judged(part, rows[part], newest(runs, part))
    lines += ["", ABOUT]
    for part in parts:
        settings = newest(runs, part)
        lines += ["", f"## {TITLES[part]}", "", sentence(settings), "", COLUMNS, f"|---|{'--:|' * 11}---|"]
        lines += [f"| {' | '.join(cells(rows[part], name))} |" for name in rows[part]]
        made = [run for row in rows[part].values() for run in row]
        steps = [run["bp_step_seconds"] for run in made if run["status"] == "finished"]
        if steps:
            lines += ["", f"A BP step took {statistics.median(steps):.3f} s ({min(steps):.3f}–{max(steps):.3f})."]
        others = sum(run["part"] == part and run["settings"] != settings for run in runs.values())
        if others:
            lines += ["", f"{others} runs with other settings are stored but not shown."]
        versions = [", ".join(f"{key} {value}" for key, value in run["made_with"].items()) for run in made]
        lines += ["", *(f"Made with {words}." for words in dict.fromkeys(versions))]
    return "\n".join([*lines, "", "Each run's own command, settings and date are in the JSON.", ""])


SHORT = (
    "| | seeds | test accuracy % | points below BP, same seeds | time of a step, × BP | peak, drop-in "
    "| peak, `BlockTrainer`, 4 micro-batches |"
)


def short(rows: Rows) -> str:
    """What is worth knowing of a part's rows."""
    lines = [SHORT, f"|---|{'--:|' * 6}"]
    for name in rows:
        values, below = accuracies(rows, name), [-d for d in differences(rows, name, "bp")] if name != "bp" else []
        if not values:
            continue
        peaks = [peak(rows, name, loop) for loop in LOOPS]
        line = [LABELS[name], str(len(values)), mean(values), f"{statistics.fmean(below):.1f}" if below else "–"]
        line += [f"{statistics.fmean(times(rows, name)):.2f}"]
        lines.append(f"| {' | '.join([*line, *(f'{100 * p[0]:.0f} %' if p else '–' for p in peaks)])} |")
    return "\n".join(lines)


def write_guide(text: str, runs: dict[str, Run]) -> str:
    """The page with the tables of its parts, which stand between markers, made anew."""
    for part in TITLES:
        start, end = f"<!-- offset {part} -->", f"<!-- /offset {part} -->"
        if start in text and any(run["part"] == part for run in runs.values()):
            before, rest = text.split(start, 1)
            text = f"{before}{start}\n{short(grouped(runs, part))}\n{end}{rest.split(end, 1)[1]}"
    return text


def sentence(settings: dict[str, Any]) -> str:
    """The one configuration of all rows."""
    rest = {key: value for key, value in settings.items() if key not in ("model", "data", "pretraining", "try_out")}
    words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in rest.items())
    text = f"{settings['model']} on {settings['data']}; {words}."
    before = settings.get("pretraining")
    if before:
        text += f" Before that {before['iterations']} iterations of BP on the first {before['classes']} classes at lr "
        text += f"{before['lr']:g}."
    return text


def cells(rows: Rows, name: str) -> list[str]:
    """One line of a table."""
    made = list(finished(rows[name]).values())
    if not made:
        return [LABELS[name], "0", *["–"] * 10, note(rows[name])]
    values = [run["accuracy_percent"] for run in made]
    above = differences(rows, name, "local") if name != "local" else []
    below = [-d for d in differences(rows, name, "bp")] if name != "bp" else []
    cosines = [run["cosine_refreshes"] for run in made if run["cosine_refreshes"] is not None]
    return [
        LABELS[name],
        str(len(made)),
        mean(values),
        ", ".join(f"{value:.1f}" for value in values),
        mean(above, "+") if above else "–",
        mean(below, "+") if below else "–",
        shares(made),
        spread(times(rows, name)),
        spread(times(rows, name, "cpu")),
        percent(rows, name, "drop_in"),
        percent(rows, name, "serial"),
        f"{statistics.fmean(cosines):.2f}" if cosines else "–",
        note(rows[name]),
    ]


def mean(values: list[float], sign: str = "") -> str:
    middle = f"{statistics.fmean(values):{sign}.1f}"
    return f"{middle} ± {statistics.stdev(values):.1f}" if len(values) > 1 else middle


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def shares(made: list[Run]) -> str:
    """Percent of the iterations that were a refresh, exact, local; of all seeds."""
    if "step" in made[0]["shares"]:
        return "–"
    kinds = ("refresh", "exact", "local")
    return " / ".join(f"{100 * statistics.fmean(run['shares'].get(kind, 0.0) for run in made):.0f}" for kind in kinds)


def percent(rows: Rows, name: str, loop: str) -> str:
    found = peak(rows, name, loop)
    if found is None:
        return "–"
    return f"{100 * found[0]:.0f} %" + (f" ({found[1]})" if found[1] != "step" else "")


def note(row: list[Run]) -> str:
    """What went otherwise: refused, failed, diverged, warned."""
    said = [f"{run['status']}: {run['reason']}" for run in row if run["status"] != "finished"]
    said += [f"seed {r['seed']} diverged at {r['diverged_at']}" for r in row if r.get("diverged_at") is not None]
    said += [f"trainer: {run['serial_refused']}" for run in row if "serial_refused" in run]
    warned = [words for run in row for words in run["warnings"]]
    if warned:  # the numbers in them differ from one to the next; all of them are in the JSON
        said.append(f"warned in {sum(bool(run['warnings']) for run in row)} of {len(row)} runs, first: {warned[0]}")
    return "; ".join(dict.fromkeys(said)).replace("|", "/").replace("\n", " ")


# --- the plot ---------------------------------------------------------------------------------------------------------


def plot(runs: dict[str, Run], path: Path) -> bool:
    """Accuracy, time and peak of every row, a line of panels per part; False where there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    parts = {p: grouped(runs, p) for p in TITLES if any(run["part"] == p for run in runs.values())}
    parts = {p: {n: row for n, row in rows.items() if finished(row)} for p, rows in parts.items()}
    parts = {p: rows for p, rows in parts.items() if rows}
    if not parts:
        return False
    heights = [1.3 + 0.24 * len(rows) for rows in parts.values()]
    figure = Figure(figsize=(13, sum(heights)), dpi=130, layout="constrained")
    panels = figure.subplots(len(parts), 3, sharey="row", squeeze=False, height_ratios=heights)
    for line, (part, rows) in zip(panels, parts.items(), strict=True):
        names = list(rows)
        places = {name: len(names) - 1 - i for i, name in enumerate(names)}
        for name, place in places.items():
            values, took = accuracies(rows, name), times(rows, name)
            colour = "black" if name == "bp" else "C0" if name.endswith("offset") or name == "offset" else "C7"
            deviation = statistics.stdev(values) if len(values) > 1 else 0
            style: dict[str, Any] = {"fmt": "o", "color": colour, "capsize": 2, "elinewidth": 1, "markersize": 5}
            line[0].errorbar(statistics.fmean(values), place, xerr=deviation, **style)
            middle = statistics.fmean(took)
            line[1].errorbar(middle, place, xerr=[[middle - min(took)], [max(took) - middle]], **style)
            for loop, marker in (("drop_in", "o"), ("serial", "D")):
                share = peak(rows, name, loop)
                if share is not None:
                    line[2].plot(100 * share[0], place, marker, color=colour, markersize=5)
        if "bp" in rows:
            line[0].axvline(statistics.fmean(accuracies(rows, "bp")), color="black", linestyle="--", linewidth=0.8)
        line[1].axvline(TIME, color="C3", linestyle=":", linewidth=1)
        line[2].axvline(100 * MEMORY, color="C3", linestyle=":", linewidth=1)
        line[0].set_yticks(list(places.values()), [LABELS[name] for name in places])
        line[0].set_title(TITLES[part], loc="left", fontsize="medium")
        line[0].set_xlabel("test accuracy (%)")
        line[1].set_xlabel("time of a step, × BP's")
        line[2].set_xlabel("peak, % of BP's (diamonds: BlockTrainer)")
        line[1].set_xlim(left=0)
        line[2].set_xlim(left=0)
        for axes in line:
            axes.grid(alpha=0.3, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True
