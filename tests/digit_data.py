"""The embedded data sets, in a word, for tests."""

from gannorm.data import Data, build_data
from gannorm.schema import DigitsConfig


def digit_data(
    name: str = "digits",
    size: int = 32,
    channels: int = 1,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Data:
    return build_data(
        DigitsConfig(
            name=name, image_size=size, channels=channels, batch_size=batch_size,
            num_workers=num_workers,
        )
    )  # fmt: skip
