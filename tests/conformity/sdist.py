"""transformers' own tests of every model, from the source archive of the version that is installed.

The wheel doesn't have them. The archive is taken from the package index (`PIP_INDEX_URL`, else PyPI), checked against
the index's sha256, and kept in the folder that `HF_CLIP_SDISTS` names, else in the user's cache; one that was put there
by hand is used as well. Its tests are unpacked into a temporary package for each run, under a name of their own,
since ours are called `tests` too.

Invariant: nothing is imported from an archive that was fetched and whose sha256 is not the index's.
"""

import atexit
import hashlib
import importlib
import os
import shutil
import sys
import tarfile
import tempfile
from functools import cache
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from types import ModuleType
from urllib.parse import urldefrag, urljoin
from urllib.request import Request, urlopen

import pytest
import transformers

PACKAGE = "transformers_tests"

ABSENT = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "fixtures/sample_text.txt": "A text.\n",
    "../utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}
"""What the archive's tests import and the archive doesn't have, as little of each as they need."""


class Links(HTMLParser):
    """The addresses on a page of the index, by file name."""

    def __init__(self, page: str, address: str):
        super().__init__()
        self.address = address
        self.by_name: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a" and (link := dict(attrs).get("href")):
            whole = urljoin(self.address, link)
            self.by_name[PurePosixPath(urldefrag(whole).url).name] = whole


def read(address: str) -> bytes:
    with urlopen(Request(address, headers={"Accept": "text/html"}), timeout=60) as answer:
        return answer.read()


def fetch(name: str) -> bytes:
    """The archive as the index has it. Raises OSError where the index cannot be reached or has something else."""
    page = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/transformers/"
    links = Links(read(page).decode(), page).by_name
    if name not in links:
        raise OSError(f"{page} has no {name}")
    address, checksum = urldefrag(links[name])
    if not checksum.startswith("sha256="):
        raise OSError(f"{page} gives no sha256 of {name}")
    archive = read(address)
    if (found := hashlib.sha256(archive).hexdigest()) != checksum.removeprefix("sha256="):
        raise OSError(f"{address} has sha256 {found}, but the index says {checksum.removeprefix('sha256=')}")
    return archive


def cached_archive() -> Path:
    name = f"transformers-{transformers.__version__}.tar.gz"
    folder = Path(os.environ.get("HF_CLIP_SDISTS", Path.home() / ".cache" / "hf_clip" / "sdists"))
    if not (folder / name).exists():
        archive = fetch(name)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            part.write(archive)
        os.replace(part.name, folder / name)
    return folder / name


@cache
def unpack() -> None:
    """Make the package importable, for as long as this process lives."""
    root = Path(tempfile.mkdtemp(prefix="transformers-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    with tarfile.open(cached_archive()) as archive:
        members = [m for m in archive.getmembers() if m.isfile() and PurePosixPath(m.name).match("*/tests/*.py")]
        archive.extractall(root, members, filter="data")
    (folder,) = root.glob("*/tests")
    package = folder.rename(root / PACKAGE)
    for name, source in {"__init__.py": "", **ABSENT}.items():
        path = package / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        if path.parent != package:
            (path.parent / "__init__.py").touch()
    sys.path.insert(0, str(root))


def load(module: str) -> ModuleType:
    """One module of transformers' tests; skips the calling test module where they cannot be had."""
    try:
        unpack()
    except OSError as error:  # urllib's are among them
        pytest.skip(
            f"transformers' own tests are needed, but its source archive cannot be had ({error}); put "
            f"transformers-{transformers.__version__}.tar.gz into the folder that HF_CLIP_SDISTS names.",
            allow_module_level=True,
        )
    return importlib.import_module(f"{PACKAGE}.{module}")
