"""`python -m gannorm demo`: a page in the browser, to try a trained model by hand.

The page needs no network: no fonts, scripts or statistics of other servers.
"""

import argparse
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from gannorm.commands.classes import between_classes, pick_classes
from gannorm.commands.trained import load_task, pick_generator
from gannorm.commands.translation import any_size
from gannorm.data.images import open_image, to_image, to_tensor
from gannorm.errors import RequestError
from gannorm.tasks import ClassConditional, CycleGAN, Task
from gannorm.training import checkpoint
from gannorm.training.captions import sheet

Tell = Callable[[float, str], None]  # a share of the work, and what is done next

LARGE = 320  # pixels: smaller samples are enlarged by a whole factor
GRID = 4  # rows and columns of the grid of samples
STEPS = 8  # images from one class to another
NO_TRUNCATION = 3.0  # the slider's end
MOST_SEEDS = 9999
MOST_PIXELS = 2**22  # of a photograph in its own size
DIRECTIONS = ("A → B", "B → A")
NATIVE = "its own"
PICTURE: dict[str, Any] = {  # what all that show one have in common
    "type": "pil", "format": "png", "interactive": False, "elem_classes": "picture",
    "buttons": ["download", "fullscreen"],
}  # fmt: skip
EXAMPLE = "example: python -m gannorm demo outputs/RUN --port 7860"
# What the browser may load: this server's own files, and pictures that the page makes itself.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self' ws: data: blob:; frame-ancestors 'self'"
)
# Labels and buttons lie on the pictures otherwise, and small pictures stay small.
STYLE = """
.picture .image-container { padding-top: 34px; }
.picture .image-frame img { width: 100%; height: 100%; object-fit: contain; }
"""


def add(commands: Any) -> None:
    four = commands.add_parser("demo", help="try a model on a page in the browser", epilog=EXAMPLE)
    four.add_argument("checkpoint", type=Path, metavar="RUN", help="run folder or checkpoint")
    four.add_argument("--port", type=int, default=7860, help="0: any that is free (7860)")
    four.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: other machines reach it too (127.0.0.1)"
    )
    four.add_argument(
        "--share", action="store_true", help="a public address too, through gradio's servers"
    )
    four.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    demo(a.checkpoint, a.port, a.host, a.share)


def demo(path: Path, port: int = 7860, host: str = "127.0.0.1", share: bool = False) -> None:
    """Serve the page of a run folder or checkpoint file until interrupted.

    Raises:
        RequestError: no model there, no gradio, a port that is taken.
    """
    gr = _gradio()
    blocks = page(path)
    port = _check_port(host, port)
    for key in ("NO_PROXY", "no_proxy"):  # gradio asks its own server whether it is there
        others = [os.environ[key]] if os.environ.get(key) else []
        os.environ[key] = ",".join([*others, "127.0.0.1", "localhost", host])
    from starlette.middleware import Middleware

    middleware = [] if share else [Middleware(_OwnFilesAlone)]
    blocks.launch(
        server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True,
        ssr_mode=False, footer_links=[], app_kwargs={"middleware": middleware},
        theme=gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=STYLE,
    )  # fmt: skip
    shown = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    print(f"demo of {path}: {blocks.share_url or shown}  (Ctrl+C ends it)", flush=True)
    blocks.block_thread()


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise RequestError(
            'demo needs the package gradio, which is not installed: pip install -e ".[demo]"'
        ) from error
    return gradio


def _check_port(host: str, port: int) -> int:
    """The port, or a free one for 0."""
    if not 0 <= port < 2**16:
        raise RequestError(f"--port {port} must be 0 to {2**16 - 1}")
    try:
        with socket.socket() as each:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind((host, port))
            return int(each.getsockname()[1])
    except OSError as error:
        raise RequestError(
            f"cannot serve on {host}, port {port}: {error.strerror}; choose another with --port, "
            "0 for any that is free"
        ) from error


class _OwnFilesAlone:
    """ASGI middleware: tells the browser to load nothing from other servers."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, sending)


# ---- what the page shows


def checkpoints(path: Path) -> dict[str, Path]:
    """The checkpoints of a run folder by name, the newest first, best.pt last; or a file alone.
    Damaged ones are left out and named on stderr.

    Raises:
        RequestError: there are none.
    """
    if path.is_file():
        return {path.name: path}
    folder = path / "checkpoints"
    found = [*sorted(folder.glob("step_*.pt"), reverse=True), *folder.glob("best.pt")]
    files = [file for file in found if _whole(file, _changed(file))]
    if not files:
        raise RequestError(
            f"there is no checkpoint or run folder {path} with whole checkpoints/*.pt"
        )
    return {file.name: file for file in files}


def opened(path: Path, name: str) -> Task:
    """The task of checkpoint `name` of a run folder, kept for the next time.

    Raises:
        RequestError: no such checkpoint: a run deletes its older ones.
    """
    files = checkpoints(path)
    if name not in files:
        raise RequestError(f"{name} is gone: the run keeps its newest alone; load the page again")
    return _load(files[name], files[name].stat().st_mtime_ns)


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:  # the run has deleted it since
        return 0


@lru_cache(maxsize=99)
def _whole(file: Path, changed: int) -> bool:
    return checkpoint.is_whole(file)


@lru_cache(maxsize=2)
def _load(file: Path, changed: int) -> Task:
    return load_task(file)


def class_pictures(
    task: ClassConditional, first: str, second: str, share: float, seed: int, truncation: float
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """A sample; GRID x GRID samples of the seeds from this one on; a strip from class to class.

    The sample and the grid are of the mixture with `share` of the second class.
    """
    pair = pick_classes(task.class_names, [first])[0], pick_classes(task.class_names, [second])[0]
    within = truncation if truncation < NO_TRUNCATION else None
    seeds = range(int(seed), int(seed) + GRID**2)
    samples = between_classes(task, pair, seeds, [share], within)
    strip = between_classes(task, pair, seeds[:1], torch.linspace(0, 1, STEPS).tolist(), within)
    grid, between = (to_image(sheet(x, n)) for x, n in ((samples, GRID), (strip, STEPS)))
    return _large(to_image(samples[0])), grid, between


def _large(image: Image.Image) -> Image.Image:
    factor = max(1, LARGE // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


@torch.no_grad()
def there_and_back(
    task: CycleGAN, photo: Path, direction: str, native: bool, tell: Tell
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """A photograph as the model sees it, its translation, and that one translated back.

    native: in its own size, else resized to that of the training.

    Raises:
        RequestError: no image, or one that is too large for its own size.
    """
    ways = [("G_A", "A to B"), ("G_B", "B to A")]
    if direction == DIRECTIONS[1]:
        ways.reverse()
    height, width = task.cfg.data.size
    image = open_image(photo, task.cfg.data.channel_pair[DIRECTIONS.index(direction)])
    if not native:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    elif image.width * image.height > MOST_PIXELS:
        raise RequestError(
            f"the photograph has {image.width} x {image.height} pixels, and in its own size at "
            f"most {MOST_PIXELS:,} are translated here; choose {width} x {height}"
        )
    shown, x = [image], to_tensor(image)
    for half, (name, what) in enumerate(ways):

        def told(share: float, half: int = half, what: str = what) -> None:
            tell((half + share) / 2, what)

        net = task.averaged[name]
        with task.norm_backend(), _telling(net, told):
            x = any_size(net, x[None].to(task.device), 2**task.model.downsamplings)[0]
        shown.append(to_image(x))
    return shown[0], shown[1], shown[2]


@contextmanager
def _telling(net: nn.Module, tell: Callable[[float], None]) -> Iterator[None]:
    """Tells, while `net` runs, which share of its convolutions is done."""
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    done: list[nn.Module] = []

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        done.append(layer)
        tell(len(done) / len(layers))

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        tell(0.0)
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- the page


def page(path: Path) -> Any:
    """The page of a run folder or checkpoint file, as gradio's Blocks.

    Raises:
        RequestError: no model there, or one that has no page.
    """
    gr = _gradio()
    name = next(iter(checkpoints(path)))
    task = opened(path, name)
    with gr.Blocks(
        title=f"gannorm: {path.resolve().name}", analytics_enabled=False, delete_cache=(600, 3600)
    ) as blocks:
        gr.Markdown(f"## {path.resolve().name}\n{_described(task)}")
        if isinstance(task, ClassConditional):
            _class_page(gr, blocks, path, task)
        elif isinstance(task, CycleGAN):
            for generator in ("G_A", "G_B"):
                pick_generator(task, generator, path)
            _translation_page(gr, blocks, path, task)
        else:
            raise RequestError(
                f"{path} holds a {task.cfg.model.name}; demo has pages for resblock_gan and "
                "cyclegan"
            )
    return blocks


def _described(task: Task) -> str:
    height, width = task.cfg.data.size
    return (
        f"{task.cfg.model.name}, norm {task.cfg.norm.name}, trained on {task.cfg.data.name} at "
        f"{width} x {height}; on the {'GPU' if task.device.type == 'cuda' else 'CPU'}"
    )


def _choose(gr: Any, blocks: Any, path: Path) -> Any:
    """The choice of the checkpoint; what is new is in it when the page is loaded again."""
    names = list(checkpoints(path))
    choice = gr.Dropdown(names, value=names[0], label="checkpoint")

    def renewed(chosen: str) -> Any:
        found = list(checkpoints(path))
        return gr.Dropdown(found, value=chosen if chosen in found else found[0])

    blocks.load(renewed, choice, choice)
    return choice


def _answering(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its refusals shown on the page."""

    def answered(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RequestError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return answered


def _class_page(gr: Any, blocks: Any, path: Path, task: ClassConditional) -> None:
    names = task.class_names
    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            first = gr.Dropdown(names, value=names[0], label="class")
            seed = gr.Slider(0, MOST_SEEDS, value=0, step=1, label="seed")
            truncation = gr.Slider(
                0.1, NO_TRUNCATION, value=NO_TRUNCATION, step=0.1, label="truncation",
                info=f"less is more typical and less varied; {NO_TRUNCATION:.0f} is off",
            )  # fmt: skip
            second = gr.Dropdown(names, value=names[-1], label="second class")
            share = gr.Slider(0, 1, value=0, step=0.05, label="share of the second class")
            choice = _choose(gr, blocks, path)
        with gr.Column(scale=5):
            with gr.Row():
                one = gr.Image(label="sample", height=420, elem_id="sample", **PICTURE)
                grid = gr.Image(
                    label="this seed and the next", height=420, elem_id="grid", **PICTURE
                )
            strip = gr.Image(label="from the class to the second class", elem_id="strip", **PICTURE)

    def show(name: str, *settings: Any) -> tuple[Image.Image, ...]:
        chosen = opened(path, name)
        assert isinstance(chosen, ClassConditional)
        return class_pictures(chosen, *settings)

    controls = [choice, first, second, share, seed, truncation]
    gr.on(
        [blocks.load, *(each.change for each in controls)],
        _answering(gr, show), controls, [one, grid, strip], trigger_mode="always_last",
        concurrency_limit=1, show_progress="hidden", api_name="sample",
    )  # fmt: skip


def _translation_page(gr: Any, blocks: Any, path: Path, task: CycleGAN) -> None:
    height, width = task.cfg.data.size
    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            photo = gr.Image(
                type="filepath", image_mode=None, sources=["upload", "clipboard"], height=280,
                label="photograph", elem_id="photo",
            )  # fmt: skip
            direction = gr.Radio(DIRECTIONS, value=DIRECTIONS[0], label="direction")
            size = gr.Radio([NATIVE, f"{width} x {height}"], value=NATIVE, label="size")
            button = gr.Button("Translate", variant="primary")
            choice = _choose(gr, blocks, path)
        with gr.Column(scale=5):
            with gr.Row():
                there = gr.Image(label="translated", height=340, elem_id="there", **PICTURE)
                back = gr.Image(label="and back again", height=340, elem_id="back", **PICTURE)
            both = gr.ImageSlider(label="before and after", elem_id="both", **PICTURE)

    def show(
        name: str, photo: str | None, direction: str, size: str, progress: Tell
    ) -> tuple[Any, ...]:
        if photo is None:
            raise RequestError("there is no photograph yet: drop one on the field at the left")
        chosen = opened(path, name)
        assert isinstance(chosen, CycleGAN)
        seen, made, again = there_and_back(chosen, Path(photo), direction, size == NATIVE, progress)
        return made, again, (seen, made)

    def shown(
        name: str,
        photo: str | None,
        direction: str,
        size: str,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        def tell(share: float, what: str) -> None:
            progress(share, desc=what)

        return _answering(gr, show)(name, photo, direction, size, tell)

    gr.on(
        [button.click, photo.upload], shown, [choice, photo, direction, size],
        [there, back, both], concurrency_limit=1, api_name="translate",
    )  # fmt: skip
