"""Deliberate bugs, and the tests that must catch them: `python tests/mutants.py [NAME ...]`."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mutants_reliability import RELIABILITY
from mutants_step import STEP
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


REF, FUN, NORMS, BASE, AUTO, CHECKS, CONV, BACK, OPS, PORT = (
    f"gannorm/norms/{name}.py"
    for name in (
        "composed", "functional", "layers", "base", "autograd", "checks", "convert", "backend",
        "ops", "portable",
    )
)  # fmt: skip
CPU, CPU_C, REAL = (
    f"gannorm/norms/cpu/{name}" for name in ("__init__.py", "norm.c", "norm_real.c")
)
TILE, LAUNCH = "kernels/tile.py", "kernels/launch.py"
SYNC, PIECES, KPIECES = "gannorm/norms/sync.py", "gannorm/norms/pieces.py", "kernels/pieces.py"
LOOPED = "kernels/looped.py"
PERSIST, SPLIT, LAYOUT = "kernels/persistent.py", "kernels/split.py", "kernels/layout.py"

GAPS = "test_norm_gaps.py -k "
INST_REF = "test_instance_norm.py -k 'against and torch and float64'"
INST_CPU = "test_instance_norm.py -k 'against and cpu'"
INST_TRI = "test_instance_norm.py -k 'against and triton and float64 and not 67'"
RELU, LEAKY, SILU, INNER, AFTER = (
    f"test_instance_norm.py -k 'against and triton and float64 and not 67 and {e}'"
    for e in ("relu and not leaky", "leaky", "silu", "residual and not after", "residual_after")
)
BATCH_REF = "test_batch_norm.py -k 'against and torch and float64'"
ROWS = "test_cpu.py -k 'rows and against or far_from'"
BATCH_CPU = "test_batch_norm.py -k 'against and cpu'"
BATCH_TRI = "test_batch_norm.py -k 'against and triton and float64 and not 67'"
EVAL_TRI = "test_batch_norm.py -k 'against and triton and float64 and not 67 and False'"
SECOND = "test_autograd.py -k 'gradgradcheck and not triton'"
PLANS = "test_launch.py -k "
WHOLE, PLANES, ELEMENTS, CHUNKS = (
    PLANS + f"'every and contiguous and {kind}'"
    for kind in ("persistent", "planes", "elements", "chunks")
)
LAST, SLICED, RUNNING, MAGNITUDES = (
    PLANS + f"'{test}'" for test in ("every and last", "every and sliced", "running", "magnitudes")
)
LOOP, INSIDE = (
    "test_instance_norm.py -k 'loop and triton'",
    "test_batch_norm.py -k inside_the_table",
)
MANY = "test_sync.py -k processes_together"
BIASED = "test_batch_norm.py -k 'biased and not triton'"
REFUSE = "test_functional.py -k refusals"
LAYERS = "test_norms.py"

# fmt: off
MUTANTS = tuple(Mutant(*m) for m in (
    *RELIABILITY, *STEP,
    # statistics, reference
    ("ref one-pass variance", REF, "small.square().mean(2), groups) - (error * unit).square()",
     "(x * per_channel(unit, n, c, groups)).square().mean(2), groups) - (mean * unit).square()",
     "test_instance_norm.py -k 'offsets and torch'"),
    ("ref no shift", REF, "centred = x - per_channel(first, n, c, groups)",
     "first, centred = first * 0, x.clone()", "test_instance_norm.py -k 'constant and torch'"),
    ("ref mean error dropped", REF, "+ (offset - part)).detach()",
     "+ (offset - part)).detach() * 0", GAPS + "'ladder and torch'"),
    ("ref eps outside the root", REF, "(var + spec.eps).rsqrt()",
     "(var.sqrt() + spec.eps).reciprocal()", INST_REF),
    ("ref squares overflow", REF, "power > 2.0**60", "power > 2.0**600",
     "test_inputs.py -k 'magnitude and torch'"),
    ("ref eps unscaled", REF, "spec.eps * unit.double().square()", "spec.eps",
     "test_inputs.py -k 'magnitude and torch'"),
    ("ref group order", REF, "stat.view(n, groups, 1).expand(n, groups, c // groups)",
     "stat.view(n, 1, groups).expand(n, c // groups, groups)", INST_REF),
    ("ref dtype of half", REF, "return y.to(x.dtype), stats", "return y, stats",
     "test_instance_norm.py -k 'half and torch'"),
    ("ref input mutated", REF, "        y = wide - mean", "        y = wide.detach().sub_(mean"
     ".view(1, c, 1)) + 0 * mean", GAPS + "'mutated and torch'"),
    # several processes
    ("sync wrong count", PIECES, "counts = everyone[:, :1]", "counts = everyone[:1, :1]", MANY),
    ("sync own mean", PIECES, "torch.where(counts > 0, means - centre, 0.0)", "means * 0", MANY),
    ("sync own sums in dx", SYNC, "add(totals, _group", "add(totals.clone(), _group", MANY),
    ("sync second order", SYNC, "return _Sum.apply(grad, ctx.group)", "return grad", MANY),
    ("sync None", AUTO, "grads(call.sync is not None)", "grads(False)", MANY),
    ("sync in evaluation", BASE, "process_group if self.training else None", "process_group", MANY),
    ("sync C squares", REAL, "var * values_of(p)", "var", MANY),
    ("parallel part", "gannorm/parallel.py", "parts[:, rank()]", "parts[:, 0]", "test_parallel.py"),
    ("parallel sum", "gannorm/parallel.py", "flat.div_(world())", "flat", "test_parallel.py"),
    ("sync kernel bessel", KPIECES, "reciprocal(tl.maximum(count - 1, 1), 1)", "1", MANY),
    # affine and epilogue, reference
    ("ref row 0 for all", REF, "else table[labels])", "else table[labels * 0])",
     "test_instance_norm.py -k 'loop and torch'"),
    ("ref one expand_dims", REF, "(table if labels is None else table[labels]).unsqueeze(-1)",
     "table.unsqueeze(-1) if labels is None else table[labels].unsqueeze(-2)",
     GAPS + "'rows and not triton'"),
    ("ref gamma added in eval", REF, "scale = scale * gain\n    if given",
     "scale = scale + gain if given is not None else scale * gain\n    if given", BATCH_REF),
    ("ref residual twice", REF, "residual is not None and not after:",
     "residual is not None:", INST_REF),
    ("ref residual before, not after", REF, "residual is not None and after:",
     "residual is not None and not after:", INST_REF),
    ("ref slope fixed", REF, "F.leaky_relu(y, spec.negative_slope, ",
     "F.leaky_relu(y, 0.2, ", INST_REF),
    # gradients, reference
    ("ref relu mask side", REF, "threshold_backward.grad_input(dy, pre, 0",
     "threshold_backward.grad_input(dy, -pre, 0", INST_REF),
    ("ref slope in the gradient", REF, "slope = spec.negative_slope\n", "slope = 0.2\n", INST_REF),
    ("ref silu derivative", REF, "silu_backward.grad_input(dy, pre,",
     "silu_backward.grad_input(dy, -pre,", INST_REF),
    ("ref no mean term in dx", REF, ", value=-1).sub_(a)", ", value=-1)", INST_REF),
    ("ref no x_hat term in dx", REF, "x_hat, b, value=-1)", "x_hat, b, value=0)", INST_REF),
    ("ref mean over wrong count", REF, "a = _set_mean((g_sum if row is None else g_sum * row) / s",
     "a = _set_mean((g_sum if row is None else g_sum * row) / (s - 1 + (s == 1))", INST_REF),
    ("ref dweight for dbias", REF, "dbias = table_grad(g_sum", "dbias = table_grad(gx_sum",
     INST_REF),
    ("ref inner residual gradient", REF, "dbias, g.to(dy.dtype)", "dbias, dy", INST_REF),
    ("ref table gradient row", REF, "index_add_(0, labels", "index_add_(0, labels.flip(0)",
     "test_batch_norm.py -k 'against and torch'"),
    ("ref detached variance", REF, "(var + spec.eps)", "(var.detach() + spec.eps)", SECOND),
    # the C code
    ("cpu merge of means", REAL, "(long double)delta * share", "(long double)delta * 0.5",
     "test_cpu.py -k 'against and few'"),
    ("cpu spread between pieces", REAL, "b.squares + delta * delta", "b.squares + delta",
     "test_cpu.py -k 'against and few'"),
    ("cpu second look", REAL, "square - (double)sum * sum / count", "square",
     "test_inputs.py -k 'offsets and cpu'"),
    ("cpu overflow", REAL, "if (isfinite(m.squares)) return m;", "return m;",
     "test_inputs.py -k 'magnitude and cpu'"),
    ("cpu overflow in columns", REAL, "if (!isfinite(m.squares)) {", "if (0) {",
     "test_inputs.py -k 'magnitude and cpu'"),
    ("cpu columns", REAL, "NAME(merge)(found + j, m);", "found[j] = m;",
     "test_cpu.py -k 'against and short'"),
    ("cpu rounded mean", REAL, "(REAL)(mean - rounded)", "0",
     "test_inputs.py -k 'offsets and cpu'"),
    ("cpu running variance", REAL, "(REAL)(var * p->bessel)", "(REAL)var",
     "test_batch_norm.py -k 'cpu'"),
    ("cpu NaN in the running mean", REAL,
     "if ((m && !isfinite(rounded)) || (v && !isfinite(spread))) return;", "",
     "test_batch_norm.py -k 'non_finite and cpu'"),
    ("cpu gain of dx", REAL, "(gain ? gain[j] : 1) * gx_sum[j]", "gx_sum[j]", BATCH_CPU),
    ("cpu mean of dx", REAL, "(of[1] * a.lag[j] - of[0])", "(of[1] * a.lag[j])", BATCH_CPU),
    ("cpu slope of dx", REAL, "(-of[1] * a.rstd[j])", "(of[1] * a.rstd[j])", BATCH_CPU),
    ("cpu labels of the gradient", REAL, "* p->c + first;\n      if", "* 0 + first;\n      if",
     BATCH_CPU),
    ("cpu later parts of a plane", REAL, "(start ? g_sum[j] : 0) + sum;", "sum;",
     "test_cpu.py -k 'against and planes'"),
    ("cpu later cuts of rows", REAL, "(start ? g_sum[j] : 0) + sum[j];", "sum[j];",
     "test_cpu.py -k 'against and rows'"),
    ("cpu means of rows", REAL, "(WIDE)delta * share", "(WIDE)delta * 0.4", ROWS),
    ("cpu spread between stretches", REAL, "others[j] + delta * delta * (seen * share)",
     "others[j]", ROWS),
    ("cpu spread between channels", REAL, "seen * d * d", "0 * d * d", ROWS),
    ("cpu last stretch", REAL, "k % chunks == chunks - 1 ? rest : stretch", "stretch", ROWS),
    ("cpu overflow in rows", REAL, "if (finite) return;", "return;",
     "test_cpu.py -k out_of_range"),
    ("cpu middle of long rows", REAL, "few = least(at.count, LANES);",
     "few = least(least(at.count, length_of(p)), LANES);", "test_cpu.py -k keep_the_digits"),
    ("cpu output of windows", CPU, "memory_format=torch.contiguous_format",
     "memory_format=torch.preserve_format", "test_cpu.py -k overlapping"),
    ("cpu narrow rows", REAL, "a[i] = a[i - at.planes]", "a[i] = a[0]", ROWS),
    ("cpu gradient in rows", CPU, "torch.empty_like(x, dtype=t.dtype).copy_(t)",
     "t.contiguous()", "test_cpu.py -k channels_last"),
    ("cpu silu", REAL, "NAME(fma)(v, 1 - s, 1)", "NAME(fma)(v, s, 1)", INST_CPU),
    ("cpu bfloat16 ties", CPU_C, "0x7fff + (bits >> 16 & 1)", "0x8000",
     "test_cpu.py -k ties"),
    ("cpu cuts", CPU_C, "k % chunks * length, c =", "0, c =", "test_cpu.py -k 'against'"),
    ("compiled code avoids the kernels", REF, "maybe_current_level() is not None",
     "maybe_current_level() is None", "test_ops.py -k compiled_code"),
    ("compiled code gets C kernels", BACK, "eager and cpu", "cpu",
     "test_ops.py -k 'inductor' -m slow"),
    # the autograd Function
    ("constants in the double backward", AUTO, "given, call.spec)\n            pairs",
     "None if call.spec.groups else (stats[0], stats[3]), call.spec)\n            pairs", SECOND),
    ("residual gradient missing", AUTO, "dresidual = dy  #", "dresidual = dy * 0  #", INST_REF),
    ("slope without the residual", AUTO, "residual if call.folded else None", "None", INST_REF),
    ("raw kernels under create_graph", AUTO, "if torch.is_grad_enabled():", "if False:", SECOND),
    # what is remembered of a call
    ("strides not looked at", FUN, "t.shape, t.stride(), t.dtype", "t.shape, t.dtype",
     PLANS + "'every and persistent and not leaky'"),
    ("settings not looked at", FUN, "(op, own, settings, selected()", "(op, own, selected()",
     BATCH_TRI),
    # registered operators
    ("op forgets the residual's place", OPS, "spec = NormSpec(groups, eps, activation, "
     "negative_slope, residual_after_activation)", "spec = NormSpec(groups, eps, activation, "
     "negative_slope)", "test_ops.py -k 'compile and triton'"),
    ("op gives statistics of the batch", OPS, "torch.empty_like(t) for t in (weight, bias))",
     "torch.empty_like(t).t() for t in (weight, bias))", "test_ops.py -k opcheck"),
    ("op's residual gradient", OPS, "residual = dresidual if ctx.folded else dy",
     "residual = dy", "test_ops.py -k 'compile and triton'"),
    # statistics, kernels
    ("one-pass variance", PERSIST, "shifted - offset.to(DTYPE)[None, :, None]", "shifted",
     GAPS + "'outlier and triton'"),
    ("no shift", TILE, "tl.load(x_ptr + offset, mask=g < sets, other=0).to(DTYPE)",
     "tl.load(x_ptr + offset, mask=g < 0, other=0).to(DTYPE)",
     "test_instance_norm.py -k 'constant and triton'"),
    ("mean error dropped", TILE, "(mean64 - mean.to(tl.float64))", "(mean64 * 0)",
     GAPS + "'ladder and triton'"),
    ("eps outside the root", TILE, "tl.rsqrt(var64 + tl.full([], EPS, tl.float64))",
     "(1 / (tl.sqrt(var64) + tl.full([], EPS, tl.float64)))", WHOLE),
    ("squares overflow", TILE, 'huge = total == float("inf")', "huge = total < 0", MAGNITUDES),
    ("split squares overflow", SPLIT, 'huge = square == float("inf")', "huge = square < 0",
     MAGNITUDES),
    ("looped squares overflow", LOOPED, 'huge = square == float("inf")', "huge = square < 0",
     MAGNITUDES),
    ("looped: first tile twice", LOOPED, "tiles - 1 - back, g0, n, planes, sets, size,\n"
     "            DOMAIN, BLOCK_P, BLOCK_G, BLOCK_S, EVEN,\n        )  # fmt: skip\n        weight",
     "tl.maximum(tiles - 1 - back, 1), g0, n, planes, sets, size,\n"
     "            DOMAIN, BLOCK_P, BLOCK_G, BLOCK_S, EVEN,\n        )  # fmt: skip\n        weight",
     PLANS + "'every and contiguous and looped'"),
    ("looped: short lanes count whole", LOOPED, "met += tl.where(mask, 1.0, 0.0)", "met += 1.0",
     PLANS + "'every and contiguous and looped'"),
    ("looped: spread of the lanes", LOOPED, "square + met * (apart * apart)", "square",
     PLANS + "'every and contiguous and looped'"),
    ("looped: planes' weights", LOOPED, "a += weight * g_sum", "a += g_sum",
     PLANS + "'every and contiguous and looped'"),
    ("pivot nowhere", TILE, "> 4.0) | (var == 0)", "> 1e9)", MAGNITUDES),
    ("last elements unmasked", TILE, "live[:, :, None] & (s < size)", "live[:, :, None] & (s >= 0)",
     WHOLE),
    ("last planes unmasked", TILE, "(p < planes) & (g < sets)", "(p >= 0) & (g < sets)", WHOLE),
    ("last sets unmasked", TILE, "(p < planes) & (g < sets)", "(p < planes) & (g >= 0)", WHOLE),
    ("even where it is not", LAUNCH, "even = planes % block_p == 0 and", "even =", WHOLE),
    ("Welford: weight of the mean", SPLIT, "delta * (1.0 / turn)", "delta * 0.5", CHUNKS),
    ("Welford: the old mean twice", SPLIT, "first[None, :, None]) * scale - mean), 0.0)",
     "first[None, :, None]) * scale - mean + delta / turn), 0.0)", CHUNKS),
    ("Chan: lanes apart", SPLIT, "square + counts * (apart * apart)", "square", ELEMENTS),
    ("Chan: chunks apart", SPLIT, "inner + share * apart * apart", "inner", CHUNKS),
    ("Chan: share of a chunk", SPLIT, "tl.where(mask, mean * share, 0.0)",
     "tl.where(mask, mean * size, 0.0)", CHUNKS),
    ("parts of a plane", SPLIT, "p0 = chunk // parts * BLOCK_P", "p0 = chunk % parts * BLOCK_P",
     ELEMENTS),
    ("chunk's end", SPLIT, "tl.minimum(part * step + step, size)", "part * step + step", CHUNKS),
    ("int32 offsets", TILE, "s.to(tl.int64) * stride_s", "s * stride_s", GAPS + "past_2"),
    ("int32 sample", TILE, "offset = sample.to(tl.int64) * stride_n",
     "offset = (sample * stride_n).to(tl.int32)", GAPS + "'past and triton'"),
    ("group off by one", TILE, "g.to(tl.int64) * planes + p", "g.to(tl.int64) + p", WHOLE),
    ("stride of the channels", TILE, "channel * stride_c)[", "channel * stride_n)[", SLICED),
    ("residual's strides", LAUNCH, "residual = placed(residual, self.stride)", "pass", LAST),
    ("gradient's strides", LAUNCH, "dy = placed(dy, self.stride)", "pass",
     GAPS + "'layout and triton'"),
    ("dtype of half", LAUNCH, "y = torch.empty_like(x) if",
     "y = torch.empty_like(x, dtype=self.statistics) if",
     "test_instance_norm.py -k 'half and triton'"),
    ("layout of channels_last", LAYOUT, "if size > 1 and c > 1", "if False",
     LAST),
    # affine and epilogue, kernels
    ("row 0 for all", TILE, "index += label * channels", "index += label * 0", LOOP),
    ("label outside the table", TILE, 'float("nan"), weight)', "0.0, weight)", INSIDE),
    ("masked planes poison", TILE, "live & ~fits", "~fits",
     "test_batch_norm.py -k 'against and triton and float64 and silu'"),
    ("gamma added", TILE, "scale = rstd[None, :] * weight", "scale = rstd[None, :] + weight",
     INST_TRI),
    ("residual before, not after", TILE, "if RESIDUAL_AFTER:", "if not RESIDUAL_AFTER:", AFTER),
    ("slope fixed", TILE, "z * tl.full([], SLOPE, z.dtype), z)", "z * 0.2, z)", LEAKY),
    ("NaN lost in relu", TILE, "z = tl.where(z < 0, 0.0, z)", "z = tl.where(z > 0, z, 0.0)",
     "test_instance_norm.py -k 'poisons and triton'"),
    ("eval statistics of the batch", LAUNCH, "None, mean, var, stats, None, None)",
     "None, None, None, stats, None, None)", EVAL_TRI),
    # gradients, kernels
    ("relu mask side", TILE, "tl.where(z <= 0, 0.0, dy)", "tl.where(z > 0, 0.0, dy)", RELU),
    ("relu gradient at 0", TILE, "tl.where(z <= 0, 0.0, dy)", "tl.where(z < 0, 0.0, dy)",
     GAPS + "'kink and triton'"),
    ("leaky_relu gradient at 0", TILE, "tl.where(z > 0, dy", "tl.where(z >= 0, dy",
     GAPS + "'kink and triton'"),
    ("slope in the gradient", TILE, "dy * tl.full([], SLOPE, z.dtype))", "dy * 0.2)", LEAKY),
    ("silu derivative", TILE, "(1.0 + z * (1.0 - sigmoid))", "(1.0 + z * sigmoid)", SILU),
    ("no mean term in dx", PERSIST, " - a[None, :, None]", "", WHOLE),
    ("no x_hat term in dx", PERSIST, " - x_hat * b[None, :, None]", "", WHOLE),
    ("mean over wrong count", PERSIST, "DTYPE) * planes * size", "DTYPE) * planes * size - 1",
     WHOLE),
    ("split: no mean term in dx", SPLIT, " - a[None, :, None]", "", PLANES),
    ("split: a part forgotten", SPLIT, "tl.where(part < parts, n", "tl.where(part < 1, n",
     ELEMENTS),
    ("eval gradient of training", LAUNCH, "None if self.given else sums, None", "sums, None",
     EVAL_TRI),
    ("inner residual gradient", PERSIST, "tl.store(g_ptr + offsets, g.to",
     "tl.store(g_ptr + offsets, (g * 0).to", INNER),
    ("dweight, dbias swapped", PERSIST, "tl.where(hit, gx_sum, 0.0)", "tl.where(hit, g_sum, 0.0)",
     BATCH_TRI),
    ("persistent table's row", PERSIST, "(label == row)", "(label == row + 1)", BATCH_TRI),
    ("table gradient row", SPLIT, "other=-1) == row", "other=-1) == row + 1", LOOP),
    ("table gradient parts", SPLIT, "hit & (part < parts)", "hit & (part < 1)", ELEMENTS),
    # running statistics
    ("kernel: momentum flipped", TILE, "(mean - old) * momentum", "(mean - old) * (1 - momentum)",
     RUNNING),
    ("kernel: no running variance", TILE, "(var - old) * momentum", "(var - old) * 0", RUNNING),
    ("kernel: biased variance", TILE, "var = var * bessel", "var = var * 1.0", RUNNING),
    ("kernel: non-finite update", TILE, 'ty)) < float("inf")', "ty)) != 7.0", RUNNING),
    ("kernel: contracted to 0", TILE, 'tl.abs(value.to(ptr.dtype.element_ty)) < float("inf")',
     "value.to(ptr.dtype.element_ty) - value.to(ptr.dtype.element_ty) == 0",
     "test_compile.py -k product"),
    ("momentum flipped", REF, "new, buffer), momentum)", "new, buffer), 1 - momentum)", BIASED),
    ("no running update", REF, "new, buffer), momentum)", "new, buffer), 0.0)", BIASED),
    ("biased for unbiased", FUN, 'running and var_estimator == "unbiased"',
     'running and var_estimator == "biased"', BIASED),
    ("instance variance biased", FUN, "if unbiased else", "if unbiased and not groups else",
     "test_instance_norm.py -k 'running and not triton'"),
    ("non-finite update", REF, "in pairs]).all(0)", "in pairs]).all(0) | True",
     "test_batch_norm.py -k 'finite and not triton'"),
    ("non-finite variance", REF, "for _, new in pairs]).all(0)", "for _, new in pairs])[0]",
     GAPS + "'overflow and not triton'"),
    ("degenerate ignored", CHECKS, ' and degenerate != "beta":', ":",
     "test_batch_norm.py -k 'one_value and not triton'"),
    ("no size check, batch", CHECKS, "max(channels, 1) == 1 and", "max(channels, 1) == 0 and",
     "test_batch_norm.py -k 'one_value and not triton'"),
    ("op evaluates with the batch's", FUN, "launches, not own, running",
     "launches, False, running", BATCH_REF),
    ("no size check, instance", CHECKS, "math.prod(x.shape[2:]) == 1", "False", REFUSE),
    ("negative labels", CHECKS, "if low < 0 or high >= rows:", "if high >= rows:", REFUSE),
    ("label past the table", CHECKS, "high >= rows:", "high > rows:", REFUSE),
    ("devices unchecked", CHECKS, "t.device != x.device", "t.device == x.device is None", REFUSE),
    # layers and convert
    ("gamma starts at 0", BASE, "nn.init.normal_(self.weight, *self.weight_init)",
     "nn.init.normal_(self.weight, 0.0, self.weight_init[1])", GAPS + "starts"),
    ("running_var starts at 0", BASE, '("running_var", 1)', '("running_var", 0)', GAPS + "starts"),
    ("bias=False ignored", BASE, "if not bias:", "if False:", "test_layers.py -k without_bias"),
    ("layer evaluates with the batch's", BASE, "mean is None and var is None, 0.0)", "True, 0.0)",
     LAYERS + " -k twins"),
    ("batches not counted", BASE, "count.add_(1)", "count.add_(0)", LAYERS),
    ("empty batches counted", BASE, "if count is not None and (input.numel() or self._shared()):",
     "if count is not None:", "test_layers.py -k not_counted"),
    ("share of the average", BASE, "1.0 / (count + 1)", "1.0 / (count + 2)",
     "test_layers.py -k not_counted"),
    ("statistics not switched off", BASE, "return run(None, None, True, 0.0)",
     "return run(mean, var, True, 0.5)", "test_layers.py -k switched"),
    ("epilogue ignored by a layer", NORMS,
     "self.bias, self.eps, **self.epilogue.kwargs(residual)\n", "self.bias, self.eps\n",
     LAYERS + " -k build"),
    ("residual ignored by layers", BASE, '"residual": residual,', '"residual": None,', LAYERS),
    ("residual of one image", NORMS, "None if residual is None else residual.unsqueeze(0)", "None",
     LAYERS + " -k one_image"),
    ("convert over a forward", CONV, 'if "forward" in module.__dict__:', "if False:",
     "test_convert.py -k replaced"),
    ("convert fuses twice", CONV, "norm.epilogue.activation is not None", "False",
     GAPS + "fused_activation"),
    ("convert fuses past hooks", CONV, "or _watched(norm)", "", "test_convert.py -k hooks_see"),
    ("convert fuses past all hooks", CONV, "or _has_any_global_hook()", "",
     "test_convert.py -k every_module"),
    ("convert skips dropouts", CONV, "(module.p == 0 or not module.training)", "True",
     "test_convert.py -k between"),
    ("convert forgets the slope", CONV, 'getattr(activation, "negative_slope", 0.2)', "0.2",
     "test_convert.py -k which"),
    ("convert forgets the skip", CONV, "return norm(x, residual, epilogue)",
     "return norm(x, None, epilogue)", "test_convert.py -k resnets"),
    ("convert pickled as itself", CONV, "kind.__bases__[1]", "kind.__bases__[0]",
     "test_convert.py -k resnets"),
    # what tools see
    ("recomputed batches counted", BASE, "or is_recomputed()", "", "test_tools.py -k counts_a"),
    ("recomputed statistics move", FUN, "and composed.is_recomputed()", "and False",
     "test_tools.py -k counts_a"),
    ("a graph without labels' bias", PORT, "y = y + F.embedding(labels, bias)[inner]", "pass",
     "test_tools.py -k make_fx"),
    ("a graph of our own ops", FUN, "portable.is_asked(*tensors)\n        and", "False and",
     "test_tools.py -k make_fx"),
    ("torch gets one statistic alone", PORT, "(mean is None) == (var is None)", "True",
     "test_tools.py -k takes_not"),
    ("torch gets no values", PORT, "x.numel() > 0", "True", "test_tools.py -k takes_not"),
    ("a graph's variance biased", PORT, "/ count", "* 0", "test_export.py -k biased"),
    ("old files refused", BASE, '.get("version") or 0) < 2', '.get("version") or 0) < 0',
     "test_tools.py -k old_files"),
    ("made anew without a word", BASE, "in REBUILDERS:", "in ():", "test_tools.py -k refused"),
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


def fails(tests: str, repo: Path) -> bool:
    """Whether `tests` fail in a copy of the repository; RuntimeError where none was run."""
    file, *selection = shlex.split(tests)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow or sampled"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
    result = subprocess.run(
        [sys.executable, "-B", "-m", "pytest", *options, f"tests/{file}", *selection],
        cwd=repo, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode > 1:  # no test ran; below 0: a crash, which counts as caught
        raise RuntimeError(f"pytest tests/{tests}\n{result.stdout}{result.stderr}")
    return result.returncode != 0


def caught(mutant: Mutant | str) -> bool:
    """Put the bug into a copy of the repository, or none (a selection alone): do the tests fail?"""
    with tempfile.TemporaryDirectory() as folder:
        repo = copy(Path(folder))
        if isinstance(mutant, str):
            return fails(mutant, repo)
        path = repo / mutant.file
        path.write_text(mutated(path.read_text(encoding="utf-8"), mutant), encoding="utf-8")
        return fails(mutant.tests, repo)


def main(names: list[str]) -> int:
    unknown = set(names) - {m.name for m in MUTANTS}
    if unknown:
        raise SystemExit(f"unknown mutants: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTANTS if not names or m.name in names]
    selections = list(dict.fromkeys(m.tests for m in chosen))
    survived = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sound = pool.map(caught, selections)
        progress = tqdm(
            zip(selections, sound, strict=True), total=len(selections), unit="selection"
        )
        if broken := [tests for tests, failed in progress if failed]:
            raise SystemExit("these fail without a bug: " + "; ".join(broken))
        results = zip(chosen, pool.map(caught, chosen), strict=True)
        for mutant, dead in tqdm(results, total=len(chosen), unit="mutant", dynamic_ncols=True):
            survived += not dead
            tqdm.write(f"{'caught  ' if dead else 'SURVIVED'}  {mutant.name}", file=sys.stdout)
    print(f"{len(chosen) - survived} caught, {survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
