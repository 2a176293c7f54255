"""A CycleGAN generator on pictures of any size, in memory that does not grow with them.

The generator runs layer by layer, and each layer in strips over the whole width. A strip reads from
the layer before just the rows that its convolution looks at, with the generator's own padding at
the picture's borders: nothing overlaps by a guess, so there are no seams, and the result differs
from that of the whole picture by rounding alone. A norm of the sample gets the statistics of the
whole picture, added up strip by strip before it is applied.

What a layer gives is kept in an unnamed file; where it would be larger than what it is made from
(the first convolution and the upsampling ones), it is computed again instead.
"""

import errno
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, pad

from gannorm.errors import RequestError
from gannorm.models.cyclegan import ResnetBlock, ResnetGenerator
from gannorm.norms import functional as F
from gannorm.norms.base import NoNorm
from gannorm.norms.layers import BatchNorm2d, GroupNorm, InstanceNorm2d

Shape = tuple[int, int, int]  # channels, height, width


class Map(Protocol):
    """A feature map whose rows can be asked for."""

    shape: Shape

    def read(self, top: int, bottom: int) -> Tensor:
        """The rows from `top` to below `bottom`: (1, C, bottom - top, W) on the device."""


class Picture:
    """8-bit levels (C, H, W) as a generator reads them, the border repeated to `size`."""

    def __init__(self, image: Tensor, size: tuple[int, int], device: torch.device) -> None:
        self.image, self.device = image, device
        self.shape = (image.shape[0], *size)

    def read(self, top: int, bottom: int) -> Tensor:
        rows = torch.arange(top, bottom).clamp(max=self.image.shape[1] - 1)
        x = self.image[None, :, rows].to(self.device)
        x = x.float().div_(127.5).sub_(1)
        return pad(x, (0, self.shape[2] - x.shape[3], 0, 0), mode="replicate")


class Convolved:
    """A convolution of a map, with zeros or a reflection around it."""

    def __init__(self, source: Map, conv: nn.Conv2d) -> None:
        self.source, self.conv = source, conv
        padding: Any = conv.padding  # a number for each side; a name in other networks alone
        self.rows, self.columns = padding
        _, height, width = source.shape
        (self.kernel, kernel), (self.stride, stride) = conv.kernel_size, conv.stride
        self.shape = (
            conv.out_channels,
            (height + 2 * self.rows - self.kernel) // self.stride + 1,
            (width + 2 * self.columns - kernel) // stride + 1,
        )

    def read(self, top: int, bottom: int) -> Tensor:
        first = top * self.stride - self.rows
        end = (bottom - 1) * self.stride - self.rows + self.kernel
        if self.conv.padding_mode == "reflect":
            last = self.source.shape[1] - 1
            wanted = last - (last - torch.arange(first, end).abs()).abs()
            start = int(wanted.min())
            x = self.source.read(start, int(wanted.max()) + 1)
            if len(wanted) != x.shape[2] or first < 0:
                x = x[:, :, (wanted - start).to(x.device)]
            x = pad(x, (self.columns, self.columns, 0, 0), mode="reflect")
        else:
            above, below = max(-first, 0), max(end - self.source.shape[1], 0)
            x = self.source.read(first + above, end - below)
            x = pad(x, (self.columns, self.columns, above, below))
        return conv2d(x, self.conv.weight, self.conv.bias, self.conv.stride)


class Upsampled:
    """A transposed convolution of a map."""

    def __init__(self, source: Map, conv: nn.ConvTranspose2d) -> None:
        self.source, self.conv = source, conv
        self.padding: tuple[int, int] = (int(conv.padding[0]), int(conv.padding[1]))
        height, width = (
            (size - 1) * conv.stride[i] - 2 * self.padding[i] + conv.kernel_size[i]
            + conv.output_padding[i]
            for i, size in enumerate(source.shape[1:])
        )  # fmt: skip
        self.shape = (conv.out_channels, height, width)

    def read(self, top: int, bottom: int) -> Tensor:
        conv = self.conv
        stride, kernel, padding = conv.stride[0], conv.kernel_size[0], self.padding[0]
        # Row i of the source reaches the rows from i * stride - padding, `kernel` of them.
        first = max(-(-(top + padding - kernel + 1) // stride), 0)
        end = min((bottom - 1 + padding) // stride + 1, self.source.shape[1])
        x = self.source.read(first, end)
        columns = (0, self.padding[1])
        x = conv_transpose2d(x, conv.weight, conv.bias, conv.stride, columns, conv.output_padding)
        start = top + padding - first * stride
        return x[:, :, start : start + bottom - top]


class Normed:
    """A norm layer on a map, by given statistics of each channel or (None) as the layer is."""

    def __init__(
        self,
        source: Map,
        layer: Any,
        given: tuple[Tensor, Tensor] | None,
        residual: Map | None,
    ) -> None:
        self.source, self.layer, self.given, self.residual = source, layer, given, residual
        self.shape = source.shape

    def read(self, top: int, bottom: int) -> Tensor:
        x = self.source.read(top, bottom).contiguous()
        residual = None if self.residual is None else self.residual.read(top, bottom)
        layer = self.layer
        if self.given is None:
            return layer(x, residual=residual)
        return F.batch_norm(
            x, *self.given, layer.weight, layer.bias, False, 0.0, layer.eps,
            **layer.epilogue.kwargs(residual),
        )  # fmt: skip


class Tanh:
    def __init__(self, source: Map) -> None:
        self.source, self.shape = source, source.shape

    def read(self, top: int, bottom: int) -> Tensor:
        return self.source.read(top, bottom).tanh()


class Stored:
    """A map in a file without a name, which goes with this object. Row after row: (H, C, W)."""

    def __init__(self, shape: Shape, folder: Path, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.dtype = torch.float32
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def write(self, top: int, x: Tensor) -> None:
        """Rows (1, C, rows, W) from `top` on.

        Raises:
            RequestError: the disk is full.
        """
        self.dtype = x.dtype
        rows = x[0].transpose(0, 1).contiguous().cpu()
        try:
            self.file.seek(top * rows[0].numel() * rows.element_size())
            self.file.write(rows.view(torch.uint8).numpy().data.cast("B"))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise RequestError(
                "the disk of the output folder is full: in tiles a picture's feature maps are "
                "kept there; make room, translate at a smaller --size, or whole with --tile 0"
            ) from error

    def read(self, top: int, bottom: int) -> Tensor:
        channels, _, width = self.shape
        rows = torch.empty((bottom - top, channels, width), dtype=self.dtype)
        self.file.seek(top * channels * width * rows.element_size())
        into = rows.view(torch.uint8).numpy().data.cast("B")
        if self.file.readinto(into) != len(into):
            raise OSError("a feature map's file was cut short")
        return rows.to(self.device).transpose(0, 1).contiguous().unsqueeze(0)


class Moments:
    """Mean and biased variance of each channel of a map that comes in strips (Chan et al., 1979).

    Merged in float64; within a strip summed about the strip's own mean, so nothing cancels.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0  # summed squared deviations from the mean

    def add(self, x: Tensor) -> None:
        """A strip (1, C, rows, W)."""
        values = x[0].flatten(1).float()
        about = values.mean(1, keepdim=True)
        values = values - about
        count = values.shape[1]
        rest = values.sum(1, dtype=torch.float64) / count
        squares = values.square_().sum(1, dtype=torch.float64) - count * rest.square()
        apart = about[:, 0].double() + rest - self.mean
        total = self.count + count
        self.squares = self.squares + squares + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel's group of channels, both (C,) float32."""
        means = self.mean.view(groups, -1)
        mean = means.mean(1, keepdim=True)
        var = (self.squares.view(groups, -1) / self.count + (means - mean).square()).mean(1)
        mean, var = (t.view(groups, 1).expand_as(means).reshape(-1).float() for t in (mean, var))
        return mean, var


class Tiler:
    """Runs a generator in strips of at most `tile` x `tile` pixels.

    Args:
        folder: where the feature maps are kept. With 2 downsamplings they take up to 3 bytes for
            each pixel and channel of the first layer (12.9 GB at 8192 x 8192 and width 64).
        done: called as layers are done with.
    """

    def __init__(
        self, tile: int, folder: Path, device: torch.device, done: Callable[[], Any] = lambda: None
    ) -> None:
        self.tile, self.folder, self.device, self.done = tile, folder, device, done
        self.share = 0.0  # of a map's rows that are a strip

    def strips(
        self, net: ResnetGenerator, image: Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[int, Tensor]]:
        """The translation of an 8-bit picture (C, H, W), whose border is repeated up to `size`.

        Yields each strip's first row and the strip (C, rows, W) in [-1, 1], without the repeated
        border.

        Raises:
            RequestError: a layer that cannot run in strips, or a full disk.
        """
        self.share = self.tile**2 / (size[0] * size[1])
        result = self._through(net.model, Picture(image, size, self.device))
        _, height, width = image.shape
        for top, strip in self._sweep(result):
            if top < height:
                yield top, strip[0, :, : height - top, :width]
        self.done()

    def _through(self, modules: Iterable[nn.Module], x: Map) -> Map:
        for module in modules:
            if isinstance(module, nn.ConvTranspose2d):
                x = Upsampled(x, module)
            elif isinstance(module, nn.Conv2d):
                x = Convolved(x, module)
            elif isinstance(module, ResnetBlock):
                inner = self._through(module.conv_block[:-1], x)
                x = self._kept(self._norm(module.conv_block[-1], inner, x))
            elif isinstance(module, nn.Tanh):
                x = Tanh(x)
            elif not isinstance(module, nn.Identity | nn.Dropout):  # dropout: the net is evaluated
                x = self._norm(module, x, None)
        return x

    def _norm(self, layer: nn.Module, x: Map, residual: Map | None) -> Map:
        moments = Moments()
        groups = _groups(layer)
        assert isinstance(x, Convolved | Upsampled)
        if _values(x) <= _values(x.source):
            x = self._kept(x, moments if groups else None)
        elif groups:
            for _, strip in self._sweep(x):
                moments.add(strip)
        self.done()
        return Normed(x, layer, moments.of_groups(groups) if groups else None, residual)

    def _kept(self, x: Map, moments: Moments | None = None) -> Stored:
        kept = Stored(x.shape, self.folder, self.device)
        for top, strip in self._sweep(x):
            kept.write(top, strip)
            if moments is not None:
                moments.add(strip)
        return kept

    def _sweep(self, x: Map) -> Iterator[tuple[int, Tensor]]:
        height = x.shape[1]
        rows = min(max(int(height * self.share), 1), height)
        for top in range(0, height, rows):
            yield top, x.read(top, min(top + rows, height))


def _values(x: Map) -> int:
    channels, height, width = x.shape
    return channels * height * width


def _groups(layer: nn.Module) -> int:
    """Into how many groups a norm layer parts its channels for the sample's statistics; 0: none."""
    if isinstance(layer, InstanceNorm2d):
        return 0 if layer.track_running_stats else layer.num_features
    if isinstance(layer, GroupNorm):
        return layer.num_groups
    if isinstance(layer, BatchNorm2d | NoNorm):
        return 0
    raise RequestError(
        f"{type(layer).__name__}: this layer cannot run in tiles; translate the picture whole "
        "with --tile 0"
    )
