"""Deliberate bugs, and the tests that must catch them: `python tests/mutants.py [NAME ...]`."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".git", ".ci", ".venv", ".*_cache", "__pycache__", "outputs", "multirun", "datasets")


class Mutant(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; `tests`: pytest arguments below tests/."""

    name: str
    file: str
    old: str
    new: str
    tests: str


REF, FUN, NORMS = "gannorm/reference.py", "gannorm/functional.py", "gannorm/norms.py"
AUTO, CHECKS, CONV = "gannorm/autograd.py", "gannorm/checks.py", "gannorm/conversion.py"
TILE, LAUNCH = "kernels/tile.py", "kernels/launch.py"
INST, BATCH = "kernels/instance_norm.py", "kernels/batch_norm.py"

GAPS = "test_norm_gaps.py -k "
INST_REF = "test_instance_norm.py -k 'against and not triton and float64'"
INST_TRI = "test_instance_norm.py -k 'against and triton and float64 and not 67'"
RELU, LEAKY, SILU, INNER, AFTER = (
    f"test_instance_norm.py -k 'against and triton and float64 and not 67 and {e}'"
    for e in ("relu and not leaky", "leaky", "silu", "residual and not after", "residual_after")
)
TILES_TRI = "test_instance_norm.py -k 'against and triton and float64 and 67'"
BATCH_REF = "test_batch_norm.py -k 'against and not triton and float64'"
BATCH_TRI = "test_batch_norm.py -k 'against and triton and float64 and not 67'"
EVAL_TRI = "test_batch_norm.py -k 'against and triton and float64 and not 67 and False'"
SECOND = "test_autograd.py -k 'gradgradcheck and not triton'"
REFUSE = "test_functional.py -k refusals"
LAYERS = "test_norms.py"

# fmt: off
MUTANTS = tuple(Mutant(*m) for m in (
    # statistics, reference
    ("ref one-pass variance", REF, "_set_mean(power, groups) - error.square(), error",
     "_set_mean(x.square().mean(2), groups) - mean.square(), error",
     "test_instance_norm.py -k 'offsets and not triton'"),
    ("ref no shift", REF, "centred = x - _per_channel(first, n, c, groups)",
     "first, centred = first * 0, x.clone()", "test_instance_norm.py -k 'constant and not triton'"),
    ("ref mean error dropped", REF, "+ (offset - part)).detach()",
     "+ (offset - part)).detach() * 0", GAPS + "'ladder and not triton'"),
    ("ref eps outside the root", REF, "(var.double() + spec.eps).rsqrt()",
     "(var.double().sqrt() + spec.eps).reciprocal()", INST_REF),
    ("ref group order", REF, "stat.view(n, groups, 1).expand(n, groups, c // groups)",
     "stat.view(n, 1, groups).expand(n, c // groups, groups)", INST_REF),
    ("ref dtype of half", REF, "return y.to(x.dtype), mean, var", "return y, mean, var",
     "test_instance_norm.py -k 'half and not triton'"),
    ("ref input mutated", REF, "y, error = wide - mean", "y, error = wide.detach().sub_(mean)"
     "+ 0 * mean", GAPS + "'mutated and not triton'"),
    # affine and epilogue, reference
    ("ref row 0 for all", REF, "else table[labels])", "else table[labels * 0])",
     "test_instance_norm.py -k 'loop and not triton'"),
    ("ref one expand_dims", REF, "(table if labels is None else table[labels]).unsqueeze(-1)",
     "table.unsqueeze(-1) if labels is None else table[labels].unsqueeze(-2)",
     GAPS + "'rows and not triton'"),
    ("ref gamma added in eval", REF, "scale = scale * gain\n    if error",
     "scale = scale + gain if error is None else scale * gain\n    if error",
     BATCH_REF),
    ("ref residual twice", REF, "residual is not None and not spec.residual_after_activation",
     "residual is not None", INST_REF),
    ("ref residual before, not after", REF, "residual is not None and spec.residual_after_activ",
     "residual is not None and not spec.residual_after_activ", INST_REF),
    ("ref slope fixed", REF, "F.leaky_relu(y, spec.negative_slope, inplace)",
     "F.leaky_relu(y, 0.2, inplace)", INST_REF),
    # gradients, reference
    ("ref relu mask side", REF, "threshold_backward(dy, pre, 0)", "threshold_backward(dy, -pre, 0)",
     INST_REF),
    ("ref slope in the gradient", REF, "leaky_relu_backward(dy, pre, spec.negative_slope",
     "leaky_relu_backward(dy, pre, 0.2", INST_REF),
    ("ref silu derivative", REF, "silu_backward(dy, pre)", "silu_backward(dy, -pre)", INST_REF),
    ("ref no mean term in dx", REF, ".sub_(a).to(x.dtype)", ".to(x.dtype)", INST_REF),
    ("ref no x_hat term in dx", REF, "x_hat, b, value=-1)", "x_hat, b, value=0)", INST_REF),
    ("ref mean over wrong count", REF, "a = _set_mean((g_sum if row is None else g_sum * row) / s",
     "a = _set_mean((g_sum if row is None else g_sum * row) / (s - 1 + (s == 1))", INST_REF),
    ("ref dweight for dbias", REF, "dbias = table_grad(g_sum", "dbias = table_grad(gx_sum",
     INST_REF),
    ("ref inner residual gradient", REF, "dbias, g.to(dy.dtype)", "dbias, dy", INST_REF),
    ("ref table gradient row", REF, "index_put_((labels,)", "index_put_((labels.flip(0),)",
     "test_batch_norm.py -k 'against and not triton'"),
    ("ref detached variance", REF, "(var.double() + spec.eps)",
     "(var.detach().double() + spec.eps)", SECOND),
    # the autograd Function
    ("constants in the double backward", AUTO, "if not ctx.given_stats:", "if ctx.spec.groups:",
     SECOND),
    ("residual gradient missing", AUTO, "dresidual = dy  #", "dresidual = dy * 0  #", INST_REF),
    ("slope without the residual", AUTO, "residual if ctx.folded else None", "None", INST_REF),
    ("no contiguous dy", AUTO, "dy.contiguous(), x, weight", "dy, x, weight",
     GAPS + "'layout and triton'"),
    # statistics, kernels
    ("one-pass variance", TILE, "tile_square = tl.sum(tl.sum(centred * centred, 1), 0)",
     "tile_square = tl.sum(tl.sum(x * x, 1), 0) - tile_count * tile_mean * tile_mean",
     GAPS + "'outlier and triton'"),
    ("no shift", TILE, "first_x = tl.load(x_ptr + corner).to(DTYPE)",
     "first_x = tl.full([], 0.0, DTYPE)", "test_instance_norm.py -k 'constant and triton'"),
    ("mean error dropped", TILE, "((x - mean) - error)", "(x - mean)",
     GAPS + "'ladder and triton'"),
    ("eps outside the root", TILE, "tl.sqrt(var + tl.full([], EPS, var.dtype))",
     "(tl.sqrt(var) + tl.full([], EPS, var.dtype))", INST_TRI),
    ("last tile unmasked", TILE, "(s < size)[None, :]", "(s >= 0)[None, :]", INST_TRI),
    ("last planes unmasked", TILE, "mask = live[:, None] &", "mask = (p >= 0)[:, None] &",
     BATCH_TRI),
    ("Chan: weight of the mean", TILE, "delta * (tile_count / total)", "delta * 0.5", TILES_TRI),
    ("Chan: weight of the square", TILE, "(count * tile_count / total)", "tile_count", TILES_TRI),
    ("int32 planes", TILE, "start = plane // channels", "start = plane.to(tl.int32) // channels",
     GAPS + "'past and triton'"),
    ("int32 step", TILE, "p.to(tl.int64) * step", "p * step", GAPS + "tile_offsets"),
    ("int32 group", INST, "    first = group * planes", "    first = (group * planes).to(tl.int32)",
     GAPS + "'past and triton'"),
    ("group off by one", INST, "group * planes, 1, planes", "group, 1, planes", INST_TRI),
    ("stride of the channels", TILE, "plane % channels * stride_c\n    s",
     "plane % channels * stride_n // channels\n    s", GAPS + "'layout and triton'"),
    ("input taken as contiguous", FUN, "if rows.stride(2) != 1:", "if False:",
     GAPS + "'layout and triton'"),
    ("residual not contiguous", FUN, ".reshape(flat).contiguous()", ".reshape(flat)",
     GAPS + "'layout and triton'"),
    ("dtype of half", LAUNCH, "y = torch.empty(x.shape, dtype=x.dtype",
     "y = torch.empty(x.shape, dtype=_stat_dtype(x)", "test_instance_norm.py -k 'half and triton'"),
    # affine and epilogue, kernels
    ("row 0 for all", TILE, "index += label * channels", "index += label * 0",
     "test_instance_norm.py -k 'loop and triton'"),
    ("label of the channel", TILE, "labels_ptr + plane // channels",
     "labels_ptr + plane % channels", "test_instance_norm.py -k 'loop and triton'"),
    ("label outside the table", TILE, 'tl.where(fits, weight, float("nan"))', "weight",
     "test_batch_norm.py -k inside_the_table"),
    ("gamma added", TILE, "* (rstd * weight) + bias\n", "* (rstd + weight) + bias\n", INST_TRI),
    ("residual before, not after", TILE, "if RESIDUAL_AFTER:", "if not RESIDUAL_AFTER:", AFTER),
    ("slope fixed", TILE, "z * tl.full([], SLOPE, z.dtype), z)", "z * 0.2, z)", LEAKY),
    ("NaN lost in relu", TILE, "z = tl.where(z < 0, 0.0, z)", "z = tl.where(z > 0, z, 0.0)",
     "test_instance_norm.py -k 'poisons and triton'"),
    ("eval statistics of the batch", BATCH, "    if GIVEN_STATS:", "    if False:", EVAL_TRI),
    # gradients, kernels
    ("relu mask side", TILE, "tl.where(z <= 0, 0.0, dy)", "tl.where(z > 0, 0.0, dy)", RELU),
    ("relu gradient at 0", TILE, "tl.where(z <= 0, 0.0, dy)", "tl.where(z < 0, 0.0, dy)",
     GAPS + "'kink and triton'"),
    ("leaky_relu gradient at 0", TILE, "tl.where(z > 0, dy", "tl.where(z >= 0, dy",
     GAPS + "'kink and triton'"),
    ("slope in the gradient", TILE, "dy * tl.full([], SLOPE, z.dtype))", "dy * 0.2)", LEAKY),
    ("silu derivative", TILE, "(1.0 + z * (1.0 - sigmoid))", "(1.0 + z * sigmoid)", SILU),
    ("no mean term in dx", TILE, "dx - a / elements - x_hat", "dx - x_hat", INST_TRI),
    ("no x_hat term in dx", TILE, " - x_hat * (b / elements)", "", INST_TRI),
    ("mean over wrong count", TILE, "DTYPE) * planes * size", "DTYPE) * planes * size - 1",
     INST_TRI),
    ("eval gradient of training", TILE, "if not GIVEN_STATS:\n", "if True:\n", EVAL_TRI),
    ("inner residual gradient", TILE, "tl.store(g_ptr + offsets, g.to",
     "tl.store(g_ptr + offsets, (g * 0).to", INNER),
    ("dweight and dbias swapped", LAUNCH, "_table_grad(sums[1], weight",
     "_table_grad(sums[0], weight", INST_TRI),
    ("table gradient row", TILE, "== row, value", "== row + 1, value",
     "test_instance_norm.py -k 'loop and triton'"),
    # ops
    ("momentum flipped", FUN, "running), momentum)", "running), 1 - momentum)",
     "test_batch_norm.py -k 'biased and not triton'"),
    ("no running update", FUN, "running), momentum)", "running), 0.0)",
     "test_batch_norm.py -k 'biased and not triton'"),
    ("biased for unbiased", FUN, 'if var_estimator == "unbiased":', 'if var_estimator == "biased":',
     "test_batch_norm.py -k 'biased and not triton'"),
    ("instance variance biased", FUN, "count = math.prod(input.shape[2:])\n",
     "count = 10**9\n", "test_instance_norm.py -k 'running and not triton'"),
    ("non-finite update", FUN, "in pairs]).all(0)", "in pairs]).all(0) | True",
     "test_batch_norm.py -k 'finite and not triton'"),
    ("non-finite variance", FUN, "for _, new in pairs]).all(0)", "for _, new in pairs])[0]",
     GAPS + "'overflow and not triton'"),
    ("degenerate ignored", FUN, 'if count == 1 and degenerate != "beta":', "if count == 1:",
     "test_batch_norm.py -k 'one_value and not triton'"),
    ("no size check, batch", FUN, "if count == 1 and degenerate", "if count == 0 and degenerate",
     "test_batch_norm.py -k 'one_value and not triton'"),
    ("op evaluates with the batch's", FUN, "stats if stats is not None else (None, None)",
     "(None, None)", BATCH_REF),
    ("layout forgotten", FUN, "return torch.channels_last if channels_last else",
     "return", "test_instance_norm.py -k channels_last"),
    ("no size check, instance", CHECKS, "math.prod(x.shape[2:]) == 1", "False", REFUSE),
    ("negative labels", CHECKS, "if low < 0 or high >= rows:", "if high >= rows:", REFUSE),
    ("label past the table", CHECKS, "high >= rows:", "high > rows:", REFUSE),
    ("devices unchecked", CHECKS, "t.device != x.device", "t.device == x.device is None", REFUSE),
    # layers and convert
    ("gamma starts at 0", NORMS, "nn.init.normal_(self.weight, *self.weight_init)",
     "nn.init.normal_(self.weight, 0.0, self.weight_init[1])", GAPS + "starts"),
    ("running_var starts at 0", NORMS, "torch.ones(num_features) if tracked",
     "torch.zeros(num_features) if tracked", GAPS + "starts"),
    ("layer evaluates with the batch's", NORMS, "training = norm.training or", "training = True or",
     LAYERS + " -k twins"),
    ("batches not counted", NORMS, "num_batches_tracked.add_(1)", "num_batches_tracked.add_(0)",
     LAYERS),
    ("epilogue ignored by a layer", NORMS,
     "self.bias, self.eps, **self.epilogue.kwargs(residual)\n", "self.bias, self.eps\n",
     LAYERS + " -k build"),
    ("residual ignored by layers", NORMS, '"residual": residual}', '"residual": None}', LAYERS),
    ("convert forgets eps", CONV, "return norm.eps, norm.momentum", "return 1e-5, norm.momentum",
     "test_conversion.py -k itself"),
    ("convert forgets momentum", CONV, "return norm.eps, norm.momentum", "return norm.eps, 0.1",
     "test_conversion.py -k itself"),
    ("convert forgets the mode", CONV, "ours.train(norm.training)", "ours",
     "test_conversion.py -k itself"),
    ("convert fuses twice", CONV, "if activation is None or norm.epilogue.activation is not None:",
     "if activation is None:", GAPS + "fused_activation"),
    ("convert keeps the activation", CONV, "replacement._modules[behind] = nn.Identity()", "pass",
     "test_conversion.py -k 'unet or twice'"),
))
# fmt: on


def copy(to: Path) -> Path:
    """The repository in a folder of its own, symlinks kept."""
    ignore = shutil.ignore_patterns(*LEFT_OUT)
    return Path(shutil.copytree(ROOT, to / "repo", symlinks=True, ignore=ignore))


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the bug in; ValueError where the list is stale."""
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.old!r} stands {source.count(mutant.old)} times, not once, "
            f"in {mutant.file}; update tests/mutants.py"
        )
    return source.replace(mutant.old, mutant.new)


def caught(mutant: Mutant, repo: Path) -> bool:
    """Put the bug into a copy of the repository: do the mutant's tests fail there?"""
    path = repo / mutant.file
    path.write_text(mutated(path.read_text(encoding="utf-8"), mutant), encoding="utf-8")
    file, *selection = shlex.split(mutant.tests)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
    result = subprocess.run(
        [sys.executable, "-B", "-m", "pytest", *options, f"tests/{file}", *selection],
        cwd=repo, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode > 1:  # no test ran; below 0: a crash, which counts as caught
        raise RuntimeError(f"{mutant.name}: pytest {mutant.tests}\n{result.stdout}{result.stderr}")
    return result.returncode != 0


def main(names: list[str]) -> int:
    unknown = set(names) - {m.name for m in MUTANTS}
    if unknown:
        raise SystemExit(f"unknown mutants: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTANTS if not names or m.name in names]
    survived = 0
    progress = tqdm(chosen, unit="mutant", dynamic_ncols=True)
    for mutant in progress:
        progress.set_description(mutant.name)
        with tempfile.TemporaryDirectory() as folder:
            dead = caught(mutant, copy(Path(folder)))
        survived += not dead
        tqdm.write(f"{'caught  ' if dead else 'SURVIVED'}  {mutant.name}", file=sys.stdout)
    print(f"{len(chosen) - survived} caught, {survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
