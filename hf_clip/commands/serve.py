"""`hf-clip serve`: one model over HTTP, for the clients of OpenAI, infinity, Jina, vLLM and Immich."""

from typing import TYPE_CHECKING, Annotated

import typer

from .program import Dtype
from .shared_options import MODEL_HELP, DeviceOption, DtypeOption, OfflineOption

if TYPE_CHECKING:
    from ..search.image_index import ImageIndex
    from ..serve.served_model import ServedModel


def open_index(place: str, served: "ServedModel") -> "ImageIndex":
    """Open an index of the served model, by a hash of its weights."""
    from ..search.image_index import ImageIndex

    return ImageIndex.open(place, model=served.model, processor=served.processor, make=False)


def serve(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    index: Annotated[
        str | None,
        typer.Option(
            help="An index of images that `hf-clip index` made with the same model, for /v1/search.", metavar="INDEX"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes one that is free.", min=0, max=65535)] = 7997,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="What clients have to send as Authorization: Bearer KEY. Other users of the machine see options, so "
            "that the variable is the better place.",
            envvar="HF_CLIP_API_KEY",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="What clients call the model, given once or several times; answers carry the first. By default its "
            "name on the Hub, or that of its folder.",
            show_default=False,
        ),
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch images from public http and https addresses that clients send.")
    ] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are too long, which are an error otherwise.")
    ] = False,
    max_items: Annotated[int, typer.Option(help="Texts and images in one request, at most.", min=1)] = 2048,
    max_images: Annotated[int, typer.Option(help="Images in one request, at most.", min=1)] = 64,
    max_mib: Annotated[int, typer.Option(help="Size of one request in MiB, at most.", min=1)] = 32,
    max_pixels: Annotated[int, typer.Option(help="Pixels of one image, at most.", min=1)] = 64_000_000,
    batch_size: Annotated[int, typer.Option(help="Images encoded at once, at most.", min=1)] = 16,
    no_optimize: Annotated[
        bool,
        typer.Option(
            "--no-optimize", help="Compute with the model as it is loaded. It starts faster and answers slower."
        ),
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    offline: OfflineOption = False,
) -> None:
    """Serve a model over HTTP: embeddings of texts and images, labels of images, and search.

    Clients of OpenAI, infinity, Jina, vLLM and Immich speak to it. /docs in the browser shows all paths.

    Examples:

        hf-clip serve clip-vit-b32/

        hf-clip serve clip-vit-b32/ --index photos-index --host 0.0.0.0 --api-key SECRET
    """
    import os
    from functools import partial

    from ..extras import require
    from ..taken_port import address_of, is_loopback, take_port

    require("hf-clip serve", "serve")
    if api_key is None:
        api_key = os.environ.get("HF_CLIP_API_KEY")  # an empty one, which Typer takes for none
    with take_port(host, port) as taken:  # before torch and the model are loaded, which takes a while
        if index is not None:
            from ..search.index_table import IndexTables

            IndexTables.open(os.path.expanduser(index))  # one that is missing is told before the model is loaded
        from ..registration import register

        register()
        from ..search.indexed_image import register_formats
        from ..serve.serve_options import MIB, ServeOptions
        from ..serve.served_model import load_served
        from ..serve.server_process import keep_loaded, serve_forever
        from ..serve.web_app import build_app
        from ..zero_shot.pipeline import check_device

        check_device(device)
        options = ServeOptions(
            api_key=api_key,
            only_local_names=api_key is None and is_loopback(taken),
            allow_urls=allow_urls,
            truncate=truncate,
            most_items=max_items,
            most_images=min(max_images, max_items),
            most_bytes=max_mib * MIB,
            most_pixels=max_pixels,
            most_waiting_texts=max(ServeOptions.most_waiting_texts, 4 * max_items),
            most_waiting_images=max(ServeOptions.most_waiting_images, 4 * max_images),
            held_bytes=max(ServeOptions.held_bytes, 4 * max_mib * MIB),
            image_batch=batch_size,
        )
        register_formats()
        served = load_served(model, name or (), device=device, dtype=dtype.value, offline=offline)
        found = None if index is None else served.computing.run(partial(open_index, index, served))
        if not no_optimize:
            served.computing.run(served.model.optimize_for_inference)
        app = build_app(served, options, found)
        keep_loaded()
        searched = "" if found is None else f", and searches {len(found):,} images"
        print(f"{address_of(taken)} serves {served.name}, {served.width} numbers{searched}; see /docs", flush=True)
        if api_key is None and not is_loopback(taken):
            print("note: without --api-key, everyone who reaches this address can use it", flush=True)
        serve_forever(app, taken)
