"""Use a trained model:  python -m gannorm sample|translate|inspect|export|demo CHECKPOINT ...

CHECKPOINT is a checkpoint file, a run folder (then its newest checkpoint), a .safetensors file, or
latest_net_G_A.pth of the reference CycleGAN code, or a folder of such files.
"""

import argparse
import signal

from gannorm.errors import answering_requests

with answering_requests():  # without the extra `train` something is missing
    from gannorm.commands import demo, export, inspection, sampling, translation


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m gannorm", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")
    for module in (sampling, translation, inspection, export, demo):
        module.add(commands)
    return main


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `... inspect RUN | head` ends quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with answering_requests():
        arguments = parser().parse_args()
        arguments.run(arguments)
