"""The norm study's report: its questions answered from the figures, what to choose, tables."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gannorm.study.members import LOSS, members
from gannorm.study.runs import COLUMNS, SEEDS, TITLES, Column, Run, Runs, apart, label, spread

COMMANDS = """\
python train.py -m seed=0,1,2 'study=glob(*)'
python train.py -m seed=3,4,5,6,7 'study=glob([resblock_gan-none*,resblock_gan-conditional*-16])'
python -m gannorm.study"""


@dataclass(frozen=True)
class Question:
    """Whether `first` is better than `second`, and how to say so."""

    text: str
    first: str
    second: str
    better: str = "Yes"
    worse: str = "No, the reverse"
    neither: str = "The seeds do not tell them apart"
    early: bool = False  # ask about the first evaluation too


COST = ("It costs", "It helps", "No cost beyond the seeds' spread", True)
RIGHT = "resblock_gan-conditional_batch-16"
QUESTIONS = (
    Question("Does instance norm beat batch norm at batch size 1?",
             "cyclegan-instance-1", "cyclegan-batch-1"),
    Question("And at batch size 16?", "cyclegan-instance-16", "cyclegan-batch-16"),
    Question("Does a CycleGAN need a norm at all, at batch size 1?",
             "cyclegan-instance-1", "cyclegan-none-1"),
    Question("And at batch size 16?", "cyclegan-instance-16", "cyclegan-none-16"),
    Question("Does conditional batch norm beat plain batch norm for labelled data?",
             RIGHT, "resblock_gan-batch-16"),
    Question("Does the class-conditional GAN need a norm at all?", RIGHT, "resblock_gan-none-16"),
    Question("And is conditional instance norm better than none?",
             "resblock_gan-conditional_instance-16", "resblock_gan-none-16"),
    Question("What does a gamma that starts at 0 cost?", RIGHT, f"{RIGHT}-gamma_0", *COST),
    Question("What does a moving variance that starts at 0 cost?",
             RIGHT, f"{RIGHT}-moving_var_0", *COST),
)  # fmt: skip


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(model: str, runs: Runs) -> str:
    """A line for each member, and for the real images; the best mean of a batch size in bold."""
    columns = COLUMNS[model]
    shown = [name for name in members() if name in runs and runs[name][0].member.model == model]
    spreads = [{name: spread(runs[name], column) for name in shown} for column in columns]
    head = ["norm", "batch", "runs", *(c.title for c in columns)]
    lines = [row(head), row(["---"] * len(head))]
    for name in shown:
        size = runs[name][0].batch_size
        cells = [label(runs[name][0].member), str(size), str(len(runs[name]))]
        for column, values in zip(columns, spreads, strict=True):
            alike = [s for other, s in values.items() if s and runs[other][0].batch_size == size]
            one = values[name]
            if one is None:
                cells.append("")
                continue
            cell = f"{column.shown(one.mean)} ± {column.shown(one.half)}"
            best = (max if column.higher else min)(s.mean for s in alike)
            cells.append(f"**{cell}**" if one.mean == best else cell)
        lines.append(row(cells))
    reference = runs[shown[0]][0].summary["reference"]
    for kind in ("real", "untranslated"):
        known = [reference.get(f"{column.key}_{kind}") for column in columns]
        if any(value is not None for value in known):
            cells = [
                "" if value is None else column.shown(value)
                for column, value in zip(columns, known, strict=True)
            ]
            lines.append(row([f"*{kind} images*", "", "", *cells]))
    return "\n".join(lines)


# ---- answers

Sides = dict[str, list[str]]


def shared(first: str, second: str, runs: Runs) -> tuple[list[Run], list[Run]]:
    """The runs of two members with the seeds that both have."""
    pair = runs.get(first, []), runs.get(second, [])
    seeds = set.intersection(*({run.seed for run in each} for each in pair))
    one, two = ([run for run in each if run.seed in seeds] for each in pair)
    return one, two


def compared(first: str, second: str, runs: Runs, evaluation: int = -1) -> tuple[Sides, list[str]]:
    """The titles of the figures in which `first` is better, worse, neither; and rows of them."""
    one, two = shared(first, second, runs)
    sides: Sides = {"better": [], "worse": [], "neither": []}
    rows = []
    for column in COLUMNS[one[0].member.model]:
        a, b = spread(one, column, evaluation), spread(two, column, evaluation)
        if a is None or b is None:
            continue
        side = "better" if (a.mean > b.mean) == column.higher else "worse"
        differ = apart(a, b)
        sides[side if differ else "neither"].append(column.title)
        rows.append(row([
            column.title, *(f"{column.shown(s.mean)} ± {column.shown(s.half)}" for s in (a, b)),
            column.difference(a.mean, b.mean), "yes" if differ else "no",
        ]))  # fmt: skip
    return sides, rows


def answer(question: Question, runs: Runs) -> str:
    """The verdict on a question and the figures that it follows from."""
    lines = [f"### {question.text}"]
    pair = shared(question.first, question.second, runs)
    if len(pair[0]) < 2:
        those = f"`{question.first}` and `{question.second}`"
        return f"{lines[0]}\n\nNot known: fewer than two seeds of {those}."
    names = [f"{label(each[0].member)} ({len(each)} runs)" for each in pair]
    for evaluation in (0, -1) if question.early else (-1,):
        step = pair[0][0].evaluations[evaluation]["step"]
        when = f"At the first evaluation, step {step}" if evaluation == 0 else "At the end"
        sides, rows = compared(question.first, question.second, runs, evaluation)
        head = row([when.lower(), *names, "difference", "told apart"])
        said = verdict(question, sides, [label(each[0].member) for each in pair])
        lines += [f"{when}: {said}", "\n".join([head, row(["---"] * 5), *rows])]
    return "\n\n".join(lines)


def verdict(question: Question, sides: Sides, names: list[str]) -> str:
    """One sentence: who is ahead beyond the seeds' spread, in which figures."""
    better, worse, neither = (", ".join(sides[key]) for key in ("better", "worse", "neither"))
    if not better and not worse:
        return f"**{question.neither}**: in no figure."
    if better and worse:
        text = f"**Mixed**: {names[0]} is ahead in {better}, {names[1]} in {worse}"
    elif better:
        text = f"**{question.better}**: {names[0]} is ahead of {names[1]} in {better}"
    else:
        text = f"**{question.worse}**: {names[1]} is ahead of {names[0]} in {worse}"
    return text + (f"; not told apart in {neither}." if neither else ".")


def choice(model: str, size: int, runs: Runs) -> str:
    """What to choose: by mean FID, the norms that no other is ahead of; what is ahead of the rest.

    One norm is ahead of another where it is better in a figure and worse in none.
    """
    alike = [
        name for name, each in runs.items()
        if (each[0].member.model, each[0].batch_size) == (model, size)
        and not each[0].member.mistake and len(each) > 1
    ]  # fmt: skip
    fid = Column("fid", "FID")  # of a translation, the mean of both directions
    means = {name: s.mean for name in alike if (s := spread(runs[name], fid)) is not None}
    order = sorted(means, key=lambda name: means[name])
    ahead: dict[str, str] = {}  # of a norm, the best of those that are ahead of it
    for name in order:
        for other in order:
            sides, _ = compared(other, name, runs) if other != name else ({}, [])
            if sides and sides["better"] and not sides["worse"]:
                ahead.setdefault(name, other)
    norm = {name: runs[name][0].member.norm for name in order}
    said = {name: f"`{norm[name]}` ({fid.shown(means[name])})" for name in order}
    best = [said[name] for name in order if name not in ahead]
    rest = [f"{said[name]} behind `{norm[ahead[name]]}`" for name in order if name in ahead]
    where = f"- {TITLES[model]}, batch size {size}:"
    if not best:
        return f"{where} not known, too few runs."
    text = f"{where} **choose {best[0]}**."
    text += f" No norm is ahead of {', '.join(best[1:])} either." if best[1:] else ""
    return text + (f" The rest: {', '.join(rest)}." if rest else "")


# ---- the whole


def sizes(model: str, runs: Runs) -> list[int]:
    return sorted({each[0].batch_size for each in runs.values() if each[0].member.model == model})


def protocol(runs: Runs) -> str:
    """What was run, for how long, on what."""
    lines = []
    everything = [run for each in runs.values() for run in each]
    for model, title in TITLES.items():
        for size in sizes(model, runs):
            alike = [r for r in everything if (r.member.model, r.batch_size) == (model, size)]
            steps = alike[0].summary["steps"]
            lines.append(
                f"- {title}, batch size {size}: {steps} steps, {steps * size:,} images a domain, "
                f"{len(alike[0].evaluations)} evaluations."
            )
    devices = sorted({run.summary["device"] for run in everything})
    version = everything[0].summary["versions"]["torch"]
    return "\n".join([*lines, f"- {'; '.join(devices)} a run, torch {version}."])


def report(runs: Runs, absent: list[str], pictures: dict[str, list[Path]], out: Path) -> str:
    base = sum(run.seed in SEEDS for each in runs.values() for run in each)
    more = sum(len(each) for each in runs.values()) - base
    beyond = f", and {more} of more seeds" if more else ""
    losses = ", ".join(f"{TITLES[model]}: {loss}" for model, loss in LOSS.items())
    parts = [
        "# Norm study",
        textwrap.fill(
            "Every norm in both tasks, on the embedded data, with the models' own configurations "
            f"but for the norm, the batch size, the length and the loss ({losses}). Made by", 120
        ),
        f"```bash\n{COMMANDS}\n```",
        textwrap.fill(
            f"Runs: {base} of {len(members()) * len(SEEDS)}{beyond}. All runs of a task and batch "
            "size see the same number of images. They are short: the norms' first minute, not "
            "their last word. Figures are of the averaged generators on the features of the "
            "embedded classifier, at the last evaluation: mean over the seeds ± half the distance "
            "between the lowest and the highest.", 120
        ),
        protocol(runs),
        "## What to choose",
        textwrap.fill(
            "By mean FID (in brackets), the norms that no other is ahead of: better in a figure, "
            "worse in none. A norm with few or scattered seeds is harder to be ahead of.", 120
        ),
        "\n".join(choice(model, size, runs) for model in TITLES for size in sizes(model, runs)),
        "## Answers",
        textwrap.fill(
            "Two norms are compared on the seeds that both have. A difference counts where the "
            "ranges do not overlap; with five seeds or more, where Mann and Whitney's test tells "
            "them apart at 5%. Chance alone sets the ranges of three seeds and three apart once in "
            "ten figures, and nothing is corrected for the number of figures: a single one told "
            "apart is a hint.", 120
        ),
        *(answer(question, runs) for question in QUESTIONS),
    ]  # fmt: skip
    for model, title in TITLES.items():
        parts += [f"## {title}"]
        if model not in pictures:
            parts += ["No finished runs."]
            continue
        parts += [table(model, runs)]
        for path in pictures[model]:
            what = path.stem.removeprefix(f"{model}_")
            parts += [f"![{title}: {what}]({path.relative_to(out.parent).as_posix()})"]
    if absent:
        parts += ["## Absent runs", "\n".join(f"- {line}" for line in absent)]
    return "\n\n".join(parts) + "\n"
