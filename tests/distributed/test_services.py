"""What a trainer offers to plugins, by value, on two processes."""

from __future__ import annotations

import pytest

from pa_core.errors import TrainingStateError
from tests.distributed import services
from tests.distributed.launch import flat, outcome_of
from tests.distributed.run import new_trainer
from tests.distributed.services import Saves

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("services")


@pytest.fixture(scope="module")
def one(folder):
    return outcome_of(folder / "one", "services.py")


@pytest.fixture(scope="module")
def two(one, folder):
    return outcome_of(folder / "two", "services.py", 2)


@pytest.fixture(scope="module")
def two_folder(two, folder):
    return folder / "two"


def test_collectives_give_every_process_the_same(two):
    assert two["ranks"] == [0, 1]
    assert two["sum"] == [[[3.0, 30.0], [1.0, 10.0]], [[3.0, 30.0], [2.0, 20.0]]]
    assert two["largest"] == [[1, 0], [1, 0]]
    assert two["whole"]
    whole, number, strided = [[0, 0], [0, 0]], 10.0, [[0.0, 2.0], [1.0, 3.0]]
    assert two["broadcast"] == [[whole, number, strided]] * 2


def test_settings_that_differ_between_processes_are_an_error_on_all(two):
    same, *others = two["settings"]
    assert same == [[], []]
    expected = [
        ["[tool.pa-core.train] differs between processes: {'num_epochs': 1} on rank 0 and {'num_"],
        [
            "[tool.pa-core.trainer] differs between processes: not set on rank 0 and {'seed': 7}",
            "the seed differs between processes: 42 on rank 0 and 7 on rank 1",
        ],
        ["PA_CORE_PLUGINS differs between processes: ['overfit'] on rank 0 and ['-overfit'] on r"],
        ["the seed differs between processes: 0 on rank 0 and 1 on rank 1"],
    ]
    for (first, second), starts in zip(others, expected, strict=True):
        assert first == second
        assert sorted(problem[:80] for problem in first[:-1]) == [one[:80] for one in starts]
        assert first[-1].startswith("Give every process the same settings file")


def test_arguments_that_differ_between_processes_are_an_error_on_all(two):
    expected = [
        "num_epochs differs between processes: 1 on rank 0 and 2 on rank 1.",
        "gradient_accumulation_steps differs between processes: 2 on rank 0 and 1 on rank 1.",
        "train_dataloader_kwargs['shuffle'] differs between processes: False on rank 0 and True ",
        "create_scheduler_fn differs between processes: [{'function': 'StepLR', 'step_size': 1, ",
        "lr of the optimizer's group 0 differs between processes: 0.1 on rank 0 and 0.2 on rank ",
    ]
    for (first, second), start in zip(two["arguments"], expected, strict=True):
        assert first == second
        assert first.startswith(start)
        assert "Call train() with the same arguments on every process" in first


def test_an_action_that_fails_on_one_process_raises_on_all(one, two):
    assert one["results"] == two["results"] == 5
    assert one["failures"] == []
    own, other = two["failures"][1], two["failures"][0]
    assert own == "ZeroDivisionError: on rank 1"
    assert other.startswith("OtherProcessError: Another process has failed")


def test_each_process_gets_its_batches_once_more_padding_included(one, two):
    for outcome in (one, two):
        for data in ("batches", "ready"):
            assert outcome[data]["again"] == outcome[data]["seen"]
    assert two["batches"]["num_batches"] == two["ready"]["num_batches"] == [2, 2]
    for data in ("batches", "ready"):
        padding = [[is_padding for is_padding, _ in rank] for rank in two[data]["seen"]]
        assert padding == [[False, False], [False, True]]


def test_a_trial_trains_on_all_processes_or_on_each_alone(one, two):
    assert two["trials"]["together"] == [[2, 2], [2, 2]]
    assert flat(two["trials"]["weights"]) == pytest.approx(flat(one["trials"]["weights"]), abs=1e-6)
    assert two["trials"]["alone"] == [[1, 0, "trained", 4, True], [1, 0, "failed", 2, True]]


def values_of(metric, told):
    return [value for name, value in told if name == metric]


def test_a_metric_of_the_main_process_decides_on_every_process(one, two):
    (alone,) = one["watched"]
    told, updates, reason, best = alone[0]
    assert values_of("fid", told) == [9.0, 1.0, 2.0]
    assert (updates, best) == (12, 1.0)
    assert "fid has not improved on 1.0" in reason
    assert two["watched"][0] == two["watched"][1]
    (again, updates_of_two, reason_of_two, best_of_two), weights = two["watched"][0]
    assert [updates_of_two, reason_of_two, best_of_two] == [updates, reason, best]
    for metric in ("fid", "intermediate_eval_loss"):
        assert values_of(metric, again) == pytest.approx(values_of(metric, told), abs=2e-6)
    assert flat(weights) == pytest.approx(flat(alone[1]), abs=1e-6)


def test_a_watched_metric_that_the_main_process_does_not_record_raises_on_all(two):
    assert two["unwatched"][0] == two["unwatched"][1]
    assert "'fid', which was recorded on rank 1 and not on the main process" in two["unwatched"][0]


def test_the_best_model_is_loaded_on_processes_with_other_working_directories(one, two):
    assert (one["best_elsewhere"], two["best_elsewhere"]) == ([True], [True, True])


def line(first, total):
    return pytest.approx([0.1 * (1 - n / total) for n in range(first, total)])


def test_a_run_that_resumes_on_another_number_of_processes_has_the_schedule_of_its_length(
    one, two, folder
):
    """An epoch has 8 updates on one process, and 4 on two with the same batch size each."""
    assert one["rates"] == line(0, 16)
    assert two["rates"] == line(0, 8)
    assert two["resumed_rates"] == line(8, 12)
    resumed = services.rates(folder / "again", 1, folder / "two" / "lengths" / "epoch_0001")
    assert resumed == line(4, 12)


def test_data_that_have_become_shorter_on_every_process_are_cut_and_reported(one, two):
    assert one["cut"] == [[5 + 3, 40 + 20, 1]]
    assert two["cut"] == [[5 + 3, 40 + 20, 1]] * 2


def test_data_that_have_become_shorter_on_one_process_are_refused_on_every(two):
    for rank, (message, samples) in enumerate(zip(two["uneven"], (40, 20), strict=True)):
        assert f"has {samples} samples on process {rank}, and more or fewer on others" in message


def test_data_that_decide_their_own_order_resume_exactly_on_each_process(one, two):
    for outcome, processes in ((one, 1), (two, 2)):
        for kind in ("Counts", "Saves", "persistent"):
            assert outcome["resumed"][kind] == [True] * processes, kind
    assert one["resumed"]["refused"] == [""]
    first, last = two["resumed"]["refused"]
    assert "Saves (DataLoader) doesn't yield the batches" in last
    assert "is as before on this process, and differs on another" in first


@pytest.mark.usefixtures("two")
def test_states_of_data_that_differ_between_processes_need_as_many(two_folder):
    trainer = new_trainer()
    with pytest.raises(
        TrainingStateError,
        match="Saves .* saved a state of each of 2 processes, which can't be restored on 1",
    ):
        trainer.train(Saves(), 3, per_device_batch_size=8, resume_from=two_folder / "Saves")
