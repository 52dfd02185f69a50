"""The page: three tabs of Gradio's components, and what happens when one is used.

What is done stands in `page_labels`, `page_queries` and `page_heat`, which know nothing of Gradio. All that needs the
model waits in one queue and has its turn in one thread, since one computation takes all cores. What a visitor can mend
is a line in the page; anything else is a fault of ours, of which the page says no more than that there was one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ..search.image_index import SearchResult
from ..zero_shot.prompts import DEFAULT_TEMPLATE
from .page_heat import DETAILS, MOST_TEXTS, look_inside
from .page_labels import MOST_IMAGES, OWN, TEMPLATE_CHOICES, label_images
from .page_markup import count_of, heat_cards, hint, how_to_index, label_cards, problem, result_grid, selected_image
from .page_model import PageModel
from .page_queries import MOST_RESULTS, Found, find_images, find_like, large_copy, query_parts
from .page_scripts import HIDE_BELOW, MARK_BELOW, ON_HIT, SHOW_ANSWER, SHOW_SELECTED

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


def theme() -> Any:
    """The page's colours and fonts. White letters stand on a teal that is dark enough, and grey letters are, too."""
    fonts = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]
    return gr.themes.Default(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", radius_size="md", font=fonts
    ).set(
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def or_problem(page: PageModel, answer: Callable[[], Any], otherwise: Callable[[str], Any] = lambda line: line) -> Any:
    """What `answer` returns; or, where a visitor can mend what went wrong, the line that says so.

    Args:
        page: Its thread computes the answer.
        answer: Computes it.
        otherwise: Makes an answer of the line.
    """
    try:
        return page.computing.run(answer)
    except (ValueError, OSError, ImportError) as error:
        return otherwise(problem(error))


def on_model(triggers: list[Any], run: Callable[..., Any], inputs: Any, outputs: Any, name: str | None = None) -> None:
    """Let the model answer, one visitor after the other, and bring the answer into view.

    Args:
        triggers: What asks for it, such as a button's click.
        run: Computes the answer.
        inputs: Gradio's components of its arguments.
        outputs: Those of its results.
        name: What programs call it. None: they cannot.
    """
    told = {"api_visibility": "private"} if name is None else {"api_name": name}
    answered = gr.on(triggers, run, inputs, outputs, concurrency_id=ON_MODEL, concurrency_limit=1, **told)
    answered.then(None, None, None, js=SHOW_ANSWER, api_visibility="private")


def _template_inputs(has_captions: bool) -> tuple[Any, Any]:
    """The choice of a template, and the visitor's own, which are shown if they are chosen."""
    choice = gr.Dropdown(
        [(said, name) for name, said in TEMPLATE_CHOICES.items()],
        value="{}" if has_captions else "simple",
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
    choice.change(
        lambda name: gr.update(visible=name == OWN),
        choice,
        own,
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )
    return choice, own


def classify_tab(page: PageModel, examples: list[str]) -> None:
    """Images and labels on the left, bars on the right."""

    def run(files: Any, labels: str, choice: str, own: str, with_none: bool, threshold: float) -> str:
        labelled = lambda: label_images(page, files, labels, choice, own, with_none)  # noqa: E731
        return or_problem(page, lambda: label_cards(labelled(), float(threshold)))

    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            files = gr.File(
                label=f"Images (at most {MOST_IMAGES})",
                file_count="multiple",
                file_types=IMAGE_FILES,
                elem_id="classify-images",
                height=150,
            )
            labels = gr.Textbox(
                label="Labels",
                info="One on each line, or all on one line with commas between them.",
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
            choice, own = _template_inputs(has_captions=bool(examples))
        with gr.Column(scale=3, min_width=280):
            answer = gr.HTML(hint(NO_IMAGES_YET), elem_id="labelled")
    inputs = [files, labels, choice, own, none, threshold]
    on_model([run_button.click, labels.submit], run, inputs, answer, "classify")
    threshold.change(None, threshold, None, js=MARK_BELOW, queue=False, api_visibility="private")


class Searches:
    """What the search tab does. An answer is the grid, the results behind it, and a selection of none.

    Args:
        page: The model and its index.
    """

    def __init__(self, page: PageModel):
        self.page = page

    def _answer(self, find: Callable[[], Found], cutoff: float) -> tuple[Any, ...]:
        nothing = (None, gr.update(visible=False), "")

        def answer() -> tuple[Any, ...]:
            found = find()
            return result_grid(found, cutoff / 100), found.results, *nothing

        return or_problem(self.page, answer, lambda line: (line, [], *nothing))

    def run(
        self, text: str, image: str | None, minus: str, top: float, cutoff: float, only_fitting: bool
    ) -> tuple[Any, ...]:
        """Search by what a visitor wrote and sent."""
        find = lambda: find_images(self.page, *query_parts(text, image, minus), int(top), only_fitting)  # noqa: E731
        return self._answer(find, cutoff)

    def run_like(self, selected: SearchResult | None, top: float, cutoff: float, only_fitting: bool) -> tuple[Any, ...]:
        """Search by the selected image."""
        if selected is None:
            return hint("Choose an image first."), [], None, gr.update(visible=False), ""
        return self._answer(lambda: find_like(self.page, selected, int(top), only_fitting), cutoff)

    def select(self, results: list[SearchResult], event: gr.EventData) -> tuple[Any, ...]:
        """Select a result: the result, and what is shown of it."""
        place = event.place
        if not isinstance(place, int) or not 0 <= place < len(results):
            return None, gr.update(visible=False), ""
        result = results[place]
        return result, gr.update(visible=True), selected_image(result, large_copy(result))


def _result_limits() -> tuple[Any, Any, Any]:
    """How many images are shown at most, the cutoff, and whether results end where images no longer fit."""
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
    return top, cutoff, fitting


def search_tab(page: PageModel, examples: list[str]) -> None:
    """The query on the left; the selected image and the results on the right."""
    if not page.has_index:
        gr.HTML(how_to_index(page.place), elem_id="no-index")
        return
    searches = Searches(page)
    results, selected = gr.State([], time_to_live=FILES_KEPT), gr.State(None, time_to_live=FILES_KEPT)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            text = gr.Textbox(
                label="Text", placeholder=examples[0] if examples else "a dog on a beach", elem_id="query", max_lines=3
            )
            image = gr.File(label="Image", file_types=IMAGE_FILES, elem_id="query-image", height=120)
            minus = gr.Textbox(label="Minus", info="What the images should not show.", elem_id="minus", max_lines=3)
            run_button = gr.Button("Search", variant="primary", elem_id="search")
            limits = _result_limits()
        with gr.Column(scale=3, min_width=280):
            with gr.Column(visible=False, elem_id="selected") as panel:
                details = gr.HTML("", elem_id="details")
                like_button = gr.Button("More like this", variant="primary", elem_id="more-like")
            grid = gr.HTML(hint(NOTHING_FOUND_YET), elem_id="results", js_on_load=ON_HIT)
    outputs = [grid, results, selected, panel, details]
    asked = [run_button.click, text.submit, minus.submit]
    on_model(asked, searches.run, [text, image, minus, *limits], outputs, "search")
    on_model([like_button.click], searches.run_like, [selected, *limits], outputs)
    _, cutoff, _ = limits
    cutoff.change(None, cutoff, None, js=HIDE_BELOW, queue=False, api_visibility="private")
    chosen = grid.select(
        searches.select, results, [selected, panel, details], api_visibility="private", show_progress="hidden"
    )
    chosen.then(None, None, None, js=SHOW_SELECTED, api_visibility="private")


def look_tab(page: PageModel, examples: list[str]) -> None:
    """An image and texts on the left, maps on the right."""

    def run(file: str | None, texts: str, detail: str) -> str:
        return or_problem(page, lambda: heat_cards(look_inside(page, file, texts, detail)))

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
    on_model([run_button.click, texts.submit], run, [file, texts, detail], answer, "look")


def heading(page: PageModel) -> str:
    """The page's first line: the model, and how many images its index has."""
    index = page.index
    return f"# {page.name}" + ("" if index is None else f" · {count_of(len(index), 'image')}")


def build_page(page: PageModel) -> Any:
    """Lay the page out.

    Args:
        page: The model that it shows.

    Returns:
        Gradio's `Blocks`, which nothing serves yet.
    """
    examples = page.computing.run(page.examples)
    with gr.Blocks(
        title=f"{page.name} · hf_clip", analytics_enabled=False, delete_cache=(FILES_KEPT // 6, FILES_KEPT)
    ) as blocks:
        title = gr.Markdown(heading(page), elem_id="title")
        with gr.Tabs():
            for name, tab in (("Classify", classify_tab), ("Search", search_tab), ("Look inside", look_tab)):
                with gr.Tab(name, id=name.split()[0].lower()):
                    tab(page, examples)
        if page.has_index:  # which may have grown since
            blocks.load(
                lambda: or_problem(page, lambda: heading(page), lambda line: f"# {page.name}"),
                None,
                title,
                queue=False,
                api_visibility="private",
                show_progress="hidden",
            )
    blocks.queue(max_size=QUEUE)
    blocks.state_session_capacity = SESSIONS
    # `launch` sets it, and mounting does not. Without it Gradio takes any path in a request for an upload.
    blocks.has_launched = True
    return blocks


__all__ = ["STYLE", "build_page", "theme"]
