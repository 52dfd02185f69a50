"""The page as a person meets it: served by the command, used through Gradio's client and in a real Chromium.

One server, and one browser, for all tests of this file. The tests of the browser are skipped where there is none.
"""

import gc
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from hf_clip.app.page_layout import NO_IMAGES_YET, build_page
from hf_clip.app.page_model import PageModel

from ..search.conftest import make_image
from ..waiting import LONGEST_WAIT
from .conftest import LABELS
from .served_page import served

SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SWITCHES += ["--disable-component-update", "--disable-sync"]
pytestmark = [
    # Gradio's own calls of pandas, for figures of its queue.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
    # Gradio makes event loops in threads that have none, and leaves them open.
    pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket.socket fd=.*, family=1, type=1:ResourceWarning"),
]
WRITTEN = "<b>1</b> ${2} {{3}}"
"""A label that is shown as it is written."""
PHONE = {"width": 390, "height": 844}
MILLISECONDS = 1000 * LONGEST_WAIT

LEAST_CONTRAST = """selector => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const linear = part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = numbers(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return Math.min(...[...document.querySelectorAll(selector)].filter(node => node.offsetParent).map(node => {
    const found = [light(numbers(getComputedStyle(node).color)), light(ground(node))];
    return (Math.max(...found) + 0.05) / (Math.min(...found) + 0.05);
  }));
}"""
"""Of letters with what is behind them, as WCAG 2 has it; 4.5 is needed."""


@pytest.fixture(scope="module")
def address(digits: Path, page_files: Path) -> Iterator[str]:
    with served(str(digits / "vit"), "--index", str(page_files / "index")) as found:
        yield found
    gc.collect()  # what Gradio left open is collected here, where its warnings are expected


@pytest.fixture(scope="module")
def web(address: str) -> Iterator[httpx.Client]:
    """What asks the page's server, which closes a connection that is silent for some seconds."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=address, timeout=LONGEST_WAIT, limits=limits) as found:
        yield found


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upload") / "my image.png"
    make_image(3, (240, 160)).save(path)
    return path


@pytest.fixture(scope="module")
def client(address: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(
        address,
        verbose=False,
        analytics_enabled=False,
        download_files=tmp_path_factory.mktemp("downloads"),
        httpx_kwargs={"timeout": LONGEST_WAIT},
    )


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", str(Path(__file__).resolve())])
def test_no_file_of_the_machine_is_served(web: httpx.Client, address: str, path: str):
    for route in ("gradio_api/file=", "file=", "static/", "assets/", "gradio_api/file/"):
        answer = web.get(f"{address}{route}{path}", follow_redirects=True)
        assert answer.status_code in (403, 404), route
        assert "root:" not in answer.text


@pytest.mark.parametrize("name", ["photo-0.png", "/etc/passwd"])
def test_file_of_the_machine_is_no_upload(web: httpx.Client, page_files: Path, name: str):
    """A request may name any path as its upload. Gradio takes only what was uploaded."""
    file = {"path": str(page_files / "photos" / name), "meta": {"_type": "gradio.FileData"}}
    answer = web.post("gradio_api/call/classify", json={"data": [[file], LABELS[0], "{}", "", True, 0.0]})
    ended = web.get(f"gradio_api/call/classify/{answer.json()['event_id']}").text
    assert "event: error" in ended
    assert "card" not in ended


def test_page_that_is_mounted_by_a_program_takes_no_file_of_the_machine(page: PageModel, page_files: Path):
    from fastapi import FastAPI
    from gradio import mount_gradio_app
    from starlette.testclient import TestClient

    with ThreadPoolExecutor(1) as aside:  # Gradio gives the thread an event loop, and leaves it there
        app = aside.submit(lambda: mount_gradio_app(FastAPI(), build_page(page), path="/clip", ssr_mode=False)).result()
    file: Any = {"path": str(page_files / "photos" / "photo-0.png"), "meta": {"_type": "gradio.FileData"}}
    with TestClient(app) as client:
        asked = {"data": [[file], LABELS[0], "{}", "", True, 0.0]}
        answer = client.post("/clip/gradio_api/call/classify", json=asked)
        ended = client.get(f"/clip/gradio_api/call/classify/{answer.json()['event_id']}").text
    assert "event: error" in ended
    assert "card" not in ended


def test_upload_that_is_too_large(web: httpx.Client):
    content = b"\0" * (26 << 20)
    answer = web.post("gradio_api/upload", files={"files": ("large.png", content)})
    assert answer.status_code == 413


def test_foreign_names_of_this_machine_are_refused(web: httpx.Client):
    answer = web.get("", headers={"Host": "photos.example"})
    assert answer.status_code == 400
    assert web.get("").headers["content-security-policy"].startswith("default-src 'self'")


def test_nothing_is_told_to_others(web: httpx.Client):
    config = web.get("config").json()
    assert not config["analytics_enabled"]
    assert "fonts.googleapis" not in web.get("theme.css").text


def test_program_classifies_searches_and_looks(client: Any, upload: Path):
    from gradio_client import handle_file

    html = client.predict([handle_file(upload)], "\n".join(LABELS), "{}", "", True, 0.5, api_name="/classify")
    assert "my image.png" in html
    assert html.count('class="bar') == 4  # two labels, none of these, and the list itself
    html = client.predict("a red one", None, "", 3, 0, api_name="/search")[0]
    assert "3 images for a red one" in html
    html = client.predict(handle_file(upload), "a red one", "as trained", api_name="/look")
    assert html.count("<figure>") == 3


@pytest.mark.parametrize(
    ("task", "given", "said"),
    [
        ("/classify", (None, "cat", "{}", "", True, 0.0), "There is no image: drop one, or choose a file."),
        ("/search", ("", None, "", 3, 0), "There is nothing to look for: write a text"),
        ("/look", (None, "cat", "as trained"), "There is no image: drop one, or choose a file."),
    ],
)
def test_problem_is_a_line_in_the_page(client: Any, task: str, given: tuple[Any, ...], said: str):
    answer = client.predict(*given, api_name=task)
    html = answer if isinstance(answer, str) else answer[0]
    assert html.startswith(f'<p class="problem" role="alert">{said}')


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `test` brings it")
    with playwright.sync_playwright() as drivers:
        opened = drivers.chromium.launch(executable_path=found, args=SWITCHES, timeout=MILLISECONDS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def tab(browser: Any, address: str) -> Iterator[Any]:
    """One tab, in which the tests follow one another; `tab.foreign` has what it asked of other servers."""
    opened = browser.new_page(viewport={"width": 1280, "height": 860})
    opened.set_default_timeout(MILLISECONDS)
    opened.foreign, opened.problems = [], []
    opened.on("request", lambda request: opened.foreign.append(request.url) if is_foreign(request.url) else None)
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))

    def is_foreign(url: str) -> bool:
        return not url.startswith((address, "data:", "blob:"))

    opened.goto(address)
    opened.get_by_text(NO_IMAGES_YET).wait_for()
    yield opened
    opened.close()


def choose_tab(tab: Any, name: str) -> None:
    tab.get_by_role("tab", name=name).click()


def send(tab: Any, where: str, path: Path) -> None:
    """Choose a file, and wait until the server has it."""
    tab.set_input_files(f"#{where} input[type=file]", path)
    tab.locator(f"#{where} a[download='{path.name}']").wait_for()


def test_uploaded_image_is_classified(tab: Any, upload: Path):
    send(tab, "classify-images", upload)
    tab.get_by_label("Labels").fill("\n".join([*LABELS, WRITTEN]))
    tab.get_by_role("button", name="Classify").click()
    tab.locator("#labelled").get_by_role("heading", name="my image.png").wait_for()
    said = tab.locator("#labelled .bar .label").all_inner_texts()
    assert sorted(said) == sorted([*LABELS, WRITTEN, "none of these"])
    scores = [float(score) for score in tab.locator("#labelled .bar .score").all_inner_texts()]
    assert sum(scores) == pytest.approx(1, abs=0.01)
    assert scores == sorted(scores, reverse=True)
    tab.locator("#threshold input[type=number]").fill("1")
    tab.wait_for_function("document.querySelectorAll('#labelled .bar.below').length === 4")


def test_search_then_more_like_one(tab: Any):
    choose_tab(tab, "Search")
    tab.get_by_label("Text", exact=True).fill("a red one")
    tab.get_by_role("button", name="Search").click()
    tab.locator("#results button[data-place]").first.wait_for()
    assert tab.locator("#results button[data-place]").count() == 6
    assert tab.locator("#results .copies").all_inner_texts() == ["+1"]
    third = tab.locator("#results button[data-place='2']")
    name = third.locator(".name").inner_text()
    third.click()
    tab.locator("#details .chosen").wait_for()
    assert name in tab.locator("#details").inner_text()
    assert "240 × 160" in tab.locator("#details").inner_text() or "120 × 80" in tab.locator("#details").inner_text()
    tab.get_by_role("button", name="More like this").click()
    tab.get_by_text(f"6 images for more like {name}").wait_for()
    assert tab.locator("#results button[data-place='0'] .name").inner_text() == name
    tab.locator("#selected").wait_for(state="hidden")
    tab.locator("#cutoff input[type=number]").fill("100")
    tab.get_by_text("5 hidden").wait_for()
    assert tab.locator("#results li:visible").count() == 1
    tab.locator("#cutoff input[type=number]").fill("0")


def test_image_is_searched_for(tab: Any, upload: Path):
    tab.get_by_label("Text", exact=True).fill("")
    send(tab, "query-image", upload)
    tab.get_by_role("button", name="Search").click()
    tab.get_by_text("images for my image.png").wait_for()
    assert tab.locator("#results button[data-place='0'] .name").inner_text() == "photo-3.png"


def test_keyboard_alone(tab: Any):
    """From the tabs to a result, to more like it, without a mouse."""
    tab.get_by_role("tab", name="Classify").focus()
    tab.keyboard.press("Tab")
    for _ in range(3):
        if tab.evaluate("document.activeElement.innerText") == "Search":
            break
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    box = tab.get_by_label("Text", exact=True)
    box.wait_for()
    for _ in range(8):
        if box.evaluate("box => box === document.activeElement"):
            break
        tab.keyboard.press("Tab")
    tab.keyboard.type("a blue two")
    tab.keyboard.press("Enter")
    tab.get_by_text("images for a blue two + my image.png").wait_for()
    for _ in range(30):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.dataset.place") == "0":
            break
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.activeElement.id === 'more-like'")
    tab.keyboard.press("Enter")
    tab.get_by_text("6 images for more like").wait_for()


def test_text_is_looked_for_inside(tab: Any, upload: Path):
    choose_tab(tab, "Look inside")
    send(tab, "look-image", upload)
    tab.get_by_label("What to look for").fill("a red one\na blue two")
    tab.get_by_role("button", name="Look", exact=True).click()
    tab.locator("#maps figure").nth(3).wait_for()
    captions = tab.locator("#maps figcaption").all_inner_texts()
    assert [caption.split("\n")[0] for caption in captions][1:3] == ["a red one", "a blue two"]


def test_problem_is_shown_as_a_line(tab: Any):
    tab.get_by_label("What to look for").fill("\n".join(map(str, range(7))))
    tab.get_by_role("button", name="Look", exact=True).click()
    tab.get_by_role("alert").get_by_text("There are 7 texts, and the page shows 6 maps: give fewer.").wait_for()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """Opens the page for one more visitor."""
    contexts = []

    def new_visitor(query: str = "") -> Any:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 860}))
        contexts[-1].set_default_timeout(MILLISECONDS)
        opened = contexts[-1].new_page()
        opened.goto(f"{address}{query}")
        opened.get_by_text(NO_IMAGES_YET).wait_for()
        return opened

    yield new_visitor
    for context in contexts:
        context.close()


def search_for(tab: Any, text: str) -> None:
    choose_tab(tab, "Search")
    tab.get_by_label("Text", exact=True).fill(text)
    tab.get_by_role("button", name="Search").click()


def test_visitors_at_the_same_time_have_results_of_their_own(visit: Any):
    asked = {"a red one": visit(), "a blue two": visit()}
    for text, visitor in asked.items():
        search_for(visitor, text)
    names = {}
    for text, visitor in asked.items():
        visitor.get_by_text(f"6 images for {text}").wait_for()
        hit = visitor.locator("#results button[data-place='1']")
        names[text] = hit.locator(".name").inner_text()
        hit.click()
    for text, visitor in asked.items():
        visitor.locator("#details .chosen").wait_for()
        assert names[text] in visitor.locator("#details").inner_text()
        visitor.get_by_role("button", name="More like this").click()
        visitor.get_by_text(f"6 images for more like {names[text]}").wait_for()


def wait_for_contrast(visitor: Any, selector: str) -> None:
    """Of letters that may still change their colour."""
    visitor.wait_for_function(f"selector => ({LEAST_CONTRAST})(selector) >= 4.5", arg=selector)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_letters_can_be_read(visit: Any, theme: str):
    visitor = visit(f"?__theme={theme}")
    visitor.wait_for_function(f"document.body.classList.contains('dark') === {str(theme == 'dark').lower()}")
    wait_for_contrast(visitor, "p.hint, label span, #classify, [data-testid='block-info'] + div")
    search_for(visitor, "a red one")
    visitor.get_by_text("6 images for a red one").wait_for()
    wait_for_contrast(visitor, "#results .name, #results .score, #results .copies, #search")
    visitor.locator("#results button[data-place='0']").click()
    visitor.locator("#details .chosen").wait_for()
    wait_for_contrast(visitor, "#details dt, #details dd, #more-like")


def test_names_of_files_are_no_tags_and_damaged_ones_are_told(visit: Any, upload: Path, tmp_path: Path):
    visitor = visit()
    evil = shutil.copy(upload, tmp_path / "<img src=x onerror=window.evil=1>.png")
    (tmp_path / "no image.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    files = [evil, tmp_path / "no image.png", tmp_path / "empty.png"]
    visitor.set_input_files("#classify-images input[type=file]", files)
    visitor.locator("#classify-images a[download='empty.png']").wait_for()
    visitor.get_by_label("Labels").fill(LABELS[0])
    visitor.get_by_role("button", name="Classify").click()
    visitor.locator("#labelled .card").nth(2).wait_for()
    assert "onerror" in visitor.locator("#labelled h3").first.inner_text()
    assert visitor.locator("#labelled h3").all_inner_texts()[1:] == ["no image.png", "empty.png"]
    assert visitor.locator("#labelled .problem").all_inner_texts() == [
        "no image.png cannot be opened: it is damaged, or no image. Choose another.",
        "empty.png cannot be opened: it is damaged, or no image. Choose another.",
    ]
    assert visitor.evaluate("window.evil") is None


def test_index_that_goes_and_comes_back_while_the_page_is_open(visit: Any, page_files: Path):
    visitor = visit()
    search_for(visitor, "a red one")
    visitor.get_by_text("6 images for a red one").wait_for()
    index = page_files / "index"
    index.rename(page_files / "elsewhere")
    try:
        visitor.get_by_role("button", name="Search").click()
        visitor.get_by_role("alert").get_by_text(f"There is no index at {index}").wait_for()
        visitor.reload()
        visitor.get_by_role("heading", name="vit", exact=True).wait_for()
    finally:
        (page_files / "elsewhere").rename(index)
    visitor.reload()
    visitor.get_by_role("heading", name="vit · 7 images").wait_for()
    search_for(visitor, "a red one")
    visitor.get_by_text("6 images for a red one").wait_for()


def test_phone_scrolls_one_way_alone(tab: Any):
    tab.set_viewport_size(PHONE)
    for name in ("Classify", "Search", "Look inside"):
        choose_tab(tab, name)
        tab.get_by_role("tab", name=name, selected=True).wait_for()
        tab.wait_for_function(f"document.documentElement.scrollWidth <= {PHONE['width']}")  # once it is laid out


def test_no_other_server_is_asked(tab: Any):
    """The last test of the tab: what it loaded, it loaded of the page."""
    assert tab.foreign == []
    assert tab.problems == []


def test_controls_have_names(tab: Any):
    unnamed = tab.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select, button')].filter(each => {
             if (!each.offsetParent || each.type === 'file') return false;
             return !(each.innerText || each.getAttribute('aria-label') || each.title || each.labels?.length
                      || each.getAttribute('aria-labelledby') || each.placeholder);
           }).map(each => each.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []


def test_port_taken_is_said_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]):
    from hf_clip.commands import program

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert program.main(["app", "no-such-model", "--port", str(port)]) == 1
    assert f"error: Port {port} of 127.0.0.1 is taken by another program" in capsys.readouterr().err
