"""Deliberate bugs in what makes a training step fast: see mutants.py."""

M, K = "gannorm/models/", "gannorm/tasks/"
C, OPTIONS = M + "winograd.c", "gannorm/training/options.py"

# fmt: off
STEP = (
    ("reflects the border itself", C, "i == size ? size - 2", "i == size ? size - 1",
     "test_winograd.py -k values"),
    ("reflection is zeros", C, "if (i < 0) i = p->reflect ? -i : -1;", "if (i < 0) i = -1;",
     "test_winograd.py -k values"),
    ("no upsampling", C, "return i < 0 ? -1 : i >> p->up;", "return i < 0 ? -1 : i;",
     "test_winograd.py -k values"),
    ("means are sums", C, "out[i][j] = 0.25f *", "out[i][j] =", "test_winograd.py -k values"),
    ("a chunk's weights alone", C, "t0 > 0);", "0);", "test_winograd.py -k values"),
    ("a ReLU's gradient passes", C, "if (p->gate) o[i] = gated(", "if (0) o[i] = gated(",
     "test_winograd.py -k values"),
    ("a second ReLU of the gradient", M + "convolution.py",
     "_Convolution.apply(ddx, w, None, ctx.how, gate)",
     "_Convolution.apply(ddx, w, None, ctx.how, None)",
     "test_winograd.py -k values"),
    ("any weight", M + "winograd.py", "t.is_cpu and ", "", "test_winograd.py"),
    ("negative ones are positive", M + "winograd.py", "real(t).contiguous", "t.contiguous",
     "test_winograd.py"),
    ("rows too many", M + "narrow.py", "height % ROWS == 0", "True", "test_winograd.py -k few"),
    ("moves in each pass", M + "spectral.py", "self.training and not self.by_hand", "self.training",
     "test_step.py -k spectral"),
    ("never moves", K + "task.py", "            move()\n", "            pass\n",
     "test_step.py -k spectral"),
    ("a batch norm sees both", K + "cyclegan.py", '.statistics == "batch" or',
     '.statistics == "" or',
     "test_step.py -k only_the_weights"),
    ("biases are trained", M + "cyclegan.py", "bias.requires_grad_(False)", "pass",
     "test_models.py -k biases"),
    ("two averages", K + "task.py", "average.data = trained.data", "pass",
     "test_step.py -k without_memory"),
    ("parts are summed", K + "task.py", "loss / self.parts", "loss", "test_grad_accum.py"),
    ("discriminators are trained with the generators", K + "task.py",
     "parameter.requires_grad_(not frozen)", "pass", "test_step.py -k only_the_weights"),
    ("a pad's corner is left out", "kernels/pad.py", "there = (i < total) & is_h & is_w",
     "there = (i < total) & is_h & is_w & ((row == 0) | (column == 0))", "test_pad.py"),
    ("nothing is refused", OPTIONS, "raise RequestError(refusal)", "pass",
     "test_options.py -k written"),
)
