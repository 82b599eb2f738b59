"""A checkpoint comes from outside: it loads exactly, or is refused in one line and runs nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from mess_compile.nets.checkpoint import load_candidate, load_state, save_candidate, set_aside
from mess_compile.network import HeadConfig
from mess_compile.runtime.base.errors import InputError
from tests.networks import random_network


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_candidate(random_network([(1, HeadConfig("fcn", 2, 1))]), tmp_path / "candidate")
    return tmp_path / "candidate"


def test_a_saved_network_loads_with_fp16_convolutions_and_exact_batchnorm(saved: Path) -> None:
    before, after = random_network([(1, HeadConfig("fcn", 2, 1))]).state_dict(), load_candidate(saved).state_dict()
    for key, value in before.items():
        if "num_batches" not in key:
            assert torch.equal(after[key], value.half().float() if value.ndim == 4 else value), key


def test_the_identity_follows_the_weights(saved: Path, tmp_path: Path) -> None:
    first = load_candidate(saved).candidate.identity
    save_candidate(random_network([(1, HeadConfig("fcn", 2, 1))], seed=1), tmp_path / "other")
    assert load_candidate(tmp_path / "other").candidate.identity != first
    save_candidate(load_candidate(saved), tmp_path / "again")
    assert load_candidate(tmp_path / "again").candidate.identity == first


def test_a_network_that_is_replaced_is_kept(saved: Path) -> None:
    """Hours of training may be in it."""
    identity = load_candidate(saved).candidate.identity
    first = set_aside(saved)
    save_candidate(random_network([(1, HeadConfig("fcn", 2, 1))], seed=1), saved)
    second = set_aside(saved)
    assert first is not None
    assert second is not None
    assert (first.name, second.name) == ("candidate-1", "candidate-2")
    assert load_candidate(first).candidate.identity == identity
    assert load_candidate(second).candidate.identity == load_candidate(saved).candidate.identity != identity
    assert set_aside(saved.with_name("nowhere")) is None
    (saved / "network.onnx").write_text("attached")  # export would take it before what is trained next
    third = set_aside(saved)
    assert third is not None
    assert (third / "network.onnx").read_text() == "attached"
    assert not (saved / "network.onnx").exists()


def test_a_missing_checkpoint_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mess-compile train"):
        load_candidate(tmp_path)


def test_damaged_weights_are_refused(saved: Path) -> None:
    weights = next(saved.glob("weights-*"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_candidate(saved)
    weights.unlink()
    with pytest.raises(InputError, match="does not exist"):
        load_candidate(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backbone", "vgg"),
        ("heads", ["exit1.unknown"]),
        ("input_hw", [64]),
        ("classes", None),
        ("weights", "../secret"),
        ("version", 99),
        ("format", "other"),
        ("heads", ["exit7.fcn-crm1-b0", "exit3.fcn-crm1-b0"]),
        ("heads", ["exit1.fcn-crm1-b0"]),
    ],
)
def test_an_edited_description_is_refused(saved: Path, key: str, value: object) -> None:
    path = saved / "network.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError):
        load_candidate(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", "wide", "width is 'wide', not a number"),
        ("input_hw", [0, 96], "input_hw is [0, 96], not two sides from 1 to 16384"),
        ("colours", [[1, 2]], "colours[0] has 2 entries, not 3"),
        ("heads", ["fcn"], "heads[0] is 'fcn', not a head such as exit2.fcn-crm1-b0"),
        ("weights", "../secret", "weights is '../secret', not the name of a file of weights"),
        ("ouput_stride", 8, "ouput_stride is not a known entry (did you mean 'output_stride'?)"),
    ],
)
def test_a_wrong_entry_is_named_with_its_value(saved: Path, key: str, value: object, message: str) -> None:
    path = saved / "network.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError) as refused:
        load_candidate(saved)
    assert str(refused.value).startswith(f"{path} is damaged ({message}): train a multi-exit network")


def test_another_architecture_is_named(saved: Path) -> None:
    path = saved / "network.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"heads": ["exit2.fcn-crm1-b0", "exit3.fcn-crm1-b0"]}))
    with pytest.raises(InputError, match=r"exit2/fcn-crm1-b0|exit1/fcn-crm2-b1"):
        load_candidate(saved)


def test_a_foreign_pth_that_would_run_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Touch:
        def __reduce__(self) -> object:
            return (Path.touch, (marker,))

    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    assert load_state(path)["a"].shape == (1,)
    path.write_bytes(pickle.dumps({"a": Touch()}))
    with pytest.raises(InputError, match=r"refused|cannot be read"):
        load_state(path)
    assert not marker.exists()


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="state dict"):
        load_state(path)
    (tmp_path / "weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be read"):
        load_state(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14212972\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "is not a file of weights, but an HTML page"),
        (b'{"message": "Not Found"}', "is not a file of weights, but a text"),
        (b"\0\1\2\3" * 99, "is not a file of weights .it begins with"),
        (b"", "is empty"),
    ],
)
def test_what_was_saved_instead_of_weights_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"weights\.pth .*{words}"):
        load_state(path)


def test_weights_that_were_cut_off_are_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(999)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"may be truncated .*copy or download it again"):
        load_state(path)


def test_a_checkpoint_says_which_of_its_entries_is_the_state(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "state_dict": {"a": torch.zeros(1)}}, path)
    with pytest.raises(InputError, match=r"its entry 'state_dict' is one, so save that alone: .*\['state_dict'\]"):
        load_state(path)
    torch.save({"module.a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"DataParallel model: save `model\.module.state_dict"):
        load_state(path)
