"""The journal: what was computed is never computed again, and nothing that is damaged is believed."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from onp.config import AgentConfig, EnvConfig, TriggerRecoveryConfig, UnlearnConfig
from onp.data import DefenceData
from onp.journal import Journal, Values
from onp.purification import MethodResult, Purification, PurifyConfig


def values(number: int) -> Values:
    return {"a": torch.arange(3.0) + number, "b": torch.tensor(number, dtype=torch.int64)}


def never() -> Values:
    raise AssertionError("computed again")


def same(one: Values, other: Values) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def fill(path: Path, count: int = 3) -> list[int]:
    """Write `count` records; returns the size of the file behind each."""
    journal, sizes = Journal(path, "subject"), []
    for number in range(count):
        journal.recall(f"name {number}", lambda number=number: values(number))  # type: ignore[misc]
        sizes.append(path.stat().st_size)
    return sizes


def test_what_was_computed_is_answered_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal"
    fill(path)
    journal = Journal(path, "subject")
    for number in (2, 0, 1):  # in any order
        assert same(journal.recall(f"name {number}", never), values(number))
    assert same(journal.recall("name 3", lambda: values(3)), values(3))
    assert same(Journal(path, "subject").recall("name 3", never), values(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-45, 0.1])
def test_numbers_come_back_bit_for_bit(tmp_path: Path, value: float) -> None:
    tensor = torch.tensor(value)
    Journal(tmp_path / "j").recall("x", lambda: {"x": tensor})
    found = Journal(tmp_path / "j").recall("x", never)["x"]
    assert found.shape == () and found.numpy().tobytes() == tensor.numpy().tobytes()


def test_seconds_of_what_is_answered_are_told(tmp_path: Path) -> None:
    fill(tmp_path / "j")
    journal = Journal(tmp_path / "j", "subject")
    assert journal.seconds == 0
    journal.recall("name 0", never)
    assert journal.seconds > 0


def test_without_a_path_nothing_is_kept() -> None:
    journal, calls = Journal(), []
    for _ in range(2):
        journal.recall("name", lambda: calls.append(1) or values(0))  # type: ignore[func-returns-value]
    assert len(calls) == 2


def test_a_torn_record_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "j"
    sizes, content = fill(path), path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        journal = Journal(path, "subject")
        whole = sum(size <= length for size in sizes)
        assert path.stat().st_size == ([0, *sizes][whole])
        for number in range(whole):
            assert same(journal.recall(f"name {number}", never), values(number))
    journal.recall("name 2", lambda: values(2))
    assert same(Journal(path, "subject").recall("name 2", never), values(2))


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "j"
    sizes, content = fill(path), path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        Journal(path, "subject")
        assert path.stat().st_size == max([0, *(size for size in sizes if size <= place)]), place


def test_the_journal_of_another_subject_is_dropped(tmp_path: Path) -> None:
    fill(tmp_path / "j")
    journal = Journal(tmp_path / "j", "another")
    assert (tmp_path / "j").stat().st_size == 0
    assert same(journal.recall("name 0", lambda: values(7)), values(7))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is not here")
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "j").symlink_to("/dev/full")
    journal = Journal()
    journal.path = tmp_path / "j"
    with pytest.raises(OSError) as caught:
        journal.recall("name", lambda: values(0))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "j")


# --- a method that is killed anywhere in between ----------------------------------------------------------------


@pytest.fixture(scope="module")
def purification() -> Callable[[Path | None], Purification]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval()
    data = DefenceData(torch.rand(18, 3, 8, 8), torch.arange(18) % 3, 3)
    env = EnvConfig(max_steps=4, unlearn=UnlearnConfig(max_epochs=1), recovery=TriggerRecoveryConfig(steps=3))
    config = PurifyConfig(budget=50, always=True, env=env, agent=AgentConfig(n_envs=2, n_steps=8, batch_size=8))
    return lambda folder: Purification(network, data, config, journal_dir=folder)


class Killed(Exception):
    """Stands for `kill -9`: what is in the file is all that is left."""


def dying(monkeypatch: pytest.MonkeyPatch, records: int) -> None:
    """From now on a journal dies in the middle of writing a record, after so many whole ones."""
    append, written = Journal._append, [0]

    def torn(self: Journal, path: Path, record: bytes) -> None:
        if written[0] == records:
            append(self, path, record[: len(record) // 2])
            raise Killed
        written[0] += 1
        append(self, path, record)

    monkeypatch.setattr(Journal, "_append", torn)


def outcome(result: MethodResult) -> dict[str, Tensor | object]:
    assert result.mask is not None
    weights = result.agent.policy.state_dict() if result.agent is not None else {}
    return {
        "mask": result.mask.keep.tolist(),
        "order": result.mask.order,
        "evaluations": result.reward_evaluations,
        "curve": result.curve,
        "policy": {name: value.numpy().tobytes() for name, value in weights.items()},
    }


@pytest.mark.parametrize("method", ["random", "ranked", "greedy", "onp"])
def test_a_killed_method_goes_on_and_ends_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    purification: Callable[[Path | None], Purification],
    method: str,
) -> None:
    """Killed at four moments one after the other, and resumed each time; compared with a run without a journal."""
    expected = purification(None).run(method)
    for records in (0, 2, 9, 21):
        with monkeypatch.context() as patch:
            dying(patch, records)
            with pytest.raises(Killed):
                purification(tmp_path).run(method)
    assert outcome(purification(tmp_path).run(method)) == outcome(expected)
    with monkeypatch.context() as patch:  # and now there is nothing left to compute
        dying(patch, 0)
        assert outcome(purification(tmp_path).run(method)) == outcome(expected)


@pytest.mark.parametrize("method", ["rnp", "random", "ranked", "greedy", "onp"])
def test_what_one_budget_computed_is_there_for_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    purification: Callable[[Path | None], Purification],
    method: str,
) -> None:
    whole = purification(None)
    smaller = replace(whole.config, budget=16)
    Purification(whole.model, whole.data, smaller, journal_dir=tmp_path).run(method)
    records, append = list[bytes](), Journal._append
    with monkeypatch.context() as patch:
        patch.setattr(
            Journal, "_append", lambda self, path, record: records.append(record) or append(self, path, record)
        )
        result = purification(tmp_path).run(method)
    assert outcome(result) == outcome(whole.run(method))
    if method != "greedy":  # which looks at more per step where the budget is larger
        assert len(records) <= (0 if method == "rnp" else 50 - 16 + 2)


def test_the_subject_is_all_that_scores_depend_on(purification: Callable[[Path | None], Purification]) -> None:
    one = purification(None)
    assert one.subject == purification(None).subject

    def of(model: nn.Module | None = None, data: DefenceData | None = None, **changes: object) -> str:
        config = replace(one.config, **changes)  # type: ignore[arg-type]
        return Purification(model or one.model, data or one.data, config).subject

    assert of(finalists=3) == one.subject, "the choice among scores changes no score"

    class ReLU(nn.ReLU):
        """Prints like PyTorch's."""

        def forward(self, input: Tensor) -> Tensor:
            return input.tanh()

    rewritten = copy.deepcopy(one.model)
    rewritten[2] = ReLU()  # type: ignore[index,operator]
    assert str(rewritten) == str(one.model)
    changed = copy.deepcopy(one.model)
    changed.get_parameter("0.weight").data[1, 2, 0, 1] *= 1.0001
    images = one.data.images.clone()
    images[3, 1, 2, 2] *= 0.999
    others = [
        of(changed),
        of(rewritten),
        of(data=replace(one.data, images=images)),
        of(data=replace(one.data, labels=one.data.labels.flip(0))),
        of(seed=1),
        of(env=replace(one.config.env, max_steps=5)),
    ]
    assert len({one.subject, *others}) == 7
