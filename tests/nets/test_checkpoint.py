"""A checkpoint comes from outside: it loads exactly, or is refused in one line and runs nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from mess_compile.candidates import HeadConfig
from mess_compile.nets.checkpoint import load_candidate, load_state, save_candidate, set_aside
from mess_compile.runtime.errors import InputError
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
