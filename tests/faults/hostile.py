"""Files and arguments that nobody writes by accident: pickles, zip archives, YAML texts and overrides, by name.

A pickle that gets its way makes a file ``ran`` in the current folder.
"""

import io
import pickle
import zipfile
from collections.abc import Callable

DEEP = 100_000
_PROTOCOL = b"\x80\x02"
_LEGACY_HEAD = b"".join(
    pickle.dumps(value, 2)
    for value in (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    )
)
_TOUCH = b"X\x09\x00\x00\x00touch ran"
_OPEN = b"X\x10\x00\x00\x00open('ran', 'w')"
_STORAGE = b"ctorch\nFloatStorage\n"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _model(value: bytes) -> bytes:
    """The pickle of {"model": value}."""
    return _PROTOCOL + b"}" + _text("model") + value + b"s."


def _tensor(identity: bytes, rest: bytes = b"K\x00K\x04\x85K\x01\x85\x89}") -> bytes:
    """{"model": {"w": tensor}} of a storage by its persistent id; ``rest``: offset, size, stride, gradient, hooks."""
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n((" + identity + b"tQ" + rest + b"tR"
    return _model(b"}" + _text("w") + rebuilt + b"s")


def _identity(key: str = "0", kind: bytes = _STORAGE, count: bytes = b"K\x04", device: str = "cpu") -> bytes:
    return _text("storage") + kind + _text(key) + _text(device) + count


CODE: dict[str, bytes] = {
    "system": _PROTOCOL + b"cos\nsystem\n" + _TOUCH + b"\x85R.",
    "posix": _PROTOCOL + b"cposix\nsystem\n" + _TOUCH + b"\x85R.",
    "eval": _PROTOCOL + b"cbuiltins\neval\n" + _OPEN + b"\x85R.",
    "python2_eval": _PROTOCOL + b"c__builtin__\neval\n" + _OPEN + b"\x85R.",
    "under_model": _model(b"cos\nsystem\n" + _TOUCH + b"\x85R"),
    "as_key": _PROTOCOL + b"}cos\nsystem\n" + _TOUCH + b"\x85RK\x01s.",
    "nested_reduce": _PROTOCOL
    + b"cbuiltins\ngetattr\ncbuiltins\n__import__\nX\x02\x00\x00\x00os\x85RX\x06\x00\x00\x00system\x86R"
    + _TOUCH
    + b"\x85R.",
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + _TOUCH + b"\x85R.",
    "instance": b"(X\x09\x00\x00\x00touch ranios\nsystem\n.",
    "object": _PROTOCOL + b"(cos\nsystem\n" + _TOUCH + b"o.",
    "newobj": _PROTOCOL + b"csubprocess\nPopen\n" + _TOUCH + b"\x85\x81.",
    "attribute_of_torch": _PROTOCOL + b"ctorch.serialization\nos.system\n" + _TOUCH + b"\x85R.",
    "torch_load": _PROTOCOL + b"ctorch\nload\n" + _TOUCH + b"\x85R.",
    "extension": _PROTOCOL + b"\x82\x01" + _TOUCH + b"\x85R.",
    "odd_name": _PROTOCOL + b"c\x1b[2Jos\nsys\x07tem\n" + _TOUCH + b"\x85R.",
    "long_name": _PROTOCOL + b"c" + b"a." * 50_000 + b"a\nb\n" + _TOUCH + b"\x85R.",
}
"""Pickles that would run something."""

PICKLES: dict[str, bytes] = CODE | {
    "deep_tuple_as_key": _PROTOCOL + b"})" + b"\x85" * DEEP + b"K\x01s.",
    "deep_tuple_as_model_key": _model(b"})" + b"\x85" * DEEP + b"K\x01s"),
    "deeper_tuple_as_key": _PROTOCOL + b"})" + b"\x85" * 3_000_000 + b"K\x01s.",
    "deep_tuple": _PROTOCOL + b")" + b"\x85" * DEEP + b".",
    "deep_tuple_under_model": _model(b")" + b"\x85" * DEEP),
    "deep_lists": _PROTOCOL + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "deep_lists_under_model": _model(b"]" * DEEP + b"a" * (DEEP - 1)),
    "deep_dicts": _PROTOCOL + b"}" + _text("model") + (b"}" + _text("model")) * DEEP + b"}" + b"s" * (DEEP + 1) + b".",
    "deep_ordered": _PROTOCOL + b"ccollections\nOrderedDict\n" + b"]" * DEEP + b"a" * (DEEP - 1) + b"\x85R.",
    "long_number": _model(b"\x8a\xff" + b"\x7f" * 255),
    "huge_number": _model(b"\x8b\x40\x42\x0f\x00" + b"\x7f" * 1_000_000),
    "huge_number_as_key": _model(b"}\x8b\x40\x42\x0f\x00" + b"\x7f" * 1_000_000 + b"K\x01s"),
    "long_number_as_key": _model(b"}\x8a\xff" + b"\x7f" * 255 + b"K\x01s"),
    "number_claims_2_GB": _model(b"\x8b\xff\xff\xff\x7f"),
    "text_claims_4_GB": _model(b"X\xff\xff\xff\xff"),
    "bytes_claim_too_much": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b".",
    "list_of_itself": _PROTOCOL + b"]q\x00h\x00a.",
    "dict_of_itself": _PROTOCOL + b"}q\x00" + _text("model") + b"h\x00s.",
    "tuple_of_itself_as_key": _PROTOCOL + b"}q\x00h\x00\x85K\x01s.",
    "dict_of_itself_with_state": _PROTOCOL + b"}q\x00" + _text("model") + b"}" + _text("a") + b"h\x00ss.",
    "million_lists": _PROTOCOL + b"](" + b"]" * 10**6 + b"e.",
    "million_ordered": _model(b"](" + b"ccollections\nOrderedDict\n)R" * 50_000 + b"e"),
    "laughs": _model(b"]q\x00" + b"".join(b"](h\x00h\x00eq\x00" for _ in range(64))),
    "laughs_as_key": _model(b"})q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(64)) + b"K\x01s"),
    "unhashable_key": _model(b"}]K\x01s"),
    "empty_stack": _PROTOCOL + b"a.",
    "missing_memo": _PROTOCOL + b"h\x07.",
    "no_stop": _PROTOCOL + b"}" * 100,
    "unknown_opcode": _PROTOCOL + b"\xff.",
    "protocol_200": b"\x80\xc8}.",
    "control_characters": _model(b"}" + _text("\x1b[2J\nerror: all is well\r") + b"K\x01s"),
    "long_key": _model(b"}" + _text("k" * 100_000) + b"K\x01s"),
    "thousand_keys": _model(
        b"}(" + b"".join(_text("k" * 300 + str(number)) + b"K\x01" for number in range(1000)) + b"u"
    ),
    "surrogate_key": _model(b"}X\x03\x00\x00\x00\xed\xa0\x80K\x01s"),
    "none": _PROTOCOL + b"N.",
    "number": _PROTOCOL + b"K\x05.",
    "storage_text": _PROTOCOL + b"X\x01\x00\x00\x00aQ.",
    "storage_number": _PROTOCOL + b"K\x05Q.",
    "storage_empty": _PROTOCOL + b")Q.",
    "storage_of_another_kind": _tensor(_text("module") + b"K\x01K\x02"),
    "storage_of_no_type": _tensor(_identity(kind=_text("x"))),
    "storage_missing": _tensor(_identity("77")),
    "storage_elsewhere": _tensor(_identity("../../../etc/passwd")),
    "storage_nul": _tensor(_identity("0\0")),
    "storage_count_negative": _tensor(_identity(count=b"J\xff\xff\xff\xff")),
    "storage_count_huge": _tensor(_identity(count=b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x40")),
    "storage_count_too_long": _tensor(_identity(count=b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x40")),
    "storage_count_text": _tensor(_identity(count=_text("4"))),
    "storage_device": _tensor(_identity(device="nowhere:9")),
    "tensor_too_large": _tensor(_identity(), b"K\x00\x8a\x05\x00\x00\x00\x00\x10\x85K\x01\x85\x89}"),
    "tensor_offset": _tensor(_identity(), b"\x8a\x05\x00\x00\x00\x00\x10K\x04\x85K\x01\x85\x89}"),
    "tensor_offset_negative": _tensor(_identity(), b"J\xf0\xff\xff\xffK\x04\x85K\x01\x85\x89}"),
    "tensor_size_negative": _tensor(_identity(), b"K\x00J\xf0\xff\xff\xff\x85K\x01\x85\x89}"),
    "tensor_stride_negative": _tensor(_identity(), b"K\x00K\x04\x85J\xff\xff\xff\xff\x85\x89}"),
    "tensor_stride_huge": _tensor(_identity(), b"K\x00K\x04\x85\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85\x89}"),
    "tensor_strides_missing": _tensor(_identity(), b"K\x00K\x04\x85)\x89}"),
    "tensor_size_text": _tensor(_identity(), b"K\x00" + _text("4") + b"K\x01\x85\x89}"),
    "tensor_many_dimensions": _tensor(_identity(), b"K\x00(" + b"K\x01" * 9000 + b"t(" + b"K\x01" * 9000 + b"t\x89}"),
    "tensor_of_no_storage": _tensor(b"", b"NNN"),
    "shadowed_methods": _model(
        b"ccollections\nOrderedDict\n)R}("
        + b"".join(_text(name) + b"K\x01" for name in ("keys", "items", "get"))
        + b"ub"
    ),
    "ignored_objects": _model(b"cargparse\nNamespace\n)R}b"),
    "ignored_object_as_key": _model(b"}cargparse\nNamespace\n)RK\x01s"),
    "ignored_class": _model(b"cargparse\nNamespace\n"),
    "parameter_of_nothing": _model(b"}" + _text("w") + b"ctorch._utils\n_rebuild_parameter\n(K\x01\x89}tRs"),
    "sparse_of_nothing": _model(b"}" + _text("w") + b"ctorch._utils\n_rebuild_sparse_tensor\n(K\x01NtRs"),
}
"""Pickles by name."""


def legacy(data: bytes) -> bytes:
    """As torch wrote it before zip archives."""
    return _LEGACY_HEAD + data + pickle.dumps([], 2)


def archive(data: bytes, **further: bytes) -> bytes:
    """As torch writes it now, with a storage of four numbers."""
    return zipped(("archive/data.pkl", data), *_FRAME)


def zipped(*members: tuple[str, bytes], deflated: bool = False) -> bytes:
    """A zip archive of the members as they come, names used twice included."""
    kind = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", kind, compresslevel=1) as opened:
            for name, data in members:
                opened.writestr(zipfile.ZipInfo(name), data, kind)
        return file.getvalue()


_FRAME = (("archive/version", b"3\n"), ("archive/byteorder", b"little"), ("archive/data/0", bytes(16)))
_PLAIN = _tensor(_identity())


def _claims(data: bytes, size: int) -> bytes:
    """The archive ``data`` with another uncompressed size in every entry of its directory."""
    changed, start = bytearray(data), 0
    while (start := changed.find(b"PK\x01\x02", start)) >= 0:
        changed[start + 24 : start + 28] = size.to_bytes(4, "little")
        start += 4
    return bytes(changed)


def _wrong_checksum(name: str) -> bytes:
    data = zipped(("archive/data.pkl", _PLAIN), *_FRAME, (name, b"MARK" * 40))
    return data.replace(b"MARK", b"mark", 1)


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "bomb": lambda: zipped(("archive/data.pkl", _PLAIN), *_FRAME, ("archive/bomb", bytes(300 << 20)), deflated=True),
    "bomb_as_pickle": lambda: zipped(("archive/data.pkl", bytes(300 << 20)), *_FRAME, deflated=True),
    "claims_2_GB": lambda: _claims(archive(_PLAIN), 2 << 30),
    "claims_2_GB_deflated": lambda: _claims(zipped(("archive/data.pkl", _PLAIN), *_FRAME, deflated=True), 2 << 30),
    "claims_nothing": lambda: _claims(archive(_PLAIN), 0),
    "deflated": lambda: zipped(("archive/data.pkl", _PLAIN), *_FRAME, deflated=True),
    "outside": lambda: zipped(("archive/data.pkl", _PLAIN), *_FRAME, ("../ran", b"x"), ("/tmp/ran", b"x")),
    "outside_pickle": lambda: zipped(("../data.pkl", _PLAIN), *_FRAME),
    "twice_code_first": lambda: zipped(("archive/data.pkl", CODE["system"]), ("archive/data.pkl", _PLAIN), *_FRAME),
    "twice_code_last": lambda: zipped(("archive/data.pkl", _PLAIN), ("archive/data.pkl", CODE["system"]), *_FRAME),
    "two_folders": lambda: zipped(("archive/data.pkl", _PLAIN), *_FRAME, ("b/data.pkl", CODE["eval"])),
    "torchscript": lambda: zipped(("archive/data.pkl", _PLAIN), *_FRAME, ("archive/constants.pkl", CODE["system"])),
    "bad_version": lambda: zipped(("archive/data.pkl", _PLAIN), ("archive/version", b"9" * 5000)),
    "bad_byteorder": lambda: zipped(("archive/data.pkl", _PLAIN), _FRAME[0], ("archive/byteorder", b"\xff\n\x1b")),
    "storage_too_short": lambda: zipped(("archive/data.pkl", _PLAIN), *_FRAME[:2], ("archive/data/0", b"1")),
    "empty": lambda: zipped(),
    "no_checkpoint": lambda: zipped(("\x1b[2J\nerror: x" * 300, b"x"), ("b" * 5000, b"")),
    "wrong_checksum_odd_name": lambda: _wrong_checksum("archive/\x1b[2J\nall is well"),
    "wrong_checksum_long_name": lambda: _wrong_checksum("archive/" + "b" * 5000),
    "many_members": lambda: zipped(("archive/data.pkl", _PLAIN), *_FRAME, *((f"m{n}", b"") for n in range(20_000))),
}
"""Zip archives by name."""

_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40))
_MAPS = "a0: &a0 {x: 1}\n" + "".join(f"a{n + 1}: &a{n + 1} {{x: *a{n}, y: *a{n}}}\n" for n in range(40))

VALUES: dict[str, str] = {
    "laughs": "[&a [x, x], &b [*a, *a], &c [*b, *b], &d [*c, *c]]",
    "alias_of_itself": "&a [*a]",
    "alias_of_itself_in_map": "&a {name: *a}",
    "anchor": "&a 5",
    "unknown_alias": "*nowhere",
    "deep_lists": "[" * DEEP + "]" * DEEP,
    "lists_900": "[" * 900 + "]" * 900,
    "lists_100": "[" * 100 + "]" * 100,
    "deep_maps": "{a: " * 3000 + "1" + "}" * 3000,
    "unclosed": "[" * DEEP,
    "beyond_float": "1e400",
    "minus_beyond_float": "-1e400",
    "beyond_int64": "9223372036854775808",
    "digits_5000": "9" * 5000,
    "digits_4300": "9" * 4300,
    "hex_20000": "0x" + "f" * 20_000,
    "octal": "0" + "7" * 9000,
    "binary": "0b" + "1" * 50_000,
    "sexagesimal": "1" + ":59" * 3000,
    "sexagesimal_float": "1" + ":59" * 3000 + ".5",
    "underscores": "1" + "_" * 5000 + "0",
    "exponent_huge": "1e" + "9" * 5000,
    "fraction_long": "0." + "1" * 100_000,
    "nan": ".nan",
    "infinite": "-.inf",
    "python_object": "!!python/object/apply:os.system ['touch ran']",
    "python_new": "!!python/object/new:os.system ['touch ran']",
    "python_name": "!!python/name:os.system",
    "python_tuple": "!!python/tuple [1, 2]",
    "unknown_tag": "!thing {a: 1}",
    "long_tag": "!" + "t" * 5000 + " 1",
    "binary_tag": "!!binary not=base64",
    "binary_value": "!!binary aGVsbG8=",
    "set": "!!set {a, b}",
    "ordered": "!!omap [a: 1]",
    "ordered_wrong": "!!omap [1]",
    "pairs": "!!pairs [a: 1]",
    "int_tag": "!!int x",
    "float_tag": "!!float x",
    "bool_tag": "!!bool x",
    "timestamp_tag": "!!timestamp x",
    "null_tag": "!!null x",
    "str_tag_on_list": "!!str [1]",
    "map_tag_on_text": "!!map x",
    "date": "2001-99-99",
    "date_time": "2001-12-14t21:59:43.10-99:00",
    "control": '"\\e[2J\\nerror: x\\r\\0"',
    "surrogate": '"\\ud800"',
    "escape_too_large": '"\\UFFFFFFFF"',
    "bad_escape": '"\\xZZ"',
    "line_separator": '"\\L\\P\\N"',
    "text_2_MB": "x" * 2_000_000,
    "quoted_2_MB": '"' + "x " * 1_000_000 + '"',
    "list_200000": "[" + "1," * 200_000 + "]",
    "many_keys": "{" + ", ".join(f"k{number}: 1" for number in range(5000)) + "}",
    "duplicate_keys": "{a: 1, a: 2}",
    "merge": "{<<: {a: 1}}",
    "merge_of_itself": "&a {<<: *a}",
    "list_as_key": "{[1, 2]: 3}",
    "map_as_key": "{{a: 1}: 3}",
    "question": "? a",
    "null_key": "{null: 1}",
    "value_key": "{=: 1}",
    "equals": "=",
    "tab": "\t5",
    "several_documents": "1\n---\n2",
    "directive": "%YAML 9.9\n---\n1",
    "empty": "",
    "comment": "# nothing",
    "colon": "a: b: c",
    "dash": "- - - - -",
    "block": "|999\n  x",
    "byte_order_mark": "\ufeff5",
}
"""YAML of a single value, by name: after ``key=`` on the command line, and after ``key: `` in a file."""

TEXTS: dict[str, bytes] = {
    "laughs": _LAUGHS.encode(),
    "laughs_in_maps": _MAPS.encode(),
    "laughs_in_imports": (_LAUGHS + "imports: *a40\n").encode(),
    "laughs_in_student": (_MAPS + "student: *a40\n").encode(),
    "laughs_in_base": (_LAUGHS + "base: *a40\n").encode(),
    "duplicate_section": b"student: {name: tiny_net}\nstudent: {name: tiny_net}\n",
    "dots_1200": b"student.name" + b".x" * 1200 + b": 1\n",
    "key_2_MB": b"k" * 2_000_000 + b": 1\n",
    "explicit_key_2_MB": b"? " + b"k" * 2_000_000 + b"\n: 1\n",
    "keys_5000": b"".join(b"k%d: 1\n" % number for number in range(5000)),
    "tabs": b"student:\n\tname: tiny_net\n",
    "nul": b"student: {name: tiny_net}\0\n",
    "not_utf8": b"student: {name: \xff\xfe}\n",
    "utf16": "student: {name: tiny_net}\n".encode("utf-16"),
    "byte_order_mark": b"\xef\xbb\xbfstudent: {name: tiny_net}\n",
    "bare_surrogate": b"student: \xed\xa0\x80\n",
    "escape": b"\x1b[2J: 1\n",
    "indents": b"".join(b" " * depth + b"a:\n" for depth in range(2000)),
    "dashes": b"- " * 20_000 + b"\n",
    "documents": b"---\n" * 1000,
    "tag_directive": b"%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nx: !os.system ['touch ran']\n",
    "python_object": b"!!python/object/apply:os.system ['touch ran']\n",
    "base_of_itself": b"base: kd.yaml\n",
    "base_device": b"base: /dev/zero\n",
    "base_folder": b"base: .\n",
    "base_nul": b'base: "a\\0b"\n',
    "base_long": b"base: " + b"x" * 5000 + b"\n",
    "base_pickle": b"base: teacher.pt\n",
    "bases_10000": b"base: [" + b"nowhere.yaml, " * 10_000 + b"]\n",
    "imports_odd": b'imports: ["", ".", "..", "a b", "os.system", "\\0"]\n',
    "imports_list_in_list": b"imports: [[os]]\n",
    "imports_missing_long": b"imports: " + b"x" * 5000 + b"\n",
    "number_keys": b"1: 2\n3.5: 4\nnull: 5\ntrue: 6\n",
    "spaces_2_MB": b" " * 2_000_000,
    "lines_500000": b"\n" * 500_000 + b"student: {name: [}\n",
    "comment_2_MB": b"# " + b"x" * 2_000_000 + b"\n",
}
"""Whole YAML files by name."""

JSON: dict[str, bytes] = {
    "deep_lists": b"[" * DEEP + b"]" * DEEP + b"\n",
    "deep_maps": b'{"sessions": ' * DEEP + b"1" + b"}" * DEEP + b"\n",
    "digits_5000": b'{"sessions": [], "epoch": ' + b"9" * 5000 + b"}\n",
    "epoch_beyond_float": b'{"sessions": [], "epoch": 1, "loss": 1' + b"0" * 400 + b"}\n",
    "epoch_text": b'{"sessions": "x", "epoch": "1"}\n',
    "not_utf8": b'{"sessions": "\xff"}\n',
    "surrogate": b'{"sessions": ["\\ud800"], "epoch": 1, "\\ud800": 1}\n',
    "null": b"null\n",
    "list_of_numbers": b"[1, 2]\n",
    "list_of_pairs": b'[["sessions", [1]], ["epoch", 1]]\n',
    "byte_order_mark": b'\xef\xbb\xbf{"epoch": 1}\n',
    "lines_1000000": b"{}\n" * 1_000_000,
}
"""Text of JSON files by name."""

OVERRIDES: dict[str, str] = {
    "no_equals": "x",
    "empty": "",
    "equals": "=",
    "no_key": "=5",
    "dots_1200": "student" + ".x" * 1200 + "=1",
    "only_dots": "...=1",
    "long_key": "k" * 100_000 + "=1",
    "long_section_key": "student." + "k" * 100_000 + "=1",
    "surrogate_key": "student.\udc80=1",
    "surrogate_value": "student.name=\udc80",
    "surrogate_section": "\udc80=1",
    "control_key": "student.\x1b[2J\n=1",
    "escape_value": "student.name=\x1b[2J",
    "newline_value": "student.name=a\nb",
    "into_a_value": "solver.lr.x.y=1",
    "into_a_list": "solver.milestones.0=1",
    "whole_section": "solver=5",
    "section_to_null": "student=null",
    "base": "base=kd.yaml",
    "imports": "imports=[nowhere]",
    "imports_map": "imports={a: 1}",
    "imports_number": "imports=5",
    "dunder": "student.__class__=x",
    "keyword": "student.self=x",
    "positional": "student.num_classes=5",
    "root_argument": "data.root=/etc",
    "download_argument": "data.download=true",
    "variant_outside": "variant=../../outside",
    "variant_absolute": "variant=/tmp/ran",
    "variant_long": "variant=" + "v" * 300,
    "variant_control": 'variant="\\e[2J"',
    "network_of_another": "student={name: wrn_16_1, width: 5}",
    "batch_huge": "data.batch_size=100000000000000000000",
    "batch_max": "data.batch_size=9223372036854775807",
    "eval_batch_huge": "data.eval_batch_size=100000000000000000000",
    "holdout_all": "data.holdout=100",
    "holdout_huge": "data.holdout=100000000000000000000",
    "seed_huge": "seed=9223372036854775808",
    "seed_true": "seed=true",
    "milestones_huge": "solver.milestones=[100000000000000000000]",
    "milestones_many": "solver.milestones=[" + ",".join(map(str, range(1, 20_000))) + "]",
    "lr_tiny": "solver.lr=1e-320",
    "momentum_huge": "solver.momentum=1e308",
    "weight_decay_huge": "solver.weight_decay=1e308",
    "temperature_tiny": "distiller.temperature=1e-320",
    "temperature_huge": "distiller.temperature=1e308",
    "checkpoint_empty": "teacher.checkpoint=",
    "checkpoint_blank": "teacher.checkpoint=''",
    "checkpoint_nul": 'teacher.checkpoint="a\\0b"',
    "checkpoint_long": "teacher.checkpoint=" + "x/" * 3000,
    "checkpoint_long_name": "teacher.checkpoint=" + "x" * 400,
    "checkpoint_device": "teacher.checkpoint=/dev/null",
    "checkpoint_surrogate": "teacher.checkpoint=\udc80",
    "checkpoint_text": "teacher.checkpoint=kd.yaml",
    "ensemble_empty_members": "teacher.ensemble=[{}, null, 5]",
    "ensemble_map": "teacher.ensemble={a: 1}",
    "ensemble_many": "teacher.ensemble=[" + "{name: tiny_net, checkpoint: nowhere}, " * 2000 + "]",
    "expected_top1_wrong": "teacher.expected_top1=99",
}
"""Arguments by name."""
