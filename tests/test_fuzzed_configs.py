"""Random overrides, sensible and garbage: two steps are trained, or one line says why not."""

import contextlib
import io
import os
import shutil
import sys
from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image
from test_loop import MODELS

from gannorm.commands import train
from gannorm.commands.composition import composed
from gannorm.config import keys_of

pytestmark = pytest.mark.usefixtures("quick_runs")
ROOT = Path(__file__).parents[1]
FEW = [
    "trainer.steps=2", "trainer.log_every=1", "metrics.samples=16", "data.num_workers=0",
]  # fmt: skip

# What a run might be asked for. Sizes and numbers of steps that take long are left out.
SENSIBLE = {
    "seed": ["1", "4294967295"],
    "norm": ["instance", "batch", "group", "layer", "none", "conditional_batch",
             "conditional_instance"],
    "norm.backend": ["auto", "torch", "cpu", "triton"],
    "norm.eps": ["1e-3", "0.1", "1"],
    "norm.affine": ["true", "false"],
    "norm.weight_init": ["null", "[1,0.02]", "[0,0]", "[1]", "[1,-1]"],
    "norm.num_groups": ["1", "3", "1000"],
    "norm.momentum": ["0", "1", "0.5"],
    "norm.var_estimator": ["biased", "unbiased"],
    "data": ["digits", "digits_m", "mnist data.download=false", "folder_pair", "image_folder"],
    "data.image_size": ["8", "16", "4", "12", "7", "1", "[8,16]", "[16,8]", "[8,8,8]"],
    "data.channels": ["1", "3", "[1,3]", "[3,1]", "2", "4"],
    "data.batch_size": ["1", "2", "3", "5"],
    "data.global_batch_size": ["null", "4", "7"],
    "data.num_workers": ["0", "1"],
    "data.preprocess": ["none", "crop", "scale_width_and_crop", "scale_shortside_and_crop"],
    "data.load_size": ["8", "9", "20", "[9,12]", "1"],
    "data.flip": ["true", "false"],
    "data.labels": ["true", "false"],
    "data.on_bad": ["fail", "skip"],
    "data.cache_gb": ["0", "1"],
    "loss": ["hinge", "lsgan", "nonsaturating", "rpgan", "wgan_gp"],
    "loss.gan": ["hinge", "lsgan", "relativistic", "wgan"],
    "loss.r1": ["0", "0.5"],
    "loss.r2": ["0", "0.5"],
    "loss.gradient_penalty": ["0", "1"],
    "loss.diffaugment": ["[]", "[color]", "[color,translation,cutout]", "[cutout,cutout]"],
    "optim": ["cyclegan", "resblock_gan"],
    "optim.lr_g": ["1e-4", "1e-30"],
    "optim.beta1": ["0", "0.9"],
    "optim.beta2": ["0", "0.999"],
    "optim.d_steps": ["1", "2"],
    "optim.schedule": ["linear", "cosine", "constant"],
    "optim.decay_from": ["0", "0.3", "1"],
    "optim.restart": ["true", "false"],
    "optim.clip_norm": ["null", "1", "1e-9"],
    "optim.ema_decay": ["0", "0.5", "1"],
    "optim.ema_start": ["0", "1", "1000"],
    "trainer": ["cyclegan", "resblock_gan"],
    "trainer.device": ["auto", "cpu", "cuda"],
    "trainer.precision": ["fp32", "bf16", "fp16"],
    "trainer.log_every": ["1", "2", "1000"],
    "trainer.sample_every": ["1", "1000"],
    "trainer.eval_every": ["1", "1000"],
    "trainer.checkpoint_every": ["1", "1000"],
    "trainer.keep_checkpoints": ["1", "9"],
    "metrics.extractor": ["embedded", "inception metrics.weights=/nowhere"],
    "metrics.samples": ["null", "1", "3", "12", "100"],
    "metrics.standing_batches": ["0", "1"],
    "metrics.best": ["fid", "coverage", "ssim", "accuracy", "cycle_l1", "no_figure"],
    "metrics.patience": ["null", "1"],
    "resume": ["null", "auto", "/nowhere", "."],
    "init_from": ["null", "/nowhere", "."],
    "init_from.use": ["averaged", "trained"],
    "init_from.strict": ["true", "false"],
    "model.width": ["1", "2", "5"],
    "model.blocks": ["0", "1"],
    "model.downsamplings": ["0", "1", "2", "3"],
    "model.dropout": ["true"],
    "model.d_width": ["1", "3"],
    "model.d_layers": ["0", "1", "2", "5"],
    "model.d_spectral_norm": ["true", "false"],
    "model.cycle_weight": ["0", "1"],
    "model.identity_weight": ["0", "0.5"],
    "model.pool_size": ["0", "1", "50"],
    "model.z_dim": ["1", "3"],
    "model.block": ["preact", "postact"],
    "model.g_widths": ["[8]", "[4,8]", "[1,1]", "[8,8,8]", "[]", "8"],
    "model.g_spectral_norm": ["true"],
    "model.d_widths": ["[8]", "[4,8]", "[1]", "[]"],
    "model.d_downsamplings": ["0", "1", "2", "9"],
    "model.init": ["orthogonal", "xavier", "normal"],
}  # fmt: skip
GARBAGE = [
    "", "null", "true", "x", "nan", "inf", "-inf", "-1", "0", "-0.5", "1e400", "[]", "[1]", "[[1]]",
    "{}", "{a:1}", "{name:x}", "[null]", "${seed}", "${nothing}", "${oc.env:NOTHING_OF_THE_KIND}",
    "${trainer}", "${.}", "???", "'", '"', "\\", "\\$", "[", "}", "a b", "'a b'", "a,b", "a:b", "=",
    "é", "'中\n🙂'", "'\u202e'", "../x", "/", "~", "choice(1,2)", "range(3)", "glob(*)", "1_000",
    "0x10", "x" * 3000, "'${'", "@", "%s", "\t", "None", "1.0", "2.5", "'1'", "1e0",
]  # fmt: skip
HUGE = ["1e30", "99999999999999999999999", "9223372036854775808", "-99999999999999999999999"]
# Where a large number is a wish that takes a machine's memory, days, or diverges: no refusal.
COSTLY = (
    "size", "samples", "standing", "width", "blocks", "downsamplings", "layers", "num_workers",
    "z_dim", "steps", "lr_", "r1", "r2", "penalty", "weight", "running_var", "eps", "cache_gb",
    "clip",
)  # fmt: skip
RAW = [
    "trainer", "=", "=1", "+trainer.steps=3", "++trainer.steps=2", "~trainer.steps", "~norm",
    "+nothing=1", "nothing=1", "nothing.at.all=1", "norm.nothing=1", "trainer.steps.more=1",
    "norm@data=batch", "+norm=batch", "hydra.nothing=1", "hydra/launcher=nothing",
    "hydra.job.chdir=maybe", "experiment=nothing", "study=nothing", "model=nothing", "data=none",
    "trainer.steps=2=2", "a b c", "[", "é=1", "seed=1 seed=2", "norm=batch norm=instance",
    "hydra.run.dir=", "hydra.run.dir=${nothing}", "hydra.run.dir=/proc/nowhere",
    "hydra.run.dir=/dev/null/x", "hydra.run.dir=" + "x" * 3000, "metrics.cache=/proc/nowhere",
    "metrics.cache=/dev/null", "data.cache=/dev/null data=image_folder",
]  # fmt: skip


@cache
def keys() -> list[str]:
    found: list[str] = []
    for model in MODELS:
        for data in ("folder_pair", "digits"):
            cfg = composed([*MODELS[model], f"data={data}", "norm=batch"])
            found += [key for key in keys_of(cfg) if key not in found]
    return found


@st.composite
def wishes(draw) -> list[str]:
    """A model, and what is asked of it on the command line."""
    model = draw(st.sampled_from(sorted(MODELS)))
    out = [*MODELS[model], *FEW]
    sensible = st.sampled_from(sorted(SENSIBLE)).flatmap(
        lambda key: st.sampled_from(SENSIBLE[key]).map(lambda value: f"{key}={value}")
    )

    def wrong(key: str) -> st.SearchStrategy[str]:
        costly = any(word in key for word in COSTLY)
        values = st.sampled_from(GARBAGE if costly else GARBAGE + HUGE)
        if not costly:
            values |= st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
        return values.map(lambda value: f"{key}={value}")

    garbage = st.sampled_from(keys()).flatmap(wrong)
    for _ in range(draw(st.integers(1, 4))):
        chance = draw(st.integers(0, 9))
        each = sensible if chance < 7 else garbage if chance < 9 else st.sampled_from(RAW)
        word = draw(each)
        # An override that a table above writes with a second one behind it.
        out += word.split(" ") if word in RAW or word.split("=")[0] in SENSIBLE else [word]
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder to train in, with photographs in it."""
    folder = tmp_path_factory.mktemp("fuzzed")
    for name in ("trainA", "trainB", "testA", "testB"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (18, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    return folder


def rooted(overrides: list[str], place: Path) -> list[str]:
    """With the photographs, where they are asked for."""
    own = [each for each in overrides if each in ("data=folder_pair", "data=image_folder")]
    if not own:
        return overrides
    at = overrides.index(own[0])
    return [*overrides[: at + 1], f"data.root={place / 'photos'}", *overrides[at + 1 :]]


def called(overrides: list[str], place: Path) -> tuple[int, str]:
    """train.py's exit code and what it says on stderr, in this process."""
    said, before = io.StringIO(), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *overrides])
        patch.setattr(train, "limit_memory", lambda: None)  # it would be this process's for good
        os.chdir(place)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                train.main()
            return 0, said.getvalue()
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
        finally:
            os.chdir(before)


def check(code: int, said: str, run: Path, place: Path, before: set[Path]) -> None:
    """Two steps and a summary; or one line, and the folders that were there before."""
    if code == 0:
        assert (run / "summary.json").exists()
        return
    assert code == 2, said
    assert said.startswith("error: ") and len(said.splitlines()) == 1, said
    assert not run.exists() and set(place.rglob("*")) == before


def fuzzed(place: Path, drawn: list[str]) -> None:
    for leftover in set(place.iterdir()) - {place / "photos"}:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    run, before = place / "run", set(place.rglob("*"))
    overrides = rooted([f"hydra.run.dir={run}", *drawn], place)
    code, said = called(overrides, place)
    own = [each for each in drawn if each.startswith("hydra.run.dir=")]
    if code == 0 and own:
        return
    check(code, said, run, place, before)


EXAMPLES = 12  # of the default tests


once = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@once
@given(wishes())
def test_two_steps_or_one_line(place, drawn):
    fuzzed(place, drawn)


@pytest.mark.slow
@settings(once, max_examples=300)
@given(wishes())
def test_two_steps_or_one_line_300_times(place, drawn):
    fuzzed(place, drawn)
