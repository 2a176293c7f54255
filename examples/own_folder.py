"""A CycleGAN on two folders of images, from training to translated files.

python examples/own_folder.py                        # discs and squares that it draws, 60 steps
python examples/own_folder.py DIR --steps 20000 --size 128     # DIR/trainA and DIR/trainB
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]


def draw(folder: Path, kind: str, count: int) -> None:
    """`count` images of 40x40: orange discs (A), or blue squares (B)."""
    folder.mkdir()
    for number in range(count):
        image = Image.new("RGB", (40, 40), "white" if kind == "A" else "black")
        x, y, size = (random.randint(*ends) for ends in ((2, 16), (2, 16), (12, 20)))
        pen = ImageDraw.Draw(image)
        if kind == "A":
            pen.ellipse((x, y, x + size, y + size), fill="darkorange")
        else:
            pen.rectangle((x, y, x + size, y + size), fill="royalblue")
        image.save(folder / f"{number:03d}.png")


def python(*arguments: object) -> None:
    """One of the commands, as in the README."""
    print("$ python", *arguments, flush=True)
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def main(images: Path, run: Path, steps: int, size: int) -> None:
    every = max(1, steps // 3)  # how often there are samples, an evaluation and a checkpoint
    python(
        "train.py", "model=cyclegan", "norm=instance", "data=folder_pair", f"data.root={images}",
        f"data.image_size={size}", f"data.load_size={size + size // 8}", "data.num_workers=0",
        f"trainer.steps={steps}", f"trainer.sample_every={every}", f"trainer.eval_every={every}",
        f"trainer.checkpoint_every={every}", f"hydra.run.dir={run}",
    )  # fmt: skip
    photos = images / "testA" if (images / "testA").is_dir() else images / "trainA"
    python("-m", "gannorm", "translate", run, photos, run / "translated", "--direction", "AtoB")
    print(f"samples while training: {run / 'samples'}")
    print(f"A translated to B:      {run / 'translated'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="?", help="with trainA, trainB (testA, testB)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=32, help="height and width trained on")
    parser.add_argument("--out", type=Path, help="the run folder; a new one below outputs/")
    a = parser.parse_args()
    run = a.out or ROOT / "outputs" / "own_folder" / time.strftime("%Y-%m-%d_%H-%M-%S")
    with tempfile.TemporaryDirectory() as folder:
        if a.images is None:
            for kind in "AB":
                draw(Path(folder) / f"train{kind}", kind, 24)
                draw(Path(folder) / f"test{kind}", kind, 6)
        main((a.images or Path(folder)).resolve(), run.resolve(), a.steps, a.size)
