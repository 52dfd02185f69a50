"""A Space on the Hub: the package's page, in which visitors try a published model.

A Space is a repository of its own with three files: a program of a few lines, its requirements, and a README whose head
tells the Hub which version of Gradio runs it and which model it shows.

Invariant: nothing of the user's is overwritten. Each file ends with a checksum of itself. A file that is there already
is replaced if its checksum says that it was written here and not changed since; any other is refused.
"""

import hashlib
import re
import tempfile
from pathlib import Path
from string import Template

from huggingface_hub import HfApi, SpaceCardData, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from .model_card import name_of
from .upload import PublishingError, Upload, explain, publish_folder

GRADIO_VERSION = "6.31.0"
"""The version that the page is tested with; the same as in constraints.txt."""

SIGNATURE = re.compile(r"\n(?:# |<!-- )Written by hf-clip publish, sha256 ([0-9a-f]{64})(?: -->)?\n?\Z")
HUB_README = "https://huggingface.co/docs/hub/spaces-config-reference"
"""What stands in the README that the Hub puts into a new Space."""

APP = Template('''\
"""A page on which $model is tried: it classifies images by any labels, and shows what it looks at."""

from hf_clip.app.page_layout import STYLE, build_page, theme
from hf_clip.app.page_model import PageModel

demo = build_page(PageModel.load("$model"))

if __name__ == "__main__":
    demo.launch(theme=theme(), css_paths=[STYLE], max_file_size="25mb", show_error=False)
''')

README = Template("""\
---
$metadata
---

# $name

A page on which the CLIP model [$model]($endpoint/$model) is tried: drop images, write labels, and see where in \
an image a text is. It is the page of the package `hf_clip`, and runs on your own machine too:

```bash
pip install "hf-clip[app]"
hf-clip app $model
```
""")


def signed(text: str, name: str) -> str:
    """Add to a file's text the line that says who wrote it, with a checksum of what stands before."""
    line = f"Written by hf-clip publish, sha256 {hashlib.sha256(text.encode()).hexdigest()}"
    return f"{text}\n<!-- {line} -->\n" if name.endswith(".md") else f"{text}\n# {line}\n"


def is_unchanged(text: str) -> bool:
    """Whether a text ends with the line of `signed`, and is as it was when that was added."""
    found = SIGNATURE.search(text)
    return found is not None and hashlib.sha256(text[: found.start()].encode()).hexdigest() == found[1]


def requirement(version: str) -> str:
    """The line of requirements.txt that installs this version of the package.

    A version in development is on no index, so that the next one that is has to do.
    """
    return f"hf-clip[app]{'>=' if 'dev' in version else '=='}{version}"


def space_files(model: str, space: str, version: str) -> dict[str, str]:
    """Write the files of a Space.

    Args:
        model: Name of the model's repository.
        space: Name of the Space.
        version: Version of this package.

    Returns:
        Texts by the names of the files.
    """
    metadata = SpaceCardData(
        title=name_of(space),
        emoji="🔎",
        colorFrom="green",
        colorTo="blue",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        app_file="app.py",
        pinned=False,
        short_description="Classify images by any labels, and look inside",
        models=[model],
        tags=["clip", "hf_clip"],
    )
    names = {"model": model, "name": name_of(space), "endpoint": constants.ENDPOINT, "metadata": metadata.to_yaml()}
    texts = {
        "README.md": README.substitute(names),
        "app.py": APP.substitute(names),
        "requirements.txt": f"{requirement(version)}\n",
    }
    return {name: signed(text, name) for name, text in texts.items()}


def list_files(texts: dict[str, str]) -> list[Upload]:
    """List the files of a Space with their sizes."""
    return [Upload(name, len(text.encode())) for name, text in sorted(texts.items())]


def foreign_files(api: HfApi, space: str, texts: dict[str, str]) -> list[str]:
    """Find the files in a Space that would be overwritten and are not our own.

    Raises:
        RepositoryNotFoundError: There is no such Space.
    """
    present = {entry.rfilename for entry in api.space_info(space).siblings or []}
    found = []
    with tempfile.TemporaryDirectory(prefix="space-") as folder:
        for name in sorted(texts.keys() & present):
            path = api.hf_hub_download(space, name, repo_type="space", local_dir=folder)
            there = Path(path).read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
            is_hubs = name == "README.md" and "app.py" not in present and HUB_README in there
            if not (there == texts[name] or is_unchanged(there) or is_hubs):
                found.append(name)
    return found


def check_space(space: str, texts: dict[str, str], *, private: bool = False, replace: bool = False) -> bool:
    """Refuse, before anything is sent, a Space that cannot be published.

    Args:
        space: Name of the Space.
        texts: What `space_files` returned.
        private: Whether it shall be private.
        replace: Whether files that were not written here may be overwritten.

    Returns:
        Whether there is such a Space.

    Raises:
        PublishingError: It has files that would be overwritten, is public although a private one was asked for, or the
            Hub could not be asked.
    """
    api = HfApi()
    try:
        foreign = [] if replace else foreign_files(api, space, texts)
        is_public = not api.space_info(space).private
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 401 and not api.token:
            raise explain(error, space) from error
        return False
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise explain(error, space) from error
    if foreign:
        raise PublishingError(
            f"The Space {space} was not published: it has files that hf-clip publish did not write, or that were "
            f"changed since: {', '.join(foreign)}. Name another Space with --space-repo, or overwrite them with "
            f"--replace-space."
        )
    if private and is_public:
        raise PublishingError(
            f"The Space {space} was not published: it is there already and public, though a private one was asked for. "
            f"Make it private in its settings, or name another with --space-repo."
        )
    return True


def publish_space(model: str, space: str, texts: dict[str, str], *, private: bool | None = None) -> str:
    """Push a Space in one commit. It is created if it is missing; its other files stay.

    Args:
        model: Name of the model's repository.
        space: Name of the Space.
        texts: What `space_files` returned.
        private: Whether a new Space is private. None: the default of its owner.

    Returns:
        The address of the Space.

    Raises:
        PublishingError: The Hub refused, or the connection failed.
    """
    with tempfile.TemporaryDirectory(prefix="space-") as folder:
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8", newline="\n")
        publish_folder(folder, space, private=private, message=f"Show {model}", repo_type="space")
    return f"{constants.ENDPOINT}/spaces/{space}"


def is_private(model: str) -> bool:
    """Whether a model's repository is private. Raises PublishingError if the Hub cannot be asked."""
    try:
        return bool(HfApi().model_info(model).private)
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise explain(error, model) from error


__all__ = ["check_space", "is_private", "list_files", "publish_space", "space_files"]
