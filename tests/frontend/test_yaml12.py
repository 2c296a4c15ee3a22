from __future__ import annotations

import pytest

from flcompress.errors import RecipeError
from flcompress.frontend.yaml12 import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1E3", 1000.0),
        ("-2", -2),
        ("010", 10),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("'1e-5'", "1e-5"),
        ("[1, 2.0, a]", [1, 2.0, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("7: x", {"7": "x"}),
    ],
)
def test_values_follow_yaml_1_2(text: str, value: object) -> None:
    data = parse_yaml(text, "x").data
    assert data == value
    assert type(data) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "x:3: a: given twice, first at x:1; remove one"),
        ("a:\n  b: {c: 1, c: 2}\n", "x:2: a.b.c: given twice, first at x:2; remove one"),
        ("a: &b 1\nc: *b\n", "x:1: anchors and aliases are not read; write the value out"),
        (
            "a: !!python/name:os.system\n",
            "x:1: a: tag tag:yaml.org,2002:python/name:os.system is not read; leave it out",
        ),
        ("a: !mine {}\n", "x:1: a: tag !mine is not read; leave it out"),
        ("a: .nan\n", "x:1: a: .nan given, expected a finite number"),
        ("a:\n  - 1\n  - -.inf\n", "x:3: a[1]: -.inf given, expected a finite number"),
        ("a: 1e999\n", "x:1: a: 1e999 given, expected a finite number"),
        ("? [1]\n: 2\n", "x:1: a list or mapping as a key, expected a name"),
        ("a: [1\n", "x:2: cannot be read as YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n b: 2\n", "x:2: cannot be read as YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "x:2: cannot be read as YAML: but found another document"),
    ],
)
def test_what_is_not_read(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "x", lines=True)
    assert str(caught.value) == message


def test_every_key_knows_its_line() -> None:
    located = parse_yaml("a: 1\nb:\n  - c: 2\n  - d:\n      e: 3\n", "x", lines=True)
    assert located.where(("b", 1, "d", "e")) == "x:5: b[1].d.e"
    assert located.where(("b", 0, "missing")) == "x:3: b[0].missing"
    assert located.where(()) == "x"
