"""Plugin packages import their field's library when it is needed, and not before."""

import subprocess
import sys


def test_importing_and_configuring_the_plugins_imports_no_library_of_theirs():
    code = """
import sys
from pa_lab import ProfileCallback
from pa_metrics import MetricsPlugin
from pa_models import TimmPlugin, TransformersPlugin
from pa_report import ReportPlugin
from pa_schedulers import SchedulersPlugin
from pa_tracking import TrackingPlugin
MetricsPlugin(metrics=["accuracy"], task="multiclass", num_classes=10)
SchedulersPlugin(name="cosine").register_schedulers()
TransformersPlugin()
TrackingPlugin(service="tensorboard")
ProfileCallback(trace="trace.json")
ReportPlugin(title="Digits")
assert "resnet18" not in TimmPlugin().register_models()
libraries = ("torchmetrics", "timm", "transformers", "tensorboard", "matplotlib")
print(*[name for name in libraries if name in sys.modules])
assert "timm/resnet18" in TimmPlugin().register_models()
print("timm" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["", "True"]
