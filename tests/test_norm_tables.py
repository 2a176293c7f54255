"""The two tables of docs/norms.md that tests made: differences from torch, and torch's tools."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# case, torch, here, why
DIFFERENCES = {
    "errors": (
        "a wrong shape or number of groups", "RuntimeError", "ValueError",
        "it is the value that is wrong, and torch's layers raise ValueError too",
    ),
    "one dimension": (
        "`batch_norm` of an input of shape (0,)", "an empty output", "ValueError",
        "there is no dimension for channels; torch takes the empty one alone",
    ),
    "no values": (
        "`group_norm` of an input without channels or without pixels", "RuntimeError",
        "an empty output", "as torch's other norms, and as without samples",
    ),
    "empty batch": (
        "`num_batches_tracked` after an empty batch in training", "counts it", "does not",
        "it moves no statistics, and would weigh in the plain average (`momentum=None`)",
    ),
    "channels": (
        "a layer without parameters, an input with another number of channels",
        "a warning, or nothing", "ValueError", "the model is not the one that was meant",
    ),
    "not finite": (
        "a channel whose batch has a NaN or an infinity, in training",
        "running statistics become NaN", "they stay",
        "one bad batch would spoil evaluation for good",
    ),
    "autocast": (
        "`GroupNorm` and `layer_norm` of half precision under autocast on a GPU", "float32",
        "the input's dtype", "the statistics are float32 either way, and half the bytes are moved",
    ),
    "one value": (
        "`GroupNorm`, one value in a group", "ValueError", "exactly the bias",
        "a 1x1 image is no error in a norm of a sample's groups",
    ),
    "recomputed": (
        "running statistics under activation checkpointing", "move twice", "move once",
        "the second pass is of the same batch",
    ),
}  # fmt: skip


# What stands in docs/norms.md: the tool, what it does with a norm, the tests that show it.
TOOLS = {
    "`torch.compile`": (
        "works without a graph break; once differentiable, as all compiled code",
        "test_ops.test_compiled_equals_eager",
    ),
    "torch.export, strict or not, saved and loaded": (
        "works: torch's operators, values, gradients, running statistics; any batch and size",
        "test_export.test_torch_export",
    ),
    "AOTInductor": ("works", "test_export.test_aot_inductor"),
    "ONNX, `dynamo=True` and the older exporter": (
        "works: a norm is one operator; in ONNX Runtime equal to 1e-5, any batch and size",
        "test_export.test_onnx",
    ),
    "`torch.jit.trace`": ("works", "test_tools.test_jit"),
    "`torch.jit.script`": ("refuses, and names what works", "test_tools.test_jit"),
    "torch.fx `symbolic_trace`, torchvision's `create_feature_extractor`": (
        "works: a norm is a leaf, its checks look at what flows through",
        "test_tools.test_symbolic_trace", "test_tools.test_features_of_a_converted_model",
    ),
    "FX graph mode quantization": (
        "works: the convolutions become int8, the norm stays float",
        "test_tools.test_fx_quantization",
    ),
    "make_fx, of gradients too": ("works: torch's operators", "test_tools.test_make_fx"),
    "fake and meta tensors, `FlopCounterMode`": (
        "works", "test_tools.test_flop_counters_and_fake_tensors",
    ),
    "torch.func, forward-mode AD, `is_grads_batched`": (
        "works", "test_ops.test_torch_func_and_forward_mode",
        "test_ops.test_gradients_of_many_outputs_at_once",
    ),
    "tensor subclasses": (
        "work: torch's operators; the class comes out again",
        "test_tools.test_tensor_subclasses_go_in_and_come_out",
    ),
    "activation checkpointing, reentrant or not": (
        "works; running statistics move once (torch's twice)",
        "test_tools.test_activation_checkpointing_counts_a_batch_once",
    ),
    "selective checkpointing": (
        "works in evaluation (in training torch refuses what is moved in place)",
        "test_tools.test_selective_checkpointing",
    ),
    "`swa_utils.update_bn`, `AveragedModel`": (
        "work, conditional batch norm included", "test_tools.test_update_bn",
    ),
    "`isinstance(m, _BatchNorm)`": (
        "finds every batch norm, conditional ones included",
        "test_tools.test_freezing_by_the_class",
    ),
    "`convert_sync_batchnorm`, `fuse_conv_bn_eval`, `fuse_linear_bn_eval`": (
        "work; refuse what torch's norm cannot do (an activation inside, a table of classes), and "
        "name `convert_sync`",
        "test_tools.test_what_makes_a_batch_norm_anew",
        "test_tools.test_folding_into_a_linear_layer",
        "test_tools.test_what_would_lose_something_is_refused", "test_sync.test_convert_sync",
    ),
    "DistributedDataParallel over norms of `convert_sync`": (
        "works: several forward passes, uneven and empty batches, gradient penalties",
        "sync_checks.under_ddp", "sync_checks.gradient_penalty",
    ),
    "`to_mkldnn`, sparse tensors": (
        "a batch norm becomes oneDNN's, or refuses as above; the others refuse the layout by name",
        "test_tools.test_mkldnn", "test_tools.test_sparse_inputs_are_refused",
    ),
    "weight_norm, pruning, parametrizations": (
        "work; a parametrized norm is not converted",
        "test_convert.test_weights_made_by_hooks_and_parametrizations",
    ),
    "pickle, `copy.deepcopy`, `torch.save` of a converted model": (
        "work", "test_convert.test_resnets", "test_convert.test_a_fused_norm_keeps_mode_and_flags",
    ),
    "weights of torch before 0.4": (
        "load: without `num_batches_tracked`, or with statistics that an instance norm drops",
        "test_tools.test_weights_older_than_the_count_of_batches",
        "test_tools.test_instance_norms_drop_the_statistics_of_old_files",
    ),
}  # fmt: skip


def rows(heading: str) -> list[str]:
    text = (ROOT / "docs" / "norms.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][2:]


def source(name: str) -> str:
    return (ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8")


def test_the_differences_from_torch():
    assert rows("Differences from torch") == [f"| {' | '.join(r)} |" for r in DIFFERENCES.values()]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_has_its_test(name):
    assert f'"{name}"' in source("test_torch_samples") + source("test_tools")


def test_the_tools():
    assert rows("With torch's tools") == [
        f"| {tool} | {what} |" for tool, (what, *_) in TOOLS.items()
    ]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_has_its_tests(tool):
    for test in TOOLS[tool][1:]:
        file, name = test.split(".")
        assert f"def {name}(" in source(file), test
