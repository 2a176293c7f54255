"""What `python -m benchmarks.gpu` prints last: a short table of all that was found."""

from typing import Any

from benchmarks import plot
from benchmarks.gpu import stages
from benchmarks.gpu.engine import Report

SHOWN = 12  # lines of one kind


def table(reports: list[Report], environment: dict[str, Any], context: stages.Context) -> str:
    versions = environment["versions"]
    lines = [f"{environment['device']}; torch {versions['torch']}, triton {versions['triton']}"]
    if context.rehearsed:
        lines.append("A rehearsal: its times mean nothing.")
    for report in reports:
        skipped = [r["skipped"] for r in report.items.values() if "skipped" in r]
        counts = [f"{len(report.items) - len(skipped)} done", f"{len(report.wrong)} wrong"]
        for number, word in (
            (len(report.faults), "failed"), (len(skipped), "skipped"),
            (len(report.failed) - len(report.faults), "cut off"),
            (len(report.not_reached), "not reached"),
        ):  # fmt: skip
            counts += [f"{number} {word}"] if number else []
        lines.append(f"\n{report.stage}: {', '.join(counts)}, {report.seconds:.0f} s")
        lines += shortened([f"    WRONG {name}: {why}" for name, why in report.wrong.items()])
        lines += shortened([f"    FAILED {name}: {why}" for name, why in report.faults.items()])
        lines += [f"    skipped: {why}" for why in dict.fromkeys(skipped)]
        lines += SHOW[report.stage](report, context)
    return "\n".join(lines)


def shortened(lines: list[str]) -> list[str]:
    more = [f"    and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


def _run(report: Report, context: stages.Context) -> list[str]:
    return [
        f"    {name}: {result['images_per_second']:.0f} images/s, {result['seconds']:.0f} s; first "
        f"losses {_losses(result['losses'])}, on the CPU {_losses(result['losses_cpu'])}"
        for name, result in report.items.items()
        if "losses_cpu" in result
    ] + [
        f"    {name}: {result['seconds']:.0f} s; first losses {_losses(result['losses'])}"
        for name, result in report.items.items()
        if "losses" in result and "losses_cpu" not in result
    ]


def _losses(steps: list[dict[str, float]]) -> str:
    return ", ".join(f"{k} {v:.3f}" for k, v in list(steps[0].items())[:3])


def _fast(report: Report, context: stages.Context) -> list[str]:
    goals = [] if context.rehearsed else stages.GOALS
    lines = [f"    {verdict(str(case), report)}" for case in goals]
    worst = [f"    {percent:.0f}% of copy: {name}" for percent, name in stages.missed(context)[:5]]
    lines += ["    worst against the copy bandwidth, forward + backward:", *worst] if worst else []
    for name, result in report.items.items():
        for direction, found in result.get("host", {}).items():
            who = "  ".join(
                f"{w} {t['wall']:.0f} us, in a graph {t.get('graph_warm', float('nan')):.0f}"
                for w, t in found.items()
            )
            lines.append(f"    {name} {direction}: {who}")
    for who, jump in report.items.get(stages.GROWTH, {}).get("largest_jump", {}).items():
        lines.append(f"    growth, {who}: largest step {jump['relative']:.2f} x linear")
    return lines


def verdict(name: str, report: Report) -> str:
    """One goal: what was asked, what was measured; OPEN where that does not suffice to tell."""
    asked = {"eager": stages.TIMES_EAGER, "compile": stages.TIMES_COMPILE}
    own, beside = (_both(report.items.get(n, {})) for n in (name, f"{stages.PEERS}{name}"))
    if own is None:
        wrong = report.wrong.get(name)
        return f"{'wrong' if wrong else 'OPEN'}  {name}: {wrong or 'not timed'}"
    percent, ratios = _percent(own), _ratios(beside) | _ratios(own)
    unknown = [who for who in asked if who not in ratios]
    behind = [who for who, ratio in ratios.items() if ratio < asked.get(who, 1.0)]
    word = "MISSED" if percent < stages.PERCENT or behind else "OPEN" if unknown else "met"
    words = [f"{who} {ratio:.2f}x" for who, ratio in ratios.items()]
    words += [f"{who} not timed" for who in unknown]
    return f"{word}  {name}: {percent:.0f}% of copy, {', '.join(words)}"


def _both(result: dict[str, Any]) -> dict[str, Any] | None:
    """A case's times forward and backward."""
    return next((e for e in result.get("entries", ()) if e["direction"] == "both"), None)


def _percent(entry: dict[str, Any]) -> float:
    shares = entry["percent_of_copy"]["ours"]
    return shares[plot.main_protocol(shares)]


def _ratios(entry: dict[str, Any] | None) -> dict[str, float]:
    """How many times longer the others take that do the same."""
    if entry is None:
        return {}
    times = dict(entry["times_us"])
    mine = times.pop("ours")
    times.pop("unconditional", None)
    protocol = plot.main_protocol(mine)
    return {who: t[protocol] / mine[protocol] for who, t in times.items() if protocol in t}


def _tuned(report: Report, context: stages.Context) -> list[str]:
    gains = [f"    {r['gain']:.2f}x  {r['key']}" for r in report.items.values() if "gain" in r]
    path = context.out / "plans.json"
    if path.exists():
        gains.append(f"    to use these plans: cp {path} kernels/plans.json")
    return shortened(gains) if gains or report.failed else ["    nothing to tune"]


def _step(report: Report, context: stages.Context) -> list[str]:
    lines = []
    for name, row in report.items.items():
        who = [
            f"{w} {rate:.1f} images/s" + (f", {peak / 2**30:.2f} GiB" if peak else "")
            for (w, rate), peak in zip(
                row.get("images_per_second", {}).items(), row.get("peak_bytes", {}).values(),
                strict=True,
            )
        ]  # fmt: skip
        lines += [f"    {name}: {'; '.join(who)}{_beside_twin(row)}"] if who else []
    return lines


def _beside_twin(row: dict[str, Any]) -> str:
    rates, peaks = row["images_per_second"], row["peak_bytes"]
    words = f"; {rates['ours'] / rates['unfused']:.2f} times the twin's speed"
    return words + (
        f", {peaks['ours'] / peaks['unfused']:.0%} of its memory" if peaks["ours"] else ""
    )


def _processes(report: Report, context: stages.Context) -> list[str]:
    return [
        f"    {name}: {rates['one']:.0f} images/s, on two processes {rates['two']:.0f} "
        f"({rates['two'] / rates['one']:.2f}x); first losses {_losses(result['losses_one'])}, on "
        f"two {_losses(result['losses'])}"
        for name, result in report.items.items()
        if (rates := result.get("images_per_second"))
    ]


SHOW = {
    "right": lambda report, context: [],
    "run": _run,
    "fast": _fast,
    "tuned": _tuned,
    "step": _step,
    "processes": _processes,
}
