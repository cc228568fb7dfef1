"""Functions and scripts on several processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from pa_core.testing import run_on_processes, run_tiny

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def add_up(numbers, factor):
    trainer = run_tiny(epochs=1)
    rank = torch.distributed.get_rank()
    nested = None
    try:
        run_on_processes(add_up, 2, numbers, factor)
    except RuntimeError as error:
        nested = str(error)
    return {
        "sum": trainer.gather(numbers[rank : rank + 1] * factor).sum(),
        "processes": trainer.num_processes,
        "loss": trainer.run_history.get_latest_metric("eval_loss_epoch"),
        "nested": nested,
    }


def fail_on_one():
    if torch.distributed.get_rank() == 1:
        sys.stderr.write("the reason\n")
        os._exit(7)
    torch.distributed.barrier()  # would wait forever


def test_each_process_returns_its_result_of_the_common_run():
    one = run_tiny(epochs=1).run_history.get_latest_metric("eval_loss_epoch")
    for result in run_on_processes(add_up, 2, torch.tensor([1.0, 2.0]), 10):
        assert result["sum"] == 30
        assert result["processes"] == 2
        assert result["loss"] == pytest.approx(one, rel=1e-5)
        assert "called on one of several processes" in result["nested"]


def test_a_failing_process_is_named_and_the_others_are_killed():
    with pytest.raises(RuntimeError, match="(?s)Process 1 failed:.*the reason"):
        run_on_processes(fail_on_one, 2, timeout=100)


def test_processes_that_take_too_long_are_killed():
    with pytest.raises(TimeoutError, match="more than 0.1 s"):
        run_on_processes(fail_on_one, 1, timeout=0.1)


def test_a_script_gets_its_arguments_and_its_output_is_returned(tmp_path: Path):
    (tmp_path / "beside.py").write_text("greeting = 'hello'\n")
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\nprint(beside.greeting, *sys.argv[1:])\n")
    assert run_on_processes(script, 1, "you", 2) == ["hello you 2\n"]


def test_a_nested_function_is_refused():
    with pytest.raises(ValueError, match="define it at the top level of a file"):
        run_on_processes(lambda: None)
