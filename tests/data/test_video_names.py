"""Names of videos as people and programs write them."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from flcompress.data.captions import name_remarks, read_captions, videos_without_caption
from flcompress.data.planning import plan_clips
from flcompress.data.sizes import Target
from flcompress.data.video_names import VideoFolder
from flcompress.driver.clips import fingerprint
from flcompress.errors import DataError
from flcompress.models.latent_size import Grid

CAFE = unicodedata.normalize("NFD", "café.mp4")
NAMES = ["a.mp4", "deep/b.MOV", CAFE, "100%.mp4", "my clip.mp4", "back\\slash.mp4", "Straße.mp4"]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "videos"


def written(folder: Path, *names: str) -> Path:
    import json

    path = folder.parent / "c.jsonl"
    rows = [json.dumps({"file": name, "caption": f"caption {number}"}) for number, name in enumerate(names)]
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((name, name) for name in NAMES),
        ("./a.mp4", "a.mp4"),
        ("deep//b.MOV", "deep/b.MOV"),
        ("deep/../a.mp4", "a.mp4"),
        ("deep\\b.MOV", "deep/b.MOV"),
        (".\\a.mp4", "a.mp4"),
        ("A.MP4", "a.mp4"),
        ("Deep/b.mov", "deep/b.MOV"),
        ("STRASSE.mp4", "Straße.mp4"),
        (unicodedata.normalize("NFC", CAFE), CAFE),
        (unicodedata.normalize("NFC", CAFE).upper(), CAFE),
        ("my%20clip.mp4", "my clip.mp4"),
        ("caf%C3%A9.mp4", CAFE),
        ("100%25.mp4", "100%.mp4"),
    ],
)
def test_a_name_means_the_file_that_it_can_only_mean(videos: Path, name: str, file: str) -> None:
    (clip,) = read_captions(written(videos, name), videos)
    assert (clip.file, clip.written) == (file, None if name == file else name)
    assert sorted(videos_without_caption(videos, [clip])) == sorted(set(NAMES) - {file})


def test_an_absolute_path_into_the_folder(videos: Path) -> None:
    assert VideoFolder(videos).find(str(videos / "deep" / "b.MOV")) == "deep/b.MOV"


def test_a_name_that_could_mean_several_files_means_none(videos: Path) -> None:
    (videos / "A.mp4").write_bytes(b"")
    if len(list(videos.glob("[aA].mp4"))) == 1:
        pytest.skip("this disk does not tell capitals from small letters")
    assert VideoFolder(videos).find("A.mp4") == "A.mp4"
    with pytest.raises(DataError, match=r"a\.MP4: no such video, but A\.mp4 and a\.mp4 are; name one of them"):
        VideoFolder(videos).find("a.MP4")


def test_one_video_has_one_caption_however_it_is_named(videos: Path) -> None:
    for names, message in (
        (("a.mp4", "a.mp4"), "a.mp4 is named twice; a video has one caption"),
        (("a.mp4", "./a.mp4"), "./a.mp4 is named twice, as a.mp4 in line 1; a video has one caption"),
        (("A.MP4", "a.mp4"), "a.mp4 is named twice, as A.MP4 in line 1; a video has one caption"),
    ):
        path = written(videos, *names)
        with pytest.raises(DataError) as refused:
            read_captions(path, videos)
        assert str(refused.value) == f"{path}:2: {message}"


def test_links_are_videos_of_their_own_and_are_told(videos: Path, tmp_path: Path) -> None:
    (videos / "link.mp4").symlink_to(videos / "a.mp4")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.mp4").write_bytes(b"")
    (videos / "folder").symlink_to(tmp_path / "elsewhere")
    captioned = read_captions(written(videos, "a.mp4", "link.mp4", "folder/far.mp4", "./100%.mp4"), videos)
    assert [clip.file for clip in captioned] == ["a.mp4", "link.mp4", "folder/far.mp4", "100%.mp4"]
    assert name_remarks(videos, captioned) == [
        "1 names are written otherwise than the files'; the first: ./100%.mp4 is 100%.mp4",
        "1 videos are links to others that have a caption too; the first: link.mp4 is a.mp4",
    ]
    (clip,) = read_captions(written(videos, unicodedata.normalize("NFC", CAFE)), videos)
    assert name_remarks(videos, [clip])[0].endswith(r"the first: 'caf\xe9.mp4' is 'cafe\u0301.mp4'")


def test_names_that_are_no_text(videos: Path) -> None:
    """A disk of Linux holds bytes; such a file is left out, and listed in valid text."""
    name = os.fsdecode(b"caf\xe9.mp4")
    try:
        (videos / name).write_bytes(b"")
    except OSError:
        pytest.skip("this disk takes UTF-8 only")
    captions = written(videos, "a.mp4")
    uncaptioned = videos_without_caption(videos, read_captions(captions, videos))
    assert name in uncaptioned
    plan = plan_clips([], {}, uncaptioned, Target(), Grid(over_time=4, over_space=8))
    assert r"caf\udce9.mp4" in [video.file for video in plan.skipped]
    assert fingerprint({"videos": {"folder": str(videos), "captions": str(captions)}})


def test_a_change_behind_a_link_is_a_change(videos: Path, tmp_path: Path) -> None:
    captions = written(videos, "folder/far.mp4")
    spec = {"videos": {"folder": str(videos), "captions": str(captions)}}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.mp4").write_bytes(b"one")
    (tmp_path / "elsewhere" / "back").symlink_to(videos)
    without = fingerprint(spec)
    (videos / "folder").symlink_to(tmp_path / "elsewhere")
    before = fingerprint(spec)
    (tmp_path / "elsewhere" / "far.mp4").write_bytes(b"another")
    assert len({str(digest) for digest in (without, before, fingerprint(spec))}) == 3
