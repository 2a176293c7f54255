"""Each promise about wrong input, on ops and layers: error, argument, value and way out."""

import numpy as np
import pytest
import torch

import gannorm
from gannorm.norms import functional as G

X, LABELS = torch.randn(4, 6, 3, 3), torch.tensor([0, 1, 2, 1])
TABLE, ROW = torch.ones(3, 6), torch.ones(6)
META = X.to("meta")


def conditional(labels=LABELS, weight=TABLE, bias=TABLE, x=X):
    """The conditional norms, ops and layers; a table only reaches the ops."""
    return (
        lambda: G.conditional_instance_norm(x, labels, weight, bias),
        lambda: G.conditional_batch_norm(x, labels, None, None, weight, bias, True),
        *(
            (
                lambda: gannorm.ConditionalInstanceNorm2d(6, 3)(x, labels),
                lambda: gannorm.ConditionalBatchNorm2d(6, 3)(x, labels),
            )
            if weight is TABLE and bias is TABLE
            else ()
        ),
    )


def plain(x=X, **affine):
    return (
        lambda: G.instance_norm(x, **affine),
        lambda: G.batch_norm(x, None, None, training=True, **affine),
        lambda: G.group_norm(x, 2, **affine),
    )


def layers(x):
    return (
        lambda: gannorm.InstanceNorm2d(6)(x),
        lambda: gannorm.BatchNorm2d(6)(x),
        lambda: gannorm.GroupNorm(2, 6)(x),
        lambda: gannorm.LayerNorm2d(6)(x),
    )


def on_meta(x=X, **kwargs):
    kwargs["device"] = "meta"
    return (
        lambda: gannorm.InstanceNorm2d(6, affine=True, **kwargs)(x),
        lambda: gannorm.BatchNorm2d(6, **kwargs)(x),
        lambda: gannorm.GroupNorm(2, 6, **kwargs)(x),
        lambda: gannorm.ConditionalInstanceNorm2d(6, 3, **kwargs)(x, LABELS),
        lambda: gannorm.ConditionalBatchNorm2d(6, 3, **kwargs)(x, LABELS),
    )


ONE, PLANE = torch.ones(1, 6, 1, 1), torch.ones(2, 6, 1, 1)
REFUSED = {
    "one value per channel": (
        (
            plain(ONE)[1],
            conditional(LABELS[:1], x=ONE)[1],
            conditional(LABELS[:1], x=ONE)[3],
            layers(ONE)[1],
        ),
        ValueError,
        r'\(1, 6, 1, 1\), N\*H\*W = 1.*larger batch.*degenerate="beta"',
    ),
    "one value per plane": (
        (
            plain(PLANE)[0],
            layers(PLANE)[0],
            layers(PLANE[0])[0],
            conditional(LABELS[:2], x=PLANE)[0],
            conditional(LABELS[:2], x=PLANE)[2],
        ),
        ValueError,
        r"H\*W = 1.*larger image",
    ),
    "groups": ((lambda: G.group_norm(X, 4),), ValueError, "num_groups=4 .*6 channels.*1, 2, 3, 6"),
    "length of the weight": (plain(weight=ROW[:5]), ValueError, r"weight .*\(6,\).*got \(5,\)"),
    "shape of the bias": (plain(bias=TABLE), ValueError, r"bias .*\(6,\).*got \(3, 6\)"),
    "integer weight": (plain(weight=ROW.int()), TypeError, "weight .*int32.*float"),
    "list as bias": (plain(bias=[0.0] * 6), TypeError, "bias .*list.*Tensor"),
    "running statistics": (
        (
            lambda: G.batch_norm(X, ROW, ROW[:5]),
            lambda: G.instance_norm(X, ROW, ROW[:5]),
            lambda: G.conditional_batch_norm(X, LABELS, ROW, ROW[:5], TABLE, TABLE),
        ),
        ValueError,
        r"running_var .*\(6,\).*got \(5,\)",
    ),
    "channels of the table": (
        conditional(weight=TABLE[:, :5]),
        ValueError,
        r"weight .*\(num_classes, 6\).*got \(3, 5\)",
    ),
    "rows of the table": (conditional(bias=TABLE[:2]), ValueError, r"bias .*got \(2, 6\)"),
    "integer table": (conditional(weight=TABLE.long()), TypeError, "weight .*int64.*float"),
    "channels": (layers(X[:, :5]), ValueError, r"takes 6 channels.*\(4, 5, 3, 3\)"),
    "integer input": (
        (*plain(X.int()), *layers(X.int()), *conditional(x=X.int())),
        TypeError,
        r"input .*int32.*\.float\(\)",
    ),
    "array as input": (
        (*plain(np.ones((2, 3))), *layers(np.ones((4, 6, 3, 3)))),
        TypeError,
        "input .*ndarray.*torch.Tensor",
    ),
    "dtype of labels": (
        conditional(LABELS.int()),
        TypeError,
        r"labels .*int64.*int32.*\.long\(\)",
    ),
    "boolean labels": (conditional(LABELS > 0), TypeError, "labels .*int64.*torch.bool"),
    "list of labels": (
        conditional([0, 1, 2, 1]),
        TypeError,
        r"labels .*list.*torch\.tensor\(labels\)",
    ),
    "no labels": (conditional(None), TypeError, "labels .*NoneType"),
    "number of labels": (conditional(LABELS[:3]), ValueError, r"labels .*\(4,\).*\(3,\)"),
    "shape of labels": (conditional(LABELS[:, None]), ValueError, r"labels .*\(4, 1\)"),
    "negative label": (
        conditional(LABELS - 1),
        ValueError,
        r"labels .*0\.\.2 \(num_classes=3\), got -1\.\.1.*from 0",
    ),
    "label past the table": (
        conditional(LABELS + 1),
        ValueError,
        r"labels .*0\.\.2 \(num_classes=3\), got 1\.\.3.*row",
    ),
    "device of the weight": (
        plain(weight=ROW.to("meta")),
        ValueError,
        "weight is on meta, the input on cpu.*one device",
    ),
    "device of the running statistics": (
        (
            lambda: G.instance_norm(X, ROW.to("meta"), ROW.to("meta")),
            lambda: G.instance_norm(X, ROW.to("meta"), ROW.to("meta"), use_input_stats=False),
            lambda: gannorm.InstanceNorm2d(6, track_running_stats=True, device="meta")(X),
            lambda: G.batch_norm(X, ROW.to("meta"), ROW, training=True),
        ),
        ValueError,
        "running_mean is on meta, the input on cpu.*one device",
    ),
    "device of the labels": (
        conditional(LABELS.to("meta")),
        ValueError,
        "labels is on meta, the input on cpu.*one device",
    ),
    "device of the layer": (on_meta(), ValueError, "is on meta, the input on cpu.*one device"),
    "device of the input": (
        conditional(x=META),
        ValueError,
        "is on cpu, the input on meta.*one device",
    ),
}


@pytest.mark.parametrize(
    "call,error,words",
    [
        pytest.param(call, error, words, id=f"{name} {i}")
        for name, (calls, error, words) in REFUSED.items()
        for i, call in enumerate(calls)
    ],
)
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_compiled_layer_refuses_as_well():
    torch._dynamo.reset()
    norm = torch.compile(gannorm.InstanceNorm2d(6), backend="aot_eager")
    with pytest.raises(ValueError, match="takes 6 channels"):
        norm(X[:, :5])
