"""`hf-clip app`: a page in the browser for a model and an index."""

from typing import Annotated

import typer

from .shared_options import MODEL_HELP


def app(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    index: Annotated[
        str | None,
        typer.Option(
            help="An index that `hf-clip index` made of this model: a folder, or an address on object storage. Without "
            "one, the page does not search.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="The port of the page. 0: any that is free.", min=0, max=65535)] = 7860,
    host: Annotated[
        str,
        typer.Option(help="The address to serve on. 0.0.0.0 lets other machines of the network see the page."),
    ] = "127.0.0.1",
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Open a page in the browser: classify images, search an index, and look inside an image.

    The page is for this machine alone, unless --host says otherwise, and has no password. Ctrl-C ends it.

    Examples:

        hf-clip app clip-vit-b32/ --open

        hf-clip app clip-vit-b32/ --index photos-index --port 8000
    """
    import sys
    import webbrowser

    from ..extras import require
    from ..taken_port import address_of, is_loopback, take_port

    require("The page", "app")
    taken = take_port(host, port)  # before the model is loaded, which takes a while
    try:
        from ..app.page_model import PageModel
        from ..app.page_server import serve_page
        from ..registration import register

        register()

        page = PageModel.load(model, index)
    except BaseException:
        taken.close()
        raise
    address = f"{address_of(taken)}/"

    def started() -> None:
        searched = f", with {len(page.index):,} images to search" if page.index is not None else ""
        print(f"{page.name}{searched}: {address}  (Ctrl-C ends it)", flush=True)
        if not is_loopback(taken):
            print("note: whoever reaches this machine sees the page and the images of its index", file=sys.stderr)
        if open_page:
            webbrowser.open(address)

    try:
        serve_page(page, taken, host, started)
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)
