"""Starting processes from a notebook."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from accelerate import notebook_launcher as launch
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment

from pa_core.errors import nearest

_Precision = Literal["no", "fp16", "bf16", "fp8"]


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: _Precision | None = None,
    use_port: str | int | None = None,
    **options: Any,
) -> None:
    """Run a function on several processes from a notebook, by accelerate's function of this name.

    In contrast to that function, a `mixed_precision` reaches the trainers of the function, and
    notebooks of one machine don't have to agree on ports.

    Args:
        function: creates the model, the trainer and everything else that touches a device.
        args: its arguments.
        num_processes: how many processes to start, usually one per GPU.
        mixed_precision: the default of the trainers; without it, theirs as anywhere else.
        use_port: where the processes meet; by default a free port, or 29500 on several machines.
        options: further arguments of accelerate's `function
            <https://huggingface.co/docs/accelerate/basic_tutorials/notebook>`_, by their names.

    Raises:
        ValueError: if the precision is unknown, or if several processes are to be started and a
            trainer was created before, outside of `function`.
    """
    known = get_args(_Precision)
    if mixed_precision is not None and mixed_precision not in known:
        hint = nearest(str(mixed_precision), known)
        raise ValueError(
            f"mixed_precision must be one of {', '.join(known)}, not {mixed_precision!r}.{hint}"
        )
    if num_processes is not None and num_processes > 1 and AcceleratorState._shared_state:
        raise ValueError(
            "notebook_launcher forks the notebook's process, in which a Trainer (or an "
            "Accelerator) was created before: restart the kernel, and create trainers only inside "
            f"of {getattr(function, '__name__', 'the function')}"
        )
    if use_port is None:
        use_port = _free_port() if options.get("num_nodes", 1) == 1 else 29500
    # Not set by accelerate's function, which ignores its argument otherwise.
    precision = {} if mixed_precision is None else {"ACCELERATE_MIXED_PRECISION": mixed_precision}
    with patch_environment(**precision):
        launch(
            function,
            tuple(args),
            num_processes,
            mixed_precision or "no",
            str(use_port),
            **options,
        )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
