"""The page: three tabs of Gradio's components, and what happens when one is used.

What is done stands in `page_labels`, `page_queries` and `page_heat`, which know nothing of Gradio. All that needs the
model waits in one queue, since one computation takes all cores. What a visitor can mend is a line in the page; anything
else is a fault of ours, of which the page says no more than that there was one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ..zero_shot.prompts import DEFAULT_TEMPLATE
from .page_heat import DETAILS, MOST_TEXTS, look_inside
from .page_labels import MOST_IMAGES, OWN, TEMPLATE_CHOICES, label_images
from .page_markup import heat_cards, hint, how_to_index, label_cards, problem, result_grid, selected_image
from .page_model import PageModel
from .page_queries import MOST_RESULTS, find_images, find_like, large_copy, query_parts

STYLE = Path(__file__).with_name("page_style.css")

IMAGE_FILES = ["image", ".heic", ".heif", ".avif"]
"""What a browser offers to choose; what can be opened is known when it is opened."""

QUEUE = 32
"""Most requests that wait. More are told to come back."""

SESSIONS = 200
"""Visitors whose last results are kept."""

FILES_KEPT = 3600
"""Seconds for which uploaded files are kept."""

ON_MODEL = "model"
"""Events that wait for one another."""

NO_IMAGES_YET = "Drop an image and write labels. Each label gets a bar."
NOTHING_FOUND_YET = "Write a text or drop an image. The images of the index that fit best stand here."
NO_MAPS_YET = "Drop an image and write what to look for. Each text gets a map of where in the image it is."

MARK_BELOW = """threshold => {
  const cards = document.querySelector('#labelled .cards');
  if (!cards) return;
  cards.style.setProperty('--threshold', `${100 * threshold}%`);
  cards.querySelectorAll('[data-score]').forEach(bar =>
    bar.classList.toggle('below', Number(bar.dataset.score) < threshold));
}"""
"""Labels below the threshold turn pale, without asking the server."""

HIDE_BELOW = """cutoff => {
  let hidden = 0;
  document.querySelectorAll('#results [data-share]').forEach(hit => {
    hit.hidden = Number(hit.dataset.share) < cutoff / 100;
    hidden += hit.hidden ? 1 : 0;
  });
  const said = document.querySelector('#results .left-out');
  if (said) said.textContent = hidden ? `, ${hidden} hidden` : '';
}"""
"""Images below the cutoff are hidden, without asking the server."""

ON_HIT = """element.addEventListener('click', event => {
  const hit = event.target.closest('button[data-place]');
  if (!hit) return;
  element.querySelectorAll('button[data-place]').forEach(other =>
    other.setAttribute('aria-pressed', String(other === hit)));
  trigger('select', {place: Number(hit.dataset.place)});
});"""

SHOW_SELECTED = """() => setTimeout(() => {
  const button = document.querySelector('#more-like');
  if (!button) return;
  document.querySelector('#selected').scrollIntoView({block: 'nearest'});
  button.focus({preventScroll: true});
}, 50)"""
"""The selected image comes into view, and Enter looks for more like it."""

SHOW_ANSWER = """() => setTimeout(() => {
  const answers = [...document.querySelectorAll('#labelled, #results, #maps')].filter(each => each.offsetParent);
  if (answers.length && answers[0].getBoundingClientRect().top > 0.6 * innerHeight)
    answers[0].scrollIntoView({block: 'start'});
}, 50)"""
"""On a phone, where an answer stands below what was asked, it comes into view."""


def theme() -> Any:
    """The page's colours and fonts. White letters stand on a teal that is dark enough to read them."""
    fonts = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]
    return gr.themes.Default(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", radius_size="md", font=fonts
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )


def or_problem(answer: Callable[[], Any], otherwise: Callable[[str], Any] = lambda line: line) -> Any:
    """What `answer` returns; or, where a visitor can mend what went wrong, the line that says so.

    Args:
        answer: Computes the answer.
        otherwise: Makes an answer of the line.
    """
    try:
        return answer()
    except (ValueError, OSError, ImportError) as error:
        return otherwise(problem(error))


def classify_tab(page: PageModel) -> None:
    """Images and labels on the left, bars on the right."""

    def run(files: Any, labels: str, choice: str, own: str, with_none: bool, threshold: float) -> str:
        return or_problem(
            lambda: label_cards(label_images(page, files, labels, choice, own, with_none), float(threshold))
        )

    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            files = gr.File(
                label=f"Images (at most {MOST_IMAGES})",
                file_count="multiple",
                file_types=IMAGE_FILES,
                elem_id="classify-images",
                height=150,
            )
            examples = page.examples()
            labels = gr.Textbox(
                label="Labels",
                info="One on each line, or with commas between them.",
                placeholder="\n".join(examples) or "a cat\na dog\na bird",
                lines=4,
                max_lines=12,
                elem_id="labels",
            )
            run_button = gr.Button("Classify", variant="primary", elem_id="classify")
            threshold = gr.Slider(
                0, 1, value=0, step=0.01, label="Threshold", info="Labels below it turn pale.", elem_id="threshold"
            )
            none = gr.Checkbox(True, label="An image may show none of these", elem_id="with-none")
            choice = gr.Dropdown(
                [(said, name) for name, said in TEMPLATE_CHOICES.items()],
                value="{}" if examples else "simple",
                label="Template",
                info="What a label is put into. A model is used best with texts as it was trained on.",
                elem_id="templates",
            )
            own = gr.Textbox(
                label="My templates",
                info="One on each line, each with {} where the label belongs.",
                value=DEFAULT_TEMPLATE,
                lines=2,
                visible=False,
                elem_id="own-templates",
            )
        with gr.Column(scale=3, min_width=280):
            answer = gr.HTML(hint(NO_IMAGES_YET), elem_id="labelled")
    choice.change(
        lambda name: gr.update(visible=name == OWN),
        choice,
        own,
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )
    inputs = [files, labels, choice, own, none, threshold]
    gr.on(
        [run_button.click, labels.submit],
        run,
        inputs,
        answer,
        concurrency_id=ON_MODEL,
        concurrency_limit=1,
        api_name="classify",
    ).then(None, None, None, js=SHOW_ANSWER, api_visibility="private")
    threshold.change(None, threshold, None, js=MARK_BELOW, queue=False, api_visibility="private")


def search_tab(page: PageModel) -> None:
    """The query on the left; the selected image and the results on the right."""
    if page.index is None:
        gr.HTML(how_to_index(page.place), elem_id="no-index")
        return
    examples = page.examples()

    def answer_of(find: Callable[[], Any], cutoff: float) -> tuple[Any, ...]:
        """The grid, the results behind it, and a selection of none."""

        def answer() -> tuple[Any, ...]:
            found = find()
            return result_grid(found, cutoff / 100), found.results, None, gr.update(visible=False), ""

        return or_problem(answer, lambda line: (line, [], None, gr.update(visible=False), ""))

    def run(text: str, image: str | None, minus: str, top: float, cutoff: float, only_fitting: bool) -> tuple[Any, ...]:
        return answer_of(lambda: find_images(page, *query_parts(text, image, minus), int(top), only_fitting), cutoff)

    def run_like(selected: Any, top: float, cutoff: float, only_fitting: bool) -> tuple[Any, ...]:
        if selected is None:
            return hint("Choose an image first."), [], None, gr.update(visible=False), ""
        return answer_of(lambda: find_like(page, selected, int(top), only_fitting), cutoff)

    def select(results: list[Any], event: gr.EventData) -> tuple[Any, ...]:
        place = event.place
        if not isinstance(place, int) or not 0 <= place < len(results):
            return None, gr.update(visible=False), ""
        result = results[place]
        return result, gr.update(visible=True), selected_image(result, large_copy(result))

    results, selected = gr.State([], time_to_live=FILES_KEPT), gr.State(None, time_to_live=FILES_KEPT)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            text = gr.Textbox(
                label="Text", placeholder=examples[0] if examples else "a dog on a beach", elem_id="query", max_lines=3
            )
            image = gr.File(label="Image", file_types=IMAGE_FILES, elem_id="query-image", height=120)
            minus = gr.Textbox(label="Minus", info="What the images should not show.", elem_id="minus", max_lines=3)
            run_button = gr.Button("Search", variant="primary", elem_id="search")
            top = gr.Slider(1, MOST_RESULTS, value=20, step=1, label="Most images", elem_id="top")
            cutoff = gr.Slider(
                0,
                100,
                value=0,
                step=1,
                label="Cutoff",
                info="Percent of the best score below which an image is hidden.",
                elem_id="cutoff",
            )
            fitting = gr.Checkbox(
                True,
                label="Only images that fit",
                info="Judged for each query by the index itself.",
                elem_id="only-fitting",
            )
        with gr.Column(scale=3, min_width=280):
            with gr.Column(visible=False, elem_id="selected") as panel:
                details = gr.HTML("", elem_id="details")
                like_button = gr.Button("More like this", variant="primary", elem_id="more-like")
            grid = gr.HTML(hint(NOTHING_FOUND_YET), elem_id="results", js_on_load=ON_HIT)
    outputs = [grid, results, selected, panel, details]
    gr.on(
        [run_button.click, text.submit, minus.submit],
        run,
        [text, image, minus, top, cutoff, fitting],
        outputs,
        concurrency_id=ON_MODEL,
        concurrency_limit=1,
        api_name="search",
    ).then(None, None, None, js=SHOW_ANSWER, api_visibility="private")
    like_button.click(
        run_like,
        [selected, top, cutoff, fitting],
        outputs,
        concurrency_id=ON_MODEL,
        concurrency_limit=1,
        api_visibility="private",
    ).then(None, None, None, js=SHOW_ANSWER, api_visibility="private")
    cutoff.change(None, cutoff, None, js=HIDE_BELOW, queue=False, api_visibility="private")
    grid.select(select, results, [selected, panel, details], api_visibility="private", show_progress="hidden").then(
        None, None, None, js=SHOW_SELECTED, api_visibility="private"
    )


def look_tab(page: PageModel) -> None:
    """An image and texts on the left, maps on the right."""

    def run(file: str | None, texts: str, detail: str) -> str:
        return or_problem(lambda: heat_cards(look_inside(page, file, texts, detail)))

    examples = page.examples()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="Image", file_types=IMAGE_FILES, elem_id="look-image", height=150)
            texts = gr.Textbox(
                label="What to look for",
                info=f"A text on each line, at most {MOST_TEXTS}.",
                placeholder="\n".join(examples[:2]) or "a photo of a cat\na photo of a dog",
                lines=3,
                max_lines=8,
                elem_id="look-texts",
            )
            run_button = gr.Button("Look", variant="primary", elem_id="look")
            detail = gr.Radio(list(DETAILS), value=next(iter(DETAILS)), label="Cells", elem_id="look-detail")
        with gr.Column(scale=3, min_width=280):
            answer = gr.HTML(hint(NO_MAPS_YET), elem_id="maps")
    gr.on(
        [run_button.click, texts.submit],
        run,
        [file, texts, detail],
        answer,
        concurrency_id=ON_MODEL,
        concurrency_limit=1,
        api_name="look",
    ).then(None, None, None, js=SHOW_ANSWER, api_visibility="private")


def build_page(page: PageModel) -> Any:
    """Lay the page out.

    Args:
        page: The model that it shows.

    Returns:
        Gradio's `Blocks`, which nothing serves yet.
    """
    with gr.Blocks(
        title=f"{page.name} · hf_clip", analytics_enabled=False, delete_cache=(FILES_KEPT // 6, FILES_KEPT)
    ) as blocks:
        about = f" · {len(page.index):,} images" if page.index is not None else ""
        gr.Markdown(f"# {page.name}{about}", elem_id="title")
        with gr.Tabs():
            with gr.Tab("Classify", id="classify"):
                classify_tab(page)
            with gr.Tab("Search", id="search"):
                search_tab(page)
            with gr.Tab("Look inside", id="look"):
                look_tab(page)
    blocks.queue(max_size=QUEUE)
    blocks.state_session_capacity = SESSIONS
    return blocks


__all__ = ["STYLE", "build_page", "theme"]
