"""The machine that reads pickles: what it knows, and that no small file makes it work, allocate or talk for long."""

import ast
import io
import pickle
import pickletools
import struct
from pathlib import Path

import pytest
import torch

import hf_clip
from hf_clip.checkpoints.archive import read_checkpoint
from hf_clip.checkpoints.errors import CheckpointError
from hf_clip.checkpoints.pickle_machine import MOST_OPCODES, OPERATIONS, OpcodeBudget, PickleMachine
from hf_clip.checkpoints.stored_values import GLOBALS

from .hand_made import archive_of, word

LONGEST_MESSAGE = 1000

KNOWN = {
    *("PROTO", "FRAME", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "MARK", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
}


def run(pickled: bytes) -> object:
    return PickleMachine(pickled, "data.pkl", OpcodeBudget()).run()


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert len(message) - len(str(path)) < LONGEST_MESSAGE
    assert message.isprintable()
    return message


def test_only_the_opcodes_of_checkpoints_are_known():
    names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    assert {names[code] for code in OPERATIONS} | {"STOP"} == KNOWN


@pytest.mark.parametrize("opcode", [o for o in pickletools.opcodes if o.name not in KNOWN], ids=lambda o: o.name)
def test_any_other_opcode_is_refused(opcode: pickletools.OpcodeInfo):
    pickled = b"\x80\x02)NK\x01(" + opcode.code.encode("latin-1") + b"\x010\n0\n" + b"\0" * 8 + b"."
    with pytest.raises(CheckpointError, match=f"the opcode 0x{ord(opcode.code):02x}"):
        run(pickled)


def test_the_names_that_are_known():
    """Whoever adds one says here why a real file needs it."""
    storages = {name for module, name in GLOBALS if module == "torch" and name.endswith("Storage")}
    assert len(storages) == 10
    assert {f"{module}.{name}" for module, name in GLOBALS} - {f"torch.{name}" for name in storages} == {
        "collections.OrderedDict",  # state dicts
        "torch.Size",  # in training checkpoints
        "torch._utils._rebuild_tensor",  # torch.save before 0.4
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.jit._pickle.restore_type_tag",  # attributes of script modules
        "torch.jit._pickle.build_intlist",
        "torch.jit._pickle.build_tensorlist",
        "torch.jit._pickle.build_doublelist",
        "torch.jit._pickle.build_boollist",
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_those_that_were_pickled(protocol: int):
    values = [
        None,
        True,
        False,
        0,
        -1,
        255,
        65535,
        -(2**31),
        2**62,
        2**100,
        0.5,
        "a",
        "ä🐱",
        (),
        (1,),
        (1, 2, 3, 4),
        [[]],
    ]
    assert run(pickle.dumps([*values, values, "a" * 300], protocol)) == [*values, values, "a" * 300]


NESTED = word("lol") + b"\x85q\x00"
for _index in range(40):  # a tuple of itself twice, forty times: 2 ** 40 words when it is printed, hashed or compared
    NESTED += b"h" + bytes([_index]) + b"\x86q" + bytes([_index + 1])
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = b"ctorch\nFloatStorage\n"
STORAGE = b"(" + word("storage") + FLOATS + word("0") + word("cpu") + b"K\x04tQ"
HOOKS = b"\x89ccollections\nOrderedDict\n)R"


@pytest.mark.parametrize(
    "pickled",
    {
        "duplicated": b"}" + word("lol") + b"\x85" + b"2\x86" * 40 + b"K\x01s",
        "as a persistent id": b"(" + NESTED + b"NNNNtQ",
        "as a whole persistent id": NESTED + b"Q",
        "as a storage's key": b"(" + word("storage") + FLOATS + NESTED + word("cpu") + b"K\x04tQ",
        "as a key": b"}" + NESTED + b"K\x01s",
        "as a key twice": b"}(" + NESTED + b"K\x01h\x28K\x02u",
        "as an argument": TENSOR + NESTED + b"R",
        "as a size": TENSOR + b"(" + STORAGE + b"K\x00" + NESTED + b")" + HOOKS + b"tR",
        "as a hook": TENSOR + b"(" + STORAGE + b"K\x00)))" + NESTED + b"tR",
        "as a function": NESTED + b")R",
        "as a class": NESTED + b")\x81",
        "as a state": b"c__torch__.x\nY\n)\x81" + NESTED + b"b",
        "as a name": NESTED + word("x") + b"\x93",
        "as the whole": NESTED,
        "as a state dict": b"}" + word("state_dict") + NESTED + b"s",
        "as a tensor's name": b"}" + NESTED + TENSOR + b"(" + STORAGE + b"K\x00))" + HOOKS + b"tRs",
    }.items(),
    ids=lambda item: item[0],
)
def test_tuples_that_share_themselves_are_refused_at_once(tmp_path: Path, pickled: tuple[str, bytes]):
    refusal(archive_of(tmp_path / "file.pt", b"\x80\x02" + pickled[1] + b"."))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (
            TENSOR + b"(" + STORAGE + b"K\x00" + word("a") + b"\x8a\x05\0\0\0\0\x02\x86)" + HOOKS + b"tR",
            "as many counts",
        ),
        (TENSOR + b"(" + STORAGE + b"K\x00\x88\x85K\x01\x85" + HOOKS + b"tR", "as many counts"),
        (TENSOR + b"(" + STORAGE + b"K\x00K\x04\x85K\x01\x85\x89}" + word("a") + b"K\x01stR", "hooks or metadata"),
        (TENSOR + b"(NK\x00K\x04\x85K\x01\x85" + HOOKS + b"tR", "without a storage"),
        (TENSOR + b")R", "a tensor with 0 arguments"),
        (TENSOR + b"(" + STORAGE + b"K\x00K\x04\x85K\x01\x85" + HOOKS + b"tR}b", "a state for a StoredTensor"),
        (STORAGE + b"}b", "a state for a Storage"),
        (b"}}b", "a state for a Table"),
        (b"c__torch__.x\nY\n)\x81}b}b", "a state for a Record"),
        (b"c__torch__.x\nY\n)R", "a ScriptClass in a wrong place"),
        (b"c__torch__.x\nY\nK\x01\x85\x81", "a script class with arguments"),
        (FLOATS + b")\x81", "a StorageType in a wrong place"),
        (b"ctorch\nSize\n" + word("a") + b"\x85R", "a torch.Size of no counts"),
        (b"ctorch.jit._pickle\nbuild_intlist\nN\x85R", "a typed list of no list"),
        (b"ctorch.jit._pickle\nrestore_type_tag\n]K\x01\x86R", "a type tag on something else"),
        (b"ccollections\nOrderedDict\n]\x85R", "an OrderedDict with arguments"),
        (b"]" + word("a") + b"K\x01s", "a list in a wrong place"),
        (b"}K\x01a", "a Table in a wrong place"),
        (b"}(K\x01u", "a key without a value"),
        (b"Nr\xff\xff\xff\x0f", "a memo index of 268435455"),
        (b"Nq\x01", "a memo index of 1"),
        (b"h\x00", "a memo index of 0"),
        (b"\x8a\xff" + b"\xff" * 255, "an integer of 255 bytes"),
        (b"\x80\x09N", "protocol 9"),
        (b"NN", "values are left over"),
        (b"t", "a mark is missing"),
        (b"(((((", "a value is missing"),
        (b"N(a", "a value is missing"),
        (b"X\x01\0\0\0\xff", "a text that is no UTF-8"),
        (b"c" + b"a" * 1000 + b"\nb\n", "a name without an end"),
        (b"X\xff\xff\xff\xffa", "its archive/data.pkl ends early"),
        (b"\x8c\x05posix\x8c\x05mkdir\x93", "asks for posix.mkdir"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_in_wrong_places_are_refused(tmp_path: Path, pickled: bytes, message: str):
    assert message in refusal(archive_of(tmp_path / "file.pt", b"\x80\x02" + pickled + b"."))


def test_storage_of_two_dtypes_is_refused(tmp_path: Path):
    halves = STORAGE.replace(b"Float", b"Half").replace(b"K\x04tQ", b"K\x08tQ")
    pickled = b"\x80\x02" + STORAGE + halves + b"\x86."
    assert "its storage 0 is of two dtypes or sizes" in refusal(archive_of(tmp_path / "file.pt", pickled))


def test_key_that_comes_twice_is_refused(tmp_path: Path):
    pickled = b"\x80\x02}(" + word("a") + b"N" + word("a") + b"Nu."
    assert "it has two values for a" in refusal(archive_of(tmp_path / "file.pt", pickled))


def test_opcodes_are_counted_over_all_pickles_of_a_file(tmp_path: Path):
    archive_of(tmp_path / "file.pt", b"\x80\x02" + b"N" * MOST_OPCODES + b".")
    assert f"its pickles have more than {MOST_OPCODES} opcodes" in refusal(tmp_path / "file.pt")
    half = b"\x80\x02" + b"N" * 10 + b"."
    budget = OpcodeBudget(20)
    with pytest.raises(CheckpointError, match="left over"):
        PickleMachine(half, "a", budget).run()
    with pytest.raises(CheckpointError, match="more than 20 opcodes"):
        PickleMachine(half, "b", budget).run()


def test_names_of_any_length_are_shown_in_short(tmp_path: Path):
    long, tensor = "x" * 1_000_000, TENSOR + b"(" + STORAGE + b"K\x00K\x04\x85K\x01\x85" + HOOKS + b"tR"
    files = {
        "key": b"}" + word(long) + b"K\x01s",
        "control characters": b"}" + word("\x1b\n" * 500_000) + b"K\x01s",
        "tensor": b"}" + word(long) + tensor + b"s",
        "name": word(long) + word(long) + b"\x93",
        "storage": tensor.replace(word("0"), word(long)),
        "module": b"c__torch__.x\nY\n)\x81}" + word(long) + tensor + b"sb",
        "twice": b"}(" + word(long) + b"N" + word(long) + b"Nu",
    }
    for name, pickled in files.items():
        refusal(archive_of(tmp_path / f"{name}.pt", b"\x80\x02" + pickled + b".", {"0": b"\0" * 16}))


def test_modules_within_modules_are_named_as_far_as_names_go(tmp_path: Path):
    depth = 300
    opening = b"c__torch__.x\nY\n)\x81}" + word("ab")
    pickled = b"\x80\x02" + opening * depth + b"N" + b"sb" * depth + b"."
    assert "names a tensor or module ab.ab." in refusal(archive_of(tmp_path / "file.pt", pickled))


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path):
    tensor = TENSOR + b"(" + STORAGE + b"K\x00K\x04\x85K\x01\x85" + HOOKS + b"tR"
    pickled = b"\x80\x02}(" + word("first") + tensor + b"q\x00"
    pickled += b"".join(word(str(n)) + b"h\x00" for n in range(20_000)) + b"u."
    assert "it has 20001 tensors" in refusal(archive_of(tmp_path / "file.pt", pickled, {"0": b"\0" * 16}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data + b"x", "1 bytes follow its last storage"),
        (lambda data: data[:-1], "it lacks elements of its storage"),
        (lambda data: data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"), "big-endian machine"),
        (lambda data: data.replace(b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", b"N"), "that torch.save didn't write"),
        (lambda data: pickle.dumps({"a": 1}, 2), "that torch.save didn't write"),
        (lambda data: data[:-24] + struct.pack("<q", 5) + data[-16:], "it lacks elements of its storage"),
    ],
    ids=["longer", "shorter", "big-endian", "magic", "pickle", "count"],
)
def test_damaged_file_of_before_1_6_is_one_line(tmp_path: Path, change, message: str):
    out = io.BytesIO()
    torch.save({"a": torch.ones(4)}, out, _use_new_zipfile_serialization=False)
    changed = change(out.getvalue())
    assert changed != out.getvalue()
    (tmp_path / "file.pt").write_bytes(changed)
    assert message in refusal(tmp_path / "file.pt")


UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def test_nothing_else_of_the_package_unpickles():
    """Files go through the machine, or through `torch.load` with its own list of what is allowed."""
    root = Path(hf_clip.__file__).parent
    for path in [*root.rglob("*.py"), *(root.parent / "conversion").rglob("*.py"), root.parent / "finetune.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported += [f"{node.module}.{alias.name}" for alias in node.names]
            found = {name for name in imported if name.split(".")[0] in UNPICKLERS}
            assert found <= {"pickle.UnpicklingError"}, path  # an error to be caught
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert arguments.get("weights_only") == "True" or "torch" not in ast.unparse(node.func), path
                assert arguments.get("allow_pickle", "False") == "False", path
