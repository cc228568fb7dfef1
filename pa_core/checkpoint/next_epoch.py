"""What a state says of the next epoch, compared with the resumed run when that epoch starts.

Until then, plugins may choose its data, and freeze and unfreeze parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_core.checkpoint.compatibility import differing_leaves, only_in_one, report_differences
from pa_core.checkpoint.fingerprint import data_fingerprint, frozen_parameters

if TYPE_CHECKING:
    from pathlib import Path

    from pa_core.trainer import Trainer


@dataclass(frozen=True)
class NextEpochCheck:
    """Compares the next epoch of a resumed run with what its state says.

    Attributes:
        state_dir: the state.
        strict: whether a difference is an error.
        data: the description of the training data; None to compare nothing.
        frozen: the names of the frozen parameters in the state, and in the run when it was
            restored; None to compare nothing.
    """

    state_dir: Path
    strict: bool
    data: Mapping[str, Any] | None
    frozen: tuple[Sequence[str], Sequence[str]] | None

    def run(self, trainer: Trainer, *, has_chosen_data: bool) -> None:
        """Report what differs.

        Args:
            trainer: the trainer, at the start of the epoch.
            has_chosen_data: whether a plugin has chosen the data since the state was restored.

        Raises:
            TrainingStateError: for a difference, if the run resumes with ``strict=True``.
        """
        if self.data is not None and not has_chosen_data:
            self._check_data(trainer, self.data)
        if self.frozen is not None:
            saved, before = self.frozen
            now = frozen_parameters(trainer)
            # What a plugin has changed since is its choice for the epoch.
            same = [name for name in {*saved, *before} if (name in before) == (name in now)]
            sides = [[name for name in one if name in same] for one in (saved, before)]
            if sides[0] != sides[1]:
                found = [f"frozen parameters: {only_in_one(*sides)}"]
                report_differences(self.state_dir, found, strict=self.strict)

    def _check_data(self, trainer: Trainer, saved: Mapping[str, Any]) -> None:
        present = data_fingerprint(trainer)
        now = {name: value for name, value in present.items() if name in saved}
        found = differing_leaves({name: saved[name] for name in now}, now)
        found = trainer.gather_objects(found)[0]  # processes may have different data
        hint = (
            f". A plugin had changed the data for epoch {trainer.position.epoch}: it must do so "
            "again, in on_train_epoch_start or where its state is restored"
        )
        report_differences(self.state_dir, found, hint, strict=self.strict)
