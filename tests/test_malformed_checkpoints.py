"""Malformed checkpoints are ValueErrors, whatever is wrong with them, and nothing has changed after one."""

import copy
import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import assert_same, same
from helpers.demo import metrics
from helpers.loops import Net, train
from helpers.malformed import malformed
from helpers.optimizers import VARIANTS

from fusedopt import AdamW, cli, demo
from fusedopt.demo.checkpoint import load_checkpoint
from fusedopt.demo.settings import CHECKPOINT

# An optimizer, more options, and the dtype of its parameters.
KINDS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    **{name: (name, {}, torch.float32) for name in VARIANTS},
    **{
        f"{name}-{option}": (name, {option: True}, torch.bfloat16)
        for name in ("AdamW", "Adafactor-lr-beta1", "Lion")
        for option in ("master_weights", "stochastic_rounding")
    },
    "AdamW-float16": ("AdamW", {"master_weights": True}, torch.float16),
    "AdamW-state_dtype": ("AdamW", {"state_dtype": torch.bfloat16}, torch.float32),
    "Lion-skip_outliers": ("Lion", {"skip_outliers": 3.0}, torch.float32),
    "AdamWeightDecay-measured": ("AdamWeightDecay-function", {"track_statistics": True}, torch.float32),
}

EACH = 50
"""Checkpoints of each kind: 1,050 together."""

QUICK = ("AdamW", "Adafactor-lr-beta1", "Lion-skip_outliers")


def made(kind: str) -> tuple[Net, Any]:
    name, options, dtype = KINDS[kind]
    model = Net().to(dtype)
    optimizer = VARIANTS[name](model, **options)
    train(model, optimizer, 2)
    return model, optimizer


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.filterwarnings("ignore")
def test_malformed_checkpoints_are_refused_or_can_be_gone_on_from(kind):
    model, optimizer = made(kind)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model)
    accepted = 0
    for seed in range(EACH):
        changes, checkpoint = malformed(saved, f"{kind} {seed}")
        groups, states = list(optimizer.param_groups), dict(optimizer.state)
        try:
            optimizer.load_state_dict(checkpoint)
        except ValueError:
            assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
            assert all(optimizer.state[p] is state for p, state in states.items())
            assert_same(optimizer.state_dict(), saved, f"{seed}: {changes}")
            assert_same(model, weights)
            continue
        except Exception as error:
            raise AssertionError(f"{seed}: {changes}: {type(error).__name__}: {error}") from error
        accepted += 1
        for (
            group
        ) in optimizer.param_groups:  # A schedule may have brought it below 0: loading takes it, a step does not.
            group["lr"] = None if group["lr"] is None else abs(group["lr"])
        train(model, optimizer, 3)
        optimizer.state_dict()
        model, optimizer = made(kind)
        assert_same(optimizer.state_dict(), saved)
    assert accepted < EACH // 3, "the changes should break most checkpoints"


# What malformed checkpoints have found, by name.


def _cycle() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


def _billions() -> list[Any]:
    """A few lists that a walk through them would take for 10^12 numbers."""
    inner: Any = 0.5
    for _ in range(12):
        inner = [inner] * 10
    return inner


FOUND = {
    "an option in itself": lambda saved: saved["param_groups"][0].update(betas=_cycle()),
    "an option of billions": lambda saved: saved["param_groups"][0].update(betas=_billions()),
    "an option of a terabyte": lambda saved: saved["param_groups"][0].update(
        lr=torch.ones(()).expand(1 << 20, 1 << 20)
    ),
    "betas of a terabyte": lambda saved: saved["param_groups"][0].update(betas=torch.ones(()).expand(1 << 40)),
    "a sparse option": lambda saved: saved["param_groups"][0].update(eps=torch.tensor(1.0).to_sparse()),
    "a sparse option that has no copy": lambda saved: saved["param_groups"][0].update(eps=torch.eye(3).to_sparse_csr()),
    "a key that is a list": lambda saved: saved["param_groups"][0]["params"].__setitem__(0, [0]),
    "a key that is True": lambda saved: saved["param_groups"][0]["params"].__setitem__(1, True),
    "a parameter twice": lambda saved: saved["param_groups"][0]["params"].__setitem__(1, 0),
    "a state that is a tensor": lambda saved: saved["state"].__setitem__(0, torch.ones(2, 3)),
    "a count in itself": lambda saved: saved["state"][0].update(step=_cycle()),
    "a count that is sparse": lambda saved: saved["state"][0].update(step=torch.tensor(1.0).to_sparse()),
    "a moment in itself": lambda saved: saved["state"][0].update(exp_avg=_cycle()),
    "a moment of billions": lambda saved: saved["state"][0].update(exp_avg=_billions()),
    "a moment without shape": lambda saved: saved["state"][0].update(exp_avg=torch.nn.UninitializedParameter()),
    "an array of objects": lambda saved: saved["state"][0].update(step=torch.tensor(0.5).numpy().astype(object)),
}


@pytest.mark.parametrize("change", FOUND.values(), ids=FOUND)
def test_a_change_that_was_another_error(change):
    _, optimizer = made("AdamW")
    saved = copy.deepcopy(optimizer.state_dict())
    changed = copy.deepcopy(saved)
    change(changed)
    with pytest.raises(ValueError, match=r"checkpoint|must be|must hold"):
        optimizer.load_state_dict(changed)
    assert_same(optimizer.state_dict(), saved)


def test_a_checkpoint_that_is_no_dict_is_refused_whatever_it_is():
    _, optimizer = made("AdamW")
    for whole in (None, [], 1, torch.ones(2).untyped_storage(), torch.ones(3), iter(())):
        with pytest.raises(ValueError, match="no optimizer's checkpoint"):
            optimizer.load_state_dict(whole)


def test_states_of_no_parameter_are_kept_and_do_not_hold_up_those_that_are_made_later():
    model = Net()
    optimizer = VARIANTS["AdamWeightDecay"](model)
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    del saved["state"][4]
    saved["state"]["notes"] = {"of": "the user"}
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    assert optimizer.state_dict()["state"]["notes"] == {"of": "the user"}


def test_a_decay_that_is_a_huge_whole_number_is_one_like_any_other():
    outcomes = []
    for decay in (2**80, float(2**80)):
        model = Net()
        optimizer = VARIANTS["Adafactor-lr-beta1"](model, weight_decay=decay)
        train(model, optimizer, 1)
        outcomes.append(model)
    assert_same(*outcomes)


# Files of the demo.


@pytest.fixture
def run(tiny, one_thread):
    demo.train(tiny)
    return tiny, Path(tiny.out) / CHECKPOINT


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_or_has_a_wrong_byte_is_refused(run):
    _, path = run
    content, whole = path.read_bytes(), load_checkpoint(path)
    chance = random.Random(0)
    damaged = [
        content[:size]
        for size in (0, 1, 3, 4, 30, 64, 1000, len(content) // 2, *range(len(content) - 30, len(content)))
    ]
    damaged += [content[: chance.randrange(len(content))] for _ in range(50)]
    for _ in range(300):
        at = chance.randrange(len(content))
        damaged.append(content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :])
    unnoticed = 0
    for one in damaged:
        path.write_bytes(one)
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            unnoticed += 1  # in a time, or in what aligns the parts
            assert same(loaded, whole)
    assert unnoticed < len(damaged) // 4


class _Command:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


def test_a_planted_command_does_not_run(run, tmp_path):
    _, path = run
    planted = tmp_path / "planted"
    whole = load_checkpoint(path)
    forms = {
        "a pickle": pickle.dumps(_Command(f"touch {planted}")),
        "a legacy file": _saved(_Command(f"touch {planted}"), _use_new_zipfile_serialization=False),
        "a file": _saved(_Command(f"touch {planted}")),
        "a setting": _saved({**whole, "settings": {**whole["settings"], "out": _Command(f"touch {planted}")}}),
    }
    for name, content in forms.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or no checkpoint"):
            load_checkpoint(path)
        assert not planted.exists(), name


def _saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


@pytest.mark.slow
def test_a_file_that_would_swell_is_refused(run):
    _, path = run
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/swells", bytes(1 << 28))
    assert path.stat().st_size < 1 << 21
    with pytest.raises(ValueError, match="it is compressed"):
        load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_demo_goes_on_from_a_changed_checkpoint_or_says_in_a_sentence_why_not(run, capsys):
    tiny, path = run
    whole = load_checkpoint(path)
    refused = tried = 0
    for seed in range(60):
        changes, checkpoint = malformed(whole, f"demo {seed}")
        try:
            content = _saved(checkpoint)
        except Exception:
            continue  # this one cannot be saved
        tried += 1
        path.write_bytes(content)
        before = metrics(tiny)
        code = cli.main(["demo", "--resume", "--out", tiny.out])
        said = capsys.readouterr().err
        assert code in (0, 2), f"{seed}: {changes}"
        if code == 2:
            refused += 1
            assert said.count("\n") == 1 and "Traceback" not in said, f"{seed}: {changes}: {said}"
            assert metrics(tiny) == before
    assert tried > 30 and refused > tried // 2


def test_a_checkpoint_of_other_values_is_not_taken_for_one_that_fits():
    """The number of a parameter, which is a key, may be a string in JSON, and nothing else."""
    _, optimizer = made("AdamW")
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = [float(index) for index in saved["param_groups"][0]["params"]]
    with pytest.raises(ValueError, match="expected its number or its name"):
        AdamW(Net().parameters()).load_state_dict(saved)
