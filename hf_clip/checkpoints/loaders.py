"""Who would load a source, and how; or why not, and what to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.configuration_hf_clip import HfClipConfig, HfClipTextConfig
from .stock import why_not_stock


@dataclass(frozen=True)
class Loader:
    """One way to load a source.

    Attributes:
        name: Who loads it.
        loads: Whether it would.
        how: The call; or why it does not, and what to do.
    """

    name: str
    loads: bool
    how: str


WITH_PACKAGE = "transformers with hf_clip"
WITH_CODE = "transformers with trust_remote_code"
STOCK = "transformers alone"
OPEN_CLIP = "open_clip"
OPENAI = "OpenAI's clip"


def loaders_of_file(name: str, container: str, naming: str | None, problem: str | None) -> list[Loader]:
    """Who loads a checkpoint file by itself."""
    if naming != "OpenAI":
        return [Loader(WITH_PACKAGE, False, problem or f"it has the layout of {naming}; name its folder or repository")]
    if container == "training checkpoint" or problem is not None:
        told = " --config open_clip_config.json" if container == "training checkpoint" else ""
        return [Loader(WITH_PACKAGE, False, problem or f"convert it: hf-clip convert {name} FOLDER{told}")]
    return [
        Loader(WITH_PACKAGE, False, f"convert it: hf-clip convert {name} FOLDER"),
        Loader("hf_clip.load", True, f'hf_clip.load("{name}")'),
        Loader(OPENAI, True, f'clip.load("{name}")'),
    ]


def loaders_of_repository(
    name: str, layout: str, config: Any, values: dict[str, Any], files: list[str], problem: str | None
) -> list[Loader]:
    """Who loads a folder or a repository.

    Args:
        name: The folder or repository.
        layout: "hf_clip", "transformers", "open_clip" or another.
        config: Its configuration, or None.
        values: The content of its config.json.
        files: The names of its files.
        problem: What keeps everyone from loading it.
    """
    if config is None or problem is not None:
        reason = problem or f"it is no CLIP of OpenAI's architectures; its layout is that of {layout}"
        return [Loader(WITH_PACKAGE, False, reason)]
    return [
        Loader(WITH_PACKAGE, True, _call_with_package(name, layout, config)),
        _with_code(name, values, files),
        _stock(name, layout, config),
        _open_clip(name, layout, config),
    ]


def _call_with_package(name: str, layout: str, config: Any) -> str:
    """The call that loads it with hf_clip. Without a config.json of its own `AutoModel` does not know the class."""
    if layout == "hf_clip":
        return f'import hf_clip; AutoModel.from_pretrained("{name}")'
    kinds = {HfClipConfig: "HfClipModel", HfClipTextConfig: "HfClipTextModel"}
    return f'hf_clip.{kinds.get(type(config), "HfClipViTModel")}.from_pretrained("{name}")'


def _with_code(name: str, values: dict[str, Any], files: list[str]) -> Loader:
    auto_map = values.get("auto_map")
    entries = [str(entry) for entry in auto_map.values()] if isinstance(auto_map, dict) else []
    if not entries:
        return Loader(WITH_CODE, False, f"it has no code; hf-clip convert {name} FOLDER --remote-code adds it")
    missing = sorted({f"{entry.split('.')[0]}.py" for entry in entries} - set(files))
    if missing:
        return Loader(WITH_CODE, False, f"its config.json names {', '.join(missing)}, which it doesn't have")
    return Loader(WITH_CODE, True, f'AutoModel.from_pretrained("{name}", trust_remote_code=True)')


def _stock(name: str, layout: str, config: Any) -> Loader:
    if layout == "transformers":
        return Loader(STOCK, True, f'AutoModel.from_pretrained("{name}")')
    if isinstance(config, HfClipConfig) and (reason := why_not_stock(config)) is not None:
        return Loader(STOCK, False, reason)
    return Loader(STOCK, False, f"convert it: hf-clip convert {name} FOLDER --format transformers")


def _open_clip(name: str, layout: str, config: Any) -> Loader:
    if layout == "open_clip":
        kind = "local-dir" if Path(name).is_dir() else "hf-hub"
        return Loader(OPEN_CLIP, True, f'open_clip.create_model_from_pretrained("{kind}:{name}")')
    if not isinstance(config, HfClipConfig):
        return Loader(OPEN_CLIP, False, "it loads whole models only")
    return Loader(OPEN_CLIP, False, f"convert it: hf-clip convert {name} FOLDER --format open_clip")


__all__ = ["Loader", "loaders_of_file", "loaders_of_repository"]
