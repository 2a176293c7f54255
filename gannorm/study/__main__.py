"""The norm study's report: the runs of `study=` as answers, tables, curves and samples.

    python train.py -m seed=0,1,2 'study=glob(*)'
    python -m gannorm.study [FOLDER] [--out docs/norm_study.md]

Runs that are missing are named, those that are there make the report.
"""

import argparse
from pathlib import Path

from gannorm.errors import answering_requests

with answering_requests():  # without the extra `train` something is missing
    from gannorm.study.members import FOLDER
    from gannorm.study.plots import draw
    from gannorm.study.report import report
    from gannorm.study.runs import read


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gannorm.study", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs") / FOLDER)
    parser.add_argument("--out", type=Path, default=Path("docs/norm_study.md"), metavar="FILE.md")
    args = parser.parse_args(argv)
    runs, absent = read(args.folder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw(runs, args.out.with_suffix(""))
    args.out.write_text(report(runs, absent, pictures, args.out), encoding="utf-8")
    for line in absent:
        print(f"absent: {line}")
    print(args.out)


if __name__ == "__main__":
    with answering_requests():
        main()
