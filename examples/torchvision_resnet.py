"""torchvision's ResNet-18 with our norms: the same network, the same outputs.

python examples/torchvision_resnet.py
"""

import copy

import torch
from torchvision.models import resnet18

from gannorm import BatchNorm2d, convert

TOLERANCE = 1e-4  # of the largest output, in float32

torch.manual_seed(0)
theirs = resnet18(num_classes=10)  # or weights="DEFAULT"
ours = convert(copy.deepcopy(theirs))  # in place: parameters, buffers and hooks stay
print(sum(isinstance(m, BatchNorm2d) for m in ours.modules()), "batch norms are ours")

images = torch.randn(4, 3, 64, 64)
labels = torch.tensor([0, 1, 2, 3])
worst = 0.0
for mode in ("training", "evaluation"):
    for model in (theirs, ours):
        model.train(mode == "training")
    a, b = theirs(images), ours(images)
    difference = ((a - b).abs().max() / a.abs().max()).item()
    print(f"{mode}: outputs differ by {difference:.1e} of the largest")
    worst = max(worst, difference)

# The gradients agree as well, and an optimizer takes ours as it took theirs.
for model in (theirs, ours):
    torch.nn.functional.cross_entropy(model(images), labels).backward()
a, b = theirs.conv1.weight.grad, ours.conv1.weight.grad
difference = ((a - b).abs().max() / a.abs().max()).item()
print(f"gradients of the first convolution differ by {difference:.1e} of the largest")
worst = max(worst, difference)

print(f"largest difference: {worst:.1e}")
if worst > TOLERANCE:
    raise SystemExit(f"more than {TOLERANCE}: something is wrong")
