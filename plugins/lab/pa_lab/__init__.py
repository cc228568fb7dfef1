"""pa-lab: what you do to a training script: check it, verify that it resumes, profile it."""

from pa_lab.diff import Difference, compare_states
from pa_lab.profile import ProfileCallback, ProfileSettings

__all__ = ["Difference", "ProfileCallback", "ProfileSettings", "compare_states"]
