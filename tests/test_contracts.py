"""The architecture: exported names, import weight, what travels to the Hub, and which way imports point."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import transformers

import hf_clip
from hf_clip.checkpoints.remote_code import MODEL_FOLDER, TRAVELLING

from .warm_python import run_warm

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_clip"

THIRD_PARTY = {"PIL", "ftfy", "huggingface_hub", "numpy", "regex", "safetensors", "tokenizers", "torch", "transformers"}
"""What they may import; a file that asks for more could not be loaded where only these are installed."""
OPTIONAL = {"hf_processors_rs"}
"""What they may try to import. The Hub's loader does not ask for what stands within `try`."""


def imports_of(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]


def modules_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


def test_exported_names_are_sorted_and_exist():
    names = hf_clip.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), name))  # constants first, as ruff sorts
    assert all(hasattr(hf_clip, name) for name in names)
    public = {name for name, value in vars(hf_clip).items() if isinstance(value, type) and name.startswith("HfClip")}
    assert public <= set(names)


@pytest.mark.parametrize(
    ("name", "ours"),
    [("CLIPModel", "HfClipModel"), ("CLIPTokenizerFast", "HfClipTokenizer"), ("CLIPVisionModel", "HfClipViTModel")],
)
def test_names_of_transformers_are_told_what_they_are_called_here(name: str, ours: str):
    with pytest.raises(ImportError, match=rf"^hf_clip has no {name}: the class is called {ours} here\.$"):
        exec(f"from hf_clip import {name}")
    assert not hasattr(hf_clip, "CLIPNothing")
    assert set(hf_clip._NAMES_OF_TRANSFORMERS.values()) <= set(hf_clip.__all__)
    assert all(hasattr(transformers, known) for known in hf_clip._NAMES_OF_TRANSFORMERS)


def test_what_a_person_sees_of_the_package_is_its_own():
    """Completion and `dir` show the public names and the package's own parts, and nothing of other libraries."""
    code = (
        "import json, types, hf_clip\n"
        "names = [name for name in dir(hf_clip) if not name.startswith('_')]\n"
        "modules = [name for name in names if isinstance(getattr(hf_clip, name), types.ModuleType)]\n"
        "print(json.dumps([names, modules]))"
    )
    names, modules = json.loads(run_python(code))
    assert set(names) - set(modules) == set(hf_clip.__all__) - {"__version__"}
    assert set(modules) <= {path.stem for path in PACKAGE.iterdir()}
    overview = (hf_clip.__doc__ or "").partition("What is public:")[2]  # where help(hf_clip) begins
    assert set(re.findall(r"\w+", overview)) >= set(hf_clip.__all__) - {"__version__"}


def test_program_that_is_called_as_the_command_is_told_so():
    """The command imports what it needs by itself, so that the package has no names in a program of its name."""
    said = "hf_clip.HfClipModel is missing since this program is called hf-clip, as the package's own command, which "
    said += "imports what it needs by itself: rename /home/me/hf-clip."
    code = "import sys\nsys.argv = ['/home/me/hf-clip']\nimport hf_clip\nassert not hasattr(hf_clip, 'other')\n"
    done = run_warm(f"{code}from hf_clip import HfClipModel", cwd=ROOT, environment={})
    assert done.stderr.splitlines()[-1] == f"ImportError: {said}"


def test_version_is_in_the_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", hf_clip.__version__)
    assert f"({hf_clip.__version__})" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", sorted(TRAVELLING))
def test_travelling_file_imports_flat_files_and_declared_packages_only(name: str):
    path = MODEL_FOLDER / f"{name}.py"
    tries = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Try)]
    tried = {ast.unparse(inner) for node in tries for inner in node.body if isinstance(inner, ast.Import)}
    for node in imports_of(path):
        if ast.unparse(node) in tried and {module.split(".")[0] for module in modules_of(node)} <= OPTIONAL:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, ast.unparse(node)
            assert node.module in TRAVELLING, ast.unparse(node)
        else:
            for module in modules_of(node):
                top = module.split(".")[0]
                assert top in THIRD_PARTY or top in sys.stdlib_module_names, ast.unparse(node)


def test_what_travels_is_all_that_the_named_classes_need():
    reached, waiting = set(), {"modeling_hf_clip", "processing_hf_clip", "tokenization_hf_clip"}
    waiting |= {"configuration_hf_clip", "image_processing_hf_clip"}  # those are the ones that `auto_map` names
    while waiting:
        name = waiting.pop()
        reached.add(name)
        nodes = imports_of(MODEL_FOLDER / f"{name}.py")
        waiting |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level} - reached
    assert reached == set(TRAVELLING)
    assert not [path for path in MODEL_FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_import_statements_do_not_stand_in_the_text_of_travelling_files():
    """The Hub's loader reads imports by regular expression, in docstrings too."""
    for name in TRAVELLING:
        source = (MODEL_FOLDER / f"{name}.py").read_text()
        found = re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)
        statements = [
            n.module for n in imports_of(MODEL_FOLDER / f"{name}.py") if isinstance(n, ast.ImportFrom) and n.level
        ]
        assert sorted(found) == sorted(map(str, statements))


def test_configuration_imports_no_torch():
    for name in ("configuration_hf_clip", "config_checks", "hub_repository", "stock_config", "variants"):
        for node in imports_of(MODEL_FOLDER / f"{name}.py"):
            assert not any(module.split(".")[0] == "torch" for module in modules_of(node))


ORDER = (
    ("commands",),
    ("serve", "app"),
    ("search",),
    ("training",),
    ("evaluation",),
    ("registration",),
    ("zero_shot",),
    ("inference", "hub", "data"),
    ("checkpoints",),
    ("model",),
    ("extras", "taken_port"),
)
"""The package's parts, from the top down. A part imports from those below it, never from one above or beside it."""

RANKS = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
TOP = {"__init__", "openai"}
"""What a user imports: it may import every part, and no part imports it."""


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_paths_are_expanded_by_what_takes_unknown_users():
    """pathlib raises RuntimeError for `~nobody/x`; `os.path.expanduser` leaves it, a path that is not there."""
    assert not [str(path) for path in PACKAGE.rglob("*.py") if ".expanduser()" in path.read_text()]


def test_every_file_belongs_to_a_part():
    assert {part_of(path) for path in PACKAGE.rglob("*.py")} <= {*RANKS, *TOP}


def test_file_is_found_by_its_name():
    """No two files of one name, and none that is named for anything at all."""
    names = [path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    assert [name for name in names if names.count(name) > 1] == []
    words = {word for name in names for word in name.split("_")}
    assert not words & {"util", "utils", "helper", "helpers", "common", "manager", "factory", "misc"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    part, folder = part_of(path), path.relative_to(PACKAGE).parent.parts
    for node in imports_of(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            whole = [*above, *(node.module.split(".") if node.module else ())]
            targets = [whole[0]] if whole else [alias.name for alias in node.names]
        else:
            named = [module.split(".") for module in modules_of(node)]
            targets = [names[1] if len(names) > 1 else "__init__" for names in named if names[0] == "hf_clip"]
        for target in targets:
            if part in TOP or target == part:
                continue
            assert target in RANKS, ast.unparse(node)
            assert RANKS[target] > RANKS[part], ast.unparse(node)


def test_package_never_imports_the_programs_around_it():
    for path in PACKAGE.rglob("*.py"):
        for node in imports_of(path):
            for module in modules_of(node):
                assert module.split(".")[0] not in {
                    "benchmarks",
                    "conversion",
                    "demo",
                    "finetune",
                    "model_cards",
                    "tests",
                }, path


def run_python(code: str, **environment: str) -> str:
    done = run_warm(code, cwd=ROOT, environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_added(base: str) -> set[str]:
    """Top-level modules that `import hf_clip` adds to those of the import statement `base`."""
    code = f"import sys, json\n{base}\nbefore = set(sys.modules)\nimport hf_clip\n"
    added = json.loads(run_python(code + "print(json.dumps(sorted(set(sys.modules) - before)))"))
    return {name.split(".")[0] for name in added}


def test_import_is_light():
    added = modules_added("from transformers import PreTrainedModel, ProcessorMixin")
    assert "hf_clip" in added
    assert not added & {"accelerate", "datasets", "typer"}
    # The Auto classes are transformers' own, and in some versions bring scikit-learn where it is installed.
    added = modules_added("from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer")
    assert not added & {"sklearn", "scipy", "pandas", "matplotlib", "torchvision", "clip"}


def test_import_works_where_no_optional_package_is_installed():
    code = (
        "import sys, importlib.abc\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'accelerate', 'datasets', 'clip', 'sklearn', 'matplotlib', 'torchvision'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "def find_spec(name, package=None):\n"
        "    try: return real(name, package)\n"
        "    except ModuleNotFoundError: return None\n"
        "importlib.util.find_spec = find_spec\n"
        "import hf_clip, hf_clip.checkpoints.read, hf_clip.training.config\n"
        "model = hf_clip.HfClipModel(hf_clip.HfClipConfig(text_config={'num_hidden_layers': 1, 'vocab_size': 600,"
        " 'eos_token_id': 599, 'bos_token_id': 1, 'pad_token_id': 1}, vision_config={'num_hidden_layers': 1}))\n"
        "print('accelerate' in sys.modules, 'datasets' in sys.modules)"
    )
    assert run_python(code).split() == ["False", "False"]


def test_registration_can_run_twice():
    importlib.reload(hf_clip)


PROGRAMS = [f"conversion.{name}" for name in ("convert", "export_onnx", "parity", "publish")]
PROGRAMS += ["benchmarks", "benchmarks.gpu", "benchmarks.serve", "demo", "finetune", "model_cards"]

EXPLAIN = """
import contextlib, io, json, runpy, sys
explained = {}
for program in sys.argv[1:]:
    out, sys.argv = io.StringIO(), [program, "--help"]
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
            status = None
        except SystemExit as ended:
            status = ended.code
    explained[program] = [status, out.getvalue()]
print(json.dumps(explained))
"""


def test_programs_explain_themselves():
    """One after the other in one process: each imports for seconds what all of them need."""
    done = run_warm(EXPLAIN, *PROGRAMS, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    explained = json.loads(done.stdout)
    assert list(explained) == PROGRAMS
    for program, (status, text) in explained.items():
        assert not status, program
        assert "usage:" in text.lower(), program
        assert len(text.splitlines()) > 5, program


@pytest.mark.parametrize("flag", ["--captions", "--rounds"])
def test_benchmark_refuses_a_count_of_nothing(flag: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.__main__").main(["tokenizer", flag, "0"])
    assert f"argument {flag}: '0' is no whole number of at least 1" in capsys.readouterr().err


def test_demo_that_cannot_write_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert importlib.import_module("demo.__main__").main(["--output", str(tmp_path / "file")]) == 1
    assert "error: the demo writes into" in capsys.readouterr().err


def test_no_flag_is_of_type_bool():
    """`--flag False` would be true: flags are switches, or dataclass fields that transformers' parser understands."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "conversion").glob("*.py"), *(ROOT / "demo").glob("*.py")]:
        assert "type=bool" not in path.read_text()


def test_readme_table_names_the_nine_models():
    text = (ROOT / "README.md").read_text()
    for variant in hf_clip.VARIANTS.values():
        assert f"| {variant.name} |" in text
