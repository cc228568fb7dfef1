from pathlib import Path

from pa_core.control import TrainerControl


def test_nothing_is_asked_for_at_first():
    control = TrainerControl()
    assert control.is_idle
    assert control.stop_reason is None
    assert control.save_requests == []


def test_the_first_reason_to_stop_is_kept():
    control = TrainerControl()
    control.stop("the loss is NaN")
    control.stop("no improvement")
    assert control.stop_reason == "the loss is NaN"


def test_a_directory_is_saved_to_once_however_often_it_is_asked_for():
    control = TrainerControl()
    control.save("states/a")
    control.save(Path("states/b"))
    control.save(Path("states/a"))
    assert control.save_requests == [Path("states/a"), Path("states/b")]


def test_every_request_for_a_boundary_ends_idleness():
    for ask in (
        lambda control: control.stop(""),
        TrainerControl.evaluate,
        TrainerControl.log,
        lambda control: control.save("a"),
    ):
        control = TrainerControl()
        ask(control)
        assert not control.is_idle


def test_reset_forgets_every_request():
    control = TrainerControl()
    control.stop("enough")
    control.evaluate()
    control.log()
    control.skip_update()
    control.save("a")
    control.reset()
    assert vars(control) == vars(TrainerControl())
    assert control.is_idle
    assert not control.should_skip_update


def test_what_was_asked_for_shows():
    control = TrainerControl()
    control.evaluate()
    assert repr(control) == "TrainerControl(evaluate=True)"
