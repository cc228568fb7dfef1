"""What only some processes do names what the others have to do, instead of hanging in silence."""

import time

import pytest

from pa_core.loop import waiting


def test_a_process_that_waits_for_the_others_says_what_they_have_to_do(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "WAIT", 0.02)
    with waiting.expecting_all(1, "build each Trainer"):
        time.sleep(0.2)
    assert "Rank 1 has waited 0 s" in (said := capsys.readouterr().err)
    assert "every process must build each Trainer" in said
    with pytest.raises(RuntimeError) as caught, waiting.expecting_all(0, "evaluate"):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
    assert "one of them has ended" in (note := caught.value.__notes__[0])
    assert "every process must evaluate, also if only one of them uses the result" in note
    with pytest.raises(RuntimeError, match="else") as caught, waiting.expecting_all(0, "evaluate"):
        raise RuntimeError("something else")
    assert not hasattr(caught.value, "__notes__")
    time.sleep(0.05)
    assert capsys.readouterr().err == ""
