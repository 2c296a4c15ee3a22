"""Tokenizers and other parts without weights are loaded when a folder is checked; an empty vocabulary is a fault."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from flcompress.errors import ModelError
from flcompress.models.folder import check_pipeline
from flcompress.models.parts import load_part, open_parts
from tests.fixtures.tiny import tiny_pipeline

WORDS = "a the red blue square ball moves left right up down slowly fast over ground"


@pytest.fixture(scope="session")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of a few words, as T5's: a padding token first, no token for the beginning."""
    from sentencepiece import SentencePieceTrainer

    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 4),
        model_writer=made,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spiece") / "spiece.model"
    path.write_bytes(made.getvalue())
    return path


@pytest.fixture
def pipeline(spiece: Path, tmp_path: Path) -> Path:
    """A pipeline whose tokenizer is T5's with a SentencePiece model alone, as CogVideoX and Mochi are released."""
    folder = tiny_pipeline(tmp_path / "model", layers=1)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    shutil.copy(spiece, folder / "tokenizer")
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 226, "legacy": True}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "T5Tokenizer"]}))
    return folder


def refused(pipeline: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_pipeline(pipeline)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sentencepiece_model_alone_is_read(pipeline: Path, spiece: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    check_pipeline(pipeline)
    words = load_part(pipeline / "tokenizer", ("transformers", "T5Tokenizer"))
    expected = SentencePieceProcessor(model_file=str(spiece))
    for text in ("a red ball", "the square moves slowly"):
        assert words(text).input_ids == [*expected.encode(text), 1]


def test_a_tokenizer_of_another_model_is_named(pipeline: Path) -> None:
    """Its tokens go past the embeddings of the text encoder, which has no more words than the benchmark."""
    parts = open_parts(pipeline)
    parts.encode_prompts(["a"], 16)
    with pytest.raises(ModelError, match=r"tokenizer: gives the token \d+ for a prompt, the text encoder knows 23; "):
        parts.encode_prompts(["a", "over ground"], 16)


def test_a_tokenizer_without_its_files_is_named(pipeline: Path) -> None:
    """Stock loading makes an empty vocabulary of it, and every word becomes unknown."""
    folder = pipeline / "tokenizer"
    path = folder / "spiece.model"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refused(pipeline).startswith(f"{path}: no whole SentencePiece model (")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 791656\n")
    assert refused(pipeline).startswith(f"{path}: no whole SentencePiece model (")
    path.unlink()
    assert refused(pipeline) == (
        f"{folder}: no vocabulary of a T5Tokenizer, which stock loading would replace by an empty one; expected "
        "spiece.model or tokenizer.json; copy the folder again"
    )
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    assert refused(pipeline).startswith(f"{folder}: no T5Tokenizer can be loaded from its files (")


@pytest.mark.parametrize("gone", ["vocab.json", "merges.txt"])
def test_half_a_vocabulary_is_named(pipeline: Path, gone: str) -> None:
    folder = pipeline / "tokenizer"
    shutil.rmtree(folder)
    folder.mkdir()
    tokens = ["<|startoftext|>", "<|endoftext|>", "a</w>", "r", "e", "d</w>", "re", "red</w>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "CLIPTokenizer"]}))
    check_pipeline(pipeline)
    (folder / gone).unlink()
    assert refused(pipeline).startswith(f"{folder}: no CLIPTokenizer can be loaded from its files (")


def test_an_image_processor_without_its_file_is_named(pipeline: Path) -> None:
    (pipeline / "image_processor").mkdir()
    index = json.loads((pipeline / "model_index.json").read_text())
    named = {"image_processor": ["transformers", "CLIPImageProcessor"]}
    (pipeline / "model_index.json").write_text(json.dumps(index | named))
    told = refused(pipeline)
    assert told.startswith(f"{pipeline / 'image_processor'}: no CLIPImageProcessor")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            ["own_code", "Tokenizer"],
            "tokenizer is of library 'own_code', expected diffusers or transformers; code of a",
        ),
        (["transformers", None], "tokenizer is a None, which this transformers does not have"),
        (["transformers", "NoSuchTokenizer"], "tokenizer is a NoSuchTokenizer, which this transformers does not have"),
    ],
)
def test_a_class_that_is_not_known_is_named(pipeline: Path, kind: list[str | None], message: str) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {"tokenizer": kind}))
    assert message in refused(pipeline)
