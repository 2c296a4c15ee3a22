from __future__ import annotations

import json
from pathlib import Path

import pytest

from flcompress.data.captions import CaptionedVideo, read_captions, read_prompts, videos_without_caption
from flcompress.errors import DataError


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.mp4", "deep/b.MOV", "c.webm", "notes.txt"):
        (folder / name).write_bytes(b"")
    return folder


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


EXPECTED = [CaptionedVideo("a.mp4", 'a "two", slowly'), CaptionedVideo("deep/b.MOV", "zwei - drei")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.jsonl", '{"file": "a.mp4", "caption": "a \\"two\\", slowly"}\n\n'
                    '{"caption": "zwei - drei", "file": "deep/b.MOV"}\n'),
        ("c.csv", '\ufefffile,caption\na.mp4,"a ""two"", slowly"\ndeep/b.MOV,zwei - drei\n'),
        ("c.csv", 'caption,file\n"a ""two"", slowly",a.mp4\nzwei - drei,deep/b.MOV\n'),
    ],
)  # fmt: skip
def test_both_formats_say_the_same(tmp_path: Path, videos: Path, name: str, text: str) -> None:
    captioned = read_captions(written(tmp_path, name, text), videos)
    assert captioned == EXPECTED
    assert videos_without_caption(videos, captioned) == ["c.webm"]


LINE = 'expected {"file": "clip.mp4", "caption": "..."}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", "", "{path}: no clips; expected at least one line"),
        ("c.jsonl", "not json", "{path}:1: 'not json' given, " + LINE),
        ("c.jsonl", '{"file": "a.mp4"}', '{path}:1: {"file": "a.mp4"} given, ' + LINE),
        ("c.jsonl", '["a.mp4", "x"]', '{path}:1: ["a.mp4", "x"] given, ' + LINE),
        ("c.jsonl", '{"file": "a.mp4", "caption": 3}', '{path}:1: {"file": "a.mp4", "caption": 3} given, ' + LINE),
        ("c.jsonl", '\n{"file": "a.mp4", "caption": "x", "fps": 8}',
         "{path}:2: column 'fps' given, expected only file and caption; remove the others"),
        ("c.jsonl", '{"file": "no.mp4", "caption": "x"}',
         "{path}:1: {videos}/no.mp4: no such video; put it there or remove the line"),
        ("c.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file": "a.mp4", "caption": "y"}',
         "{path}:2: a.mp4 is named twice; a video has one caption"),
        ("c.csv", "video,text\na.mp4,x\n", "{path}:1: header 'video,text' given, expected file,caption"),
        ("c.csv", "file,caption\na.mp4\n", '{path}:2: {"file": "a.mp4"} given, ' + LINE),
        ("c.csv", "file,caption\na.mp4,x,y\n", 
         "{path}:2: 3 columns given, expected file,caption; quote a caption with commas"),
        ("c.txt", "a prompt", "{path}: .txt given, expected .jsonl or .csv with file and caption; "
         "a .txt holds prompts only, without --videos"),
        ("c", "", "{path}: no suffix given, expected .jsonl or .csv with file and caption"),
    ],
)  # fmt: skip
def test_wrong_captions_are_refused_in_one_line(
    tmp_path: Path, videos: Path, name: str, text: str, message: str
) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(DataError) as refused:
        read_captions(path, videos)
    assert str(refused.value) == message.replace("{path}", str(path)).replace("{videos}", str(videos))


def test_what_is_not_there_is_named(tmp_path: Path, videos: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder; expected a folder of videos"):
        read_captions(tmp_path / "c.jsonl", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"c\.jsonl: no such captions file; expected \.jsonl, \.csv or \.txt"):
        read_captions(tmp_path / "c.jsonl", videos)
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe{")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(
        DataError, match=r"d\.jsonl: cannot be read \(Is a directory\); expected \.jsonl, \.csv or \.txt"
    ):
        read_captions(tmp_path / "d.jsonl", videos)
    with pytest.raises(DataError, match=r"c\.jsonl:1: UTF-16; save it as UTF-8"):
        read_captions(tmp_path / "c.jsonl", videos)


SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
"""What Python's str.splitlines takes for the end of a line."""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_only(tmp_path: Path, videos: Path, end: str) -> None:
    texts = [f"a red{sign}ball" for sign in SEPARATORS]
    prompts = tmp_path / "p.txt"
    prompts.write_bytes(end.join([*texts, ""]).encode())
    assert read_prompts(prompts) == texts
    whole = "".join(sign for sign in SEPARATORS if sign >= " ")  # JSON wants the others as escapes
    rows = [{"file": "a.mp4", "caption": f"a red{whole}ball"}, {"file": "c.webm", "caption": SEPARATORS + "x"}]
    captions = tmp_path / "c.jsonl"
    captions.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert [clip.caption for clip in read_captions(captions, videos)] == [row["caption"] for row in rows]
    table = tmp_path / "c.csv"
    table.write_bytes(f'file,caption{end}a.mp4,"a red{SEPARATORS}ball"{end}c.webm,"two\nlines"{end}'.encode())
    assert [clip.caption for clip in read_captions(table, videos)] == [f"a red{SEPARATORS}ball", "two\nlines"]


@pytest.mark.parametrize("name", ["p.txt", "c.jsonl"])
def test_a_carriage_return_alone_is_no_end_of_a_line(tmp_path: Path, videos: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"file": "a.mp4", "caption": "x"}\n\n{"file": "c.webm",\r "caption": "x"}\n')
    with pytest.raises(DataError) as refused:
        read_prompts(path) if path.suffix == ".txt" else read_captions(path, videos)
    assert str(refused.value) == f"{path}:3: a carriage return within the line; end lines with a newline"


FIRST = b'{"file": "a.mp4", "caption": "x"}\n'
LONG = b'"' + b"x" * 140_000 + b'"'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.jsonl", b'{"file": "c.webm", "caption": "ball \\ud83d"}',
         "caption: half of a sign (\\ud83d), of two that belong together; write both"),
        ("c.jsonl", b'{"file": "c\\udc00.webm", "caption": "x"}', "file: half of a sign (\\udc00)"),
        ("c.jsonl", b'{"file": "c.webm", "caption": "caf\xe9"}', "not UTF-8 (byte 0xe9); save it as UTF-8"),
        ("c.csv", b"file,caption\nc.webm,caf\xe9", "not UTF-8 (byte 0xe9); save it as UTF-8"),
        ("c.jsonl", b'{"file": "c.webm", "caption": "a\\u0000b"}', "caption: a NUL character; remove it"),
        ("c.jsonl", b'{"file": "c.webm\\u0000", "caption": "b"}', "file: a NUL character; remove it"),
        ("c.jsonl", b'{"file": "c.webm", "caption": "a\0b"}', "a NUL character, as UTF-16 has them"),
        ("c.jsonl", b'{"file": "c.webm", "caption": ' + b"9" * 5000 + b"}", "'{\"file\": \"c.webm\", \"caption\": 99"),
        ("c.jsonl", b"[" * 100_000, "'[[[["),
        ("c.jsonl", b'{"file": "c.webm", "caption": NaN}', '{"file": "c.webm", "caption": NaN} given, expected {'),
        ("c.jsonl", b'{"file": 7, "caption": "x"}', '{"file": 7, "caption": "x"} given, expected {"file"'),
        ("c.jsonl", b'{"file": "c.webm", "caption": "x", "caption": "y"}', "'caption' given twice; remove one of them"),
        ("c.jsonl", b'{"file": "c.webm", "caption": ""}', "caption: empty; write one, or remove the line"),
        ("c.jsonl", b'{"file": "c.webm", "caption": " \\n"}', "caption: empty; write one, or remove the line"),
        ("c.jsonl", b'{"file": "", "caption": "x"}', "file: empty; write one, or remove the line"),
        ("c.jsonl", b'{"file": "deep", "caption": "x"}', "{videos}/deep: no such video"),
        ("c.jsonl", b'{"file": "' + b"x" * 5000 + b'", "caption": "x"}', "{videos}/xxx"),
        ("c.jsonl", b'{"file": "../c.jsonl", "caption": "x"}', "{videos}/../c.jsonl: outside of {videos}; "),
        ("c.jsonl", b'{"file": "/etc/passwd", "caption": "x"}', "/etc/passwd: outside of {videos}; put it there"),
        ("c.jsonl", b'{"file": "two\\nlines.mp4", "caption": "x"}', "{videos}/two\\nlines.mp4: no such video"),
        ("c.csv", b'file,caption\nc.webm,"a cat\na.mp4,a dog\n', "unexpected end of data; close every quote"),
        ("c.csv", b'file,caption\nc.webm,"a cat" and\n', "',' expected after '\"'; close every quote"),
        ("c.csv", b"file,caption\nc.webm," + LONG + b"\n", "field larger than field limit (131072); close every quote"),
        ("c.csv", b"file,caption\nc.webm,a\0b\n", "a NUL character, as UTF-16 has them"),
        ("c.csv", b"file,caption\nc.webm,\n", "caption: empty; write one, or remove the line"),
    ],
)  # fmt: skip
def test_whatever_is_wrong_is_told_with_its_line(
    tmp_path: Path, videos: Path, name: str, data: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data if path.suffix == ".csv" else FIRST + data)
    with pytest.raises(DataError) as refused:
        read_captions(path, videos)
    error_text = str(refused.value)
    assert error_text.startswith(f"{path}:2: {message}".replace("{videos}", str(videos)))
    assert "\n" not in error_text
    error_text.encode()


def test_prompts_that_no_tokenizer_takes(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    for data, message in (
        (b"one\ntw\0o\n", "2: a NUL character"),
        (b"one\n\xed\xa0\xbd\n", "2: not UTF-8 (byte 0xed)"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError) as refused:
            read_prompts(path)
        assert str(refused.value).startswith(f"{path}:{message}")
    path.write_bytes("one\n".encode("utf-16-be"))
    with pytest.raises(DataError, match=r"p\.txt:1: a NUL character, as UTF-16 has them; save it as UTF-8 without$"):
        read_prompts(path)


def test_prompts_are_lines_each_once(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.txt", "one\n\n two \none\n")) == ["one", "two"]
    with pytest.raises(DataError, match=r"p\.txt: no prompts; expected one a line"):
        read_prompts(written(tmp_path, "p.txt", "\n"))
    with pytest.raises(DataError, match=r"c\.csv: \.csv given, expected \.txt .* captions of videos need --videos"):
        read_prompts(written(tmp_path, "c.csv", "file,caption\n"))
