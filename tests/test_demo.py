"""`python -m gannorm demo`: what its page shows, and the page itself in a browser (`-m slow`)."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from test_inference import CONDITIONAL, ROOT, TRANSLATION, levels, make_run, refused

from gannorm.commands.classes import image_of
from gannorm.commands.demo import (
    DIRECTIONS,
    checkpoints,
    class_pictures,
    opened,
    there_and_back,
)
from gannorm.errors import RequestError
from gannorm.training import checkpoint

NAMES = ["cat", "dog", "größer fisch"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder of each family."""
    root = tmp_path_factory.mktemp("runs")
    run = make_run(root / "classes", CONDITIONAL, 3)
    run.task.class_names = NAMES
    for name in ("step_00000001.pt", "step_00000020.pt", "best.pt"):
        checkpoint.save(root / "classes" / "checkpoints" / name, run.state_dict())
    make_run(root / "cycle", TRANSLATION, None)
    return {name: root / name for name in ("classes", "cycle")}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "flower.jpg"
    Image.fromarray(load_sample_image("flower.jpg")[:120:2, :150:2]).save(path)
    return path


# ---- what the page shows


def test_checkpoints_are_listed_newest_first(runs, tmp_path):
    found = checkpoints(runs["classes"])
    assert list(found) == ["step_00000020.pt", "step_00000001.pt", "best.pt"]
    assert list(checkpoints(found["best.pt"])) == ["best.pt"]
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RequestError, match=re.escape(str(tmp_path))):
        checkpoints(tmp_path)
    for name in ("step_00000003.pt", "../checkpoints/best.pt"):
        with pytest.raises(RequestError, match="is gone"):
            opened(runs["classes"], name)
    # Kept, and read anew when the file has changed.
    first = opened(runs["classes"], "best.pt")
    assert opened(runs["classes"], "best.pt") is first
    os.utime(found["best.pt"], ns=(1, 1))
    assert opened(runs["classes"], "best.pt") is not first


def test_pictures_of_classes(runs):
    task = opened(runs["classes"], "best.pt")
    one, grid, strip = class_pictures(task, "dog", "größer fisch", 0, 5, 3.0)
    expected = levels(image_of(task, 1, 5)[None])[0]
    assert one.size == (320, 320)
    assert np.abs(np.array(one, dtype=int)[::40, ::40] - expected).max() < 2
    assert grid.size == (404, 404) and strip.size == (804, 104)
    tiles = np.array(grid, dtype=int)
    sixth = levels(image_of(task, 1, 10)[None])[0]  # seeds row by row: 5 to 20
    assert np.abs(tiles[104:200:12, 104:200:12] - sixth).max() < 2
    last = np.array(strip, dtype=int)[4:100:12, 704:800:12]
    other = levels(image_of(task, 2, 5)[None])[0]
    assert np.abs(last - other).max() < 2
    (whole, *_), (half, *_), (typical, *_) = (
        class_pictures(task, "dog", "größer fisch", share, 5, truncation)
        for share, truncation in ((1, 3.0), (0.5, 3.0), (0, 0.5))
    )
    assert np.abs(np.array(whole, dtype=int)[::40, ::40] - other).max() < 2
    within = levels(image_of(task, 1, 5, 0.5)[None])[0]
    assert np.abs(np.array(typical, dtype=int)[::40, ::40] - within).max() < 2
    assert len({image.tobytes() for image in (one, half, whole, typical)}) == 4


@pytest.mark.parametrize("direction,first,second", [(0, "G_A", "G_B"), (1, "G_B", "G_A")])
def test_there_and_back(runs, photo, direction, first, second):
    """In its own size, and in the training's; with ever more of the work told."""
    task = opened(runs["cycle"], "step_00000001.pt")
    told = []
    pictures = there_and_back(
        task, photo, DIRECTIONS[direction], False, lambda share, what: told.append((share, what))
    )
    seen, made, again = (np.array(p, dtype=int) for p in pictures)
    x = torch.from_numpy(seen).permute(2, 0, 1)[None].float() / 127.5 - 1
    there = task.averaged[first](x)
    assert np.abs(made - levels(there)[0]).max() < 2
    assert np.abs(again - levels(task.averaged[second](there))[0]).max() < 2
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1) and len(shares) > 10
    assert len({what for _, what in told}) == 2
    native = there_and_back(task, photo, DIRECTIONS[direction], True, lambda *_: None)
    assert {p.size for p in native} == {(75, 60)} and seen.shape == (32, 32, 3)


def test_what_is_no_photograph_is_refused(runs, tmp_path):
    task = opened(runs["cycle"], "step_00000001.pt")
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("L", (4097, 1025)).save(tmp_path / "large.png")
    with pytest.raises(RequestError, match="broken.png"):
        there_and_back(task, tmp_path / "broken.png", DIRECTIONS[0], False, lambda *_: None)
    with pytest.raises(RequestError, match="4097 x 1025 .* choose 32 x 32"):
        there_and_back(task, tmp_path / "large.png", DIRECTIONS[0], True, lambda *_: None)


def test_without_gradio_there_is_no_page(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install -e ".[demo]"' in refused(capsys, "demo", runs["classes"])


def test_refusals(runs, tmp_path, capsys):
    pytest.importorskip("gradio", exc_type=ImportError)
    assert str(tmp_path / "gone") in refused(capsys, "demo", tmp_path / "gone")
    assert "--port 70000" in refused(capsys, "demo", runs["classes"], "--port", 70000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(capsys, "demo", runs["classes"], "--port", port)
    assert f"port {port}" in said and "--port" in said


# ---- in a browser

WAIT = 60_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", exc_type=ImportError)
    api = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
    found = [shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome")]
    with api.sync_playwright() as playwright:
        path = next(filter(None, found), playwright.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("no chromium on this machine: apt install chromium")
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """A page of the running command, and every address that it asked for."""

    def __init__(self, browser, run: Path, cwd: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(cwd / "temp")}
        environment |= {
            "PYTHONPATH": str(ROOT),
            "http_proxy": "http://127.0.0.1:9",
        }  # a closed door
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gannorm", "demo", run, "--port", "0"],
            cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        self.url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(self.url)

    def picture(self, element: str, old: str | None = None) -> str:
        """The address of the picture that `element` shows, once it is not `old`."""
        self.page.wait_for_function(
            """([id, old]) => {
                const shown = document.querySelector(`#${id} img`);
                return shown && shown.complete && shown.naturalWidth && shown.src !== old;
            }""",
            arg=[element, old], timeout=WAIT,
        )  # fmt: skip
        return self.page.locator(f"#{element} img").first.get_attribute("src")

    def end(self) -> None:
        self.page.close()
        self.process.send_signal(signal.SIGINT)  # Ctrl+C
        assert self.process.wait(30) == 0
        # Nothing of another server, be it a font, a script or a count of visits.
        outside = [u for u in self.asked if not u.startswith((self.url, "data:", "blob:"))]
        assert outside == [] and len(self.asked) > 10


@pytest.fixture
def visit(browser, tmp_path):
    visits = []

    def go(run: Path) -> Visit:
        visits.append(Visit(browser, run, tmp_path))
        return visits[-1]

    yield go
    for each in visits:
        each.end()


@pytest.mark.slow
def test_a_visitor_changes_class_and_seed(visit, runs, tmp_path):
    here = visit(runs["classes"])
    page = here.page
    shown = [here.picture("sample")]
    grid, strip = here.picture("grid"), here.picture("strip")
    page.get_by_label("class", exact=True).click()
    page.get_by_role("option", name="größer fisch").click()
    shown.append(here.picture("sample", shown[-1]))
    assert here.picture("grid", grid) and here.picture("strip", strip)
    page.get_by_label("number input for seed").fill("77")
    page.get_by_label("number input for seed").press("Enter")
    shown.append(here.picture("sample", shown[-1]))
    page.get_by_label("number input for truncation").fill("0.4")
    page.get_by_label("number input for truncation").press("Enter")
    shown.append(here.picture("sample", shown[-1]))
    page.get_by_label("number input for share of the second class").fill("0.5")
    page.get_by_label("second class", exact=True).click()
    page.get_by_role("option", name="dog").click()
    shown.append(here.picture("sample", shown[-1]))
    assert len(set(shown)) == 5
    page.get_by_label("checkpoint").click()
    assert page.get_by_role("option").all_inner_texts()[-1].strip().endswith("best.pt")
    page.keyboard.press("Escape")
    # The browser itself would load nothing of another server.
    blocked = page.evaluate(
        """() => new Promise(done => {
            addEventListener('securitypolicyviolation', e => done(e.blockedURI));
            fetch('http://127.0.0.2:9/').catch(() => setTimeout(() => done('nothing'), 5000));
        })"""
    )
    assert blocked == "http://127.0.0.2:9/"
    page.screenshot(path=tmp_path / "classes.png", full_page=True)


@pytest.mark.slow
def test_a_visitor_drops_a_photograph(visit, runs, photo, tmp_path):
    here = visit(runs["cycle"])
    page = here.page
    page.get_by_role("button", name="Translate").click()
    page.get_by_text("there is no photograph yet").wait_for(timeout=WAIT)
    page.set_input_files("#photo input[type=file]", photo)
    there, back = here.picture("there"), here.picture("back")
    here.picture("both")
    page.screenshot(path=tmp_path / "cycle.png", full_page=True)
    size = page.locator("#there img").evaluate("x => [x.naturalWidth, x.naturalHeight]")
    assert there != back and size == [75, 60]
    page.get_by_label("B → A").check()
    page.get_by_label("32 x 32").check()
    page.get_by_role("button", name="Translate").click()
    assert here.picture("there", there) and here.picture("back", back)
    size = page.locator("#there img").evaluate("x => [x.naturalWidth, x.naturalHeight]")
    assert size == [32, 32]
