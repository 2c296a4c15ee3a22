from __future__ import annotations

from pathlib import Path

import pytest

from flcompress.data.captions import Captioned, read_captions, read_prompts, without_caption
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


EXPECTED = [Captioned("a.mp4", 'a "two", slowly'), Captioned("deep/b.MOV", "zwei - drei")]


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
    found = read_captions(written(tmp_path, name, text), videos)
    assert found == EXPECTED
    assert without_caption(videos, found) == ["c.webm"]


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
    with pytest.raises(DataError, match=r"c\.jsonl: not UTF-8 text; save it as UTF-8"):
        read_captions(tmp_path / "c.jsonl", videos)


def test_prompts_are_lines_each_once(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.txt", "one\n\n two \none\n")) == ["one", "two"]
    with pytest.raises(DataError, match=r"p\.txt: no prompts; expected one a line"):
        read_prompts(written(tmp_path, "p.txt", "\n"))
    with pytest.raises(DataError, match=r"c\.csv: \.csv given, expected \.txt .* captions of videos need --videos"):
        read_prompts(written(tmp_path, "c.csv", "file,caption\n"))
