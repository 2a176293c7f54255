"""Sample quality without a download: can a classifier trained on the real data read the samples?"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gannorm.data import Source, batches

STEPS, BATCH_SIZE, LEARNING_RATE = 250, 128, 2e-3


def train_classifier(
    source: Source, num_classes: int, device: torch.device, seed: int = 0
) -> nn.Module:
    """A small convolutional classifier of `source`'s images; some seconds on a CPU.

    The same source and seed give the same classifier; the global generators are left alone.
    Returns a module in evaluation mode: (N, C, S, S) -> logits (N, num_classes).
    """
    channels = source.fetch([0], torch.Generator())["image"].shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for c_in, c_out in ((channels, 32), (32, 64), (64, 96)):
            layers += [
                nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            ]
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3)]
        net = nn.Sequential(*layers, nn.Linear(96 * 16, num_classes)).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for (batch,) in batches([source], batch_size=BATCH_SIZE, start=0, stop=STEPS, seed=seed):
            images, labels = batch["image"].to(device), batch["label"].to(device)
            # Shifts of up to 1/8 keep it from reading by position.
            reach = images.shape[-1] // 8
            shift = torch.randint(-reach, reach + 1, (2,)).tolist()
            logits = net(images.roll(shift, (2, 3)))
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def read_accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images (N, C, S, S) that the classifier reads as their labels (N,)."""
    return float((in_chunks(classifier, images).argmax(1) == labels).float().mean())


@torch.no_grad()
def in_chunks(function: Callable[..., Tensor], *tensors: Tensor, size: int = 128) -> Tensor:
    """function(*tensors), `size` samples at a time."""
    chunks = zip(*(t.split(size) for t in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])
