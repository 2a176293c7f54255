"""Use a trained model:  python -m gannorm sample|translate|inspect CHECKPOINT ...

CHECKPOINT is a checkpoint file, or a run folder (then its newest checkpoint).
"""

import argparse
import signal
from pathlib import Path

from gannorm.errors import answering_requests

with answering_requests():  # without the extra `train` something is missing
    from gannorm.commands.inference import sample, translate
    from gannorm.commands.inspection import inspect


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m gannorm", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("sample", help="generate images of a class, one PNG each")
    one.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    one.add_argument(
        "--class", dest="label", type=int, metavar="K", help="class number; all in turn by default"
    )
    one.add_argument("--count", type=int, default=100, help="how many images (100)")
    one.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    one.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR")
    one.add_argument(
        "--truncation", type=float, metavar="T", help="noise within +-T alone; all by default"
    )
    one.set_defaults(
        run=lambda a: sample(a.checkpoint, a.label, a.count, a.seed, a.out, a.truncation)
    )

    two = commands.add_parser("translate", help="translate a folder of images")
    two.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    two.add_argument("source", type=Path, metavar="IN_DIR")
    two.add_argument("target", type=Path, metavar="OUT_DIR")
    two.add_argument("--direction", choices=("AtoB", "BtoA"), required=True)
    two.set_defaults(run=lambda a: translate(a.checkpoint, a.source, a.target, a.direction))

    three = commands.add_parser("inspect", help="print every norm layer and what is wrong with it")
    three.add_argument(
        "what", nargs="*", metavar="CHECKPOINT | KEY=VALUE ...",
        help="a checkpoint, or overrides of the config, as for train.py",
    )  # fmt: skip
    three.set_defaults(run=lambda a: inspect(a.what))
    return main


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `... inspect RUN | head` ends quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with answering_requests():
        arguments = parser().parse_args()
        arguments.run(arguments)
