"""The built-in plugins by name, as data, so that finding them imports none."""

from __future__ import annotations

BUILTINS: dict[str, str] = {
    "move_modules_to_device": "pa_core.builtins.move_modules_to_device:MoveModulesToDeviceCallback",
    "terminate_on_nan": "pa_core.builtins.terminate_on_nan:TerminateOnNaNCallback",
    "progress_table": "pa_core.builtins.progress_table:ProgressTableCallback",
    "print_progress": "pa_core.builtins.print_progress:PrintProgressCallback",
    "progress_bar": "pa_core.builtins.progress_bar:ProgressBarCallback",
    "log_metrics": "pa_core.builtins.log_metrics:LogMetricsCallback",
    "print_metrics": "pa_core.builtins.print_metrics:PrintMetricsCallback",
    "save_best_model": "pa_core.builtins.save_best_model:SaveBestModelCallback",
    "early_stopping": "pa_core.builtins.early_stopping:EarlyStoppingCallback",
    "checkpoint": "pa_core.builtins.checkpoint:SaveTrainingStateCallback",
    "preemption": "pa_core.builtins.preemption:PreemptionCallback",
    "limit_batches": "pa_core.builtins.limit_batches:LimitBatchesCallback",
    "limit_eval_steps": "pa_core.builtins.limit_eval_steps:LimitEvalStepsCallback",
    "step_evaluation": "pa_core.builtins.step_evaluation:StepBasedEvaluationCallback",
    "speedups": "pa_core.builtins.speedups:SpeedupsCallback",
    "fast_dev_run": "pa_core.builtins.fast_dev_run:FastDevRunCallback",
    "overfit": "pa_core.builtins.overfit:OverfitCallback",
    "live_plot": "pa_core.builtins.live_plot:LivePlotCallback",
    "model_summary": "pa_core.builtins.model_summary:ModelSummaryCallback",
}
"""Name in the settings -> ``module:class``."""

DEFAULTS: tuple[str, ...] = (
    "move_modules_to_device",
    "terminate_on_nan",
    "progress_table",
)
"""The built-in plugins that are on by default, in this order."""

PARTS: dict[str, str] = {
    "print_progress": "summary",
    "progress_bar": "bar",
    "log_metrics": "rows",
}
"""Built-in plugins that show a part of what `progress_table` does -> the setting of that part.

They were on by default before it, and settings may name them: one that is disabled turns its part
off, and a table of one that isn't enabled sets the same settings of `progress_table`.
"""
