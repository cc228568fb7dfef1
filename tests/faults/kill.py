"""Kill a run with SIGKILL at random instants, restart it until it is done, and compare.

``python tests/faults/kill.py --kills 100 --seed 1``

One process imports everything once and forks a child for each start (a fork server), so that a
start takes a tenth of a second; a few starts are cold, as a user's are. The children of a start
form one process group, which is killed as a whole. Half of the kills come at any instant, the other
half wait for a state that is being written. The result is compared with that of a run that was
never killed: the final state bit for bit, and the trace of every update.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), *map(str, sorted(ROOT.glob("plugins/*")))]

from pa_core.data.rng import derive_key  # noqa: E402
from pa_core.errors import PaCoreError  # noqa: E402
from pa_lab.diff import compare_states  # noqa: E402
from tests.faults import broken, subject  # noqa: E402
from tests.faults.launch import survivors  # noqa: E402

CLOCKED = ("checkpoint",)  # the only plugin whose state may differ: it depends on a clock
FORKED = [name for name, config in subject.CONFIGS.items() if not config.cold]
COLD = [name for name, config in subject.CONFIGS.items() if config.cold]


@dataclass
class Trial:
    """A run from its first start to its end, and what happened to it."""

    config: str
    seed: int
    kills: int = 0
    inside_saves: int = 0
    repeated: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def reproducer(self) -> str:
        """The command that repeats this trial, as far as the instants can be repeated."""
        return (
            f"python tests/faults/kill.py --configs {self.config} --trial {self.seed} "
            f"--kills {self.kills}"
        )


class Start:
    """One start of the script: forked from this process, or cold."""

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, subject.CONFIGS[config]
        self.log = folder / "log"
        for marker in folder.glob("pid-*"):
            marker.unlink()
        self.popen: subprocess.Popen[bytes] | None = None
        self.mark = ""  # in the environment of a cold start's processes
        self.statuses: dict[int, int | None] = {}
        if self.config.cold:
            self._start_cold(config)
        else:
            self._fork()

    def _start_cold(self, config: str) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        processes, self.mark = self.config.processes, f"pa_core_kill_{time.monotonic_ns()}"
        script = [str(Path(subject.__file__)), str(self.folder), config]
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, *([*launcher, str(processes)] if processes > 1 else []), *script],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT), "PA_CORE_TEST_MARK": self.mark},
            )

    def _fork(self) -> None:
        port, group = free_port(), 0
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(self.config.processes):
            pid = os.fork()
            if pid == 0:
                self._be_child(rank, port, group)
            group = group or pid
            with suppress(OSError):
                os.setpgid(pid, group)  # in the parent and the child, whichever is first
            self.statuses[pid] = None

    def _be_child(self, rank: int, port: int, group: int) -> None:
        code = 1
        try:
            os.setpgid(0, group)
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if self.config.processes > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(self.config.processes),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                    GLOO_SOCKET_IFNAME="lo",
                )
            subject.train(self.folder, self.config)
            code = 0
        except BaseException:  # noqa: BLE001 - this process ends here after any error
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def is_running(self) -> bool:
        """Whether any of its processes is still running."""
        if self.popen is not None:
            return self.popen.poll() is None
        for pid, status in self.statuses.items():
            if status is None:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[pid] = os.waitstatus_to_exitcode(code)
        return None in self.statuses.values()

    def exit_codes(self) -> list[int]:
        """The exit codes of its processes; negative for a signal."""
        if self.popen is not None:
            return [self.popen.wait()]
        return [code for code in self.statuses.values() if code is not None]

    def kill(self) -> bool:
        """Kill all of its processes; return whether the signal has ended every one."""
        # torchrun starts each of its processes in a separate group.
        groups = [int(path.name[4:]) for path in self.folder.glob("pid-*")]
        groups += [self.popen.pid] if self.popen is not None else list(self.statuses)[:1]
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        # A process that was only just started hasn't written its pid yet.
        while self.mark and (left := survivors(self.mark)):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        while self.is_running():
            time.sleep(0.001)
        return all(code == -signal.SIGKILL for code in self.exit_codes())


def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def being_written(states: Path) -> set[str]:
    """States that are being written, or were when a process was killed."""
    try:
        return {name for name in os.listdir(states) if name.startswith(".tmp-")}
    except FileNotFoundError:
        return set()


def run_whole(trial: Trial, folder: Path, limit: float) -> float:
    """Run without any kill; returns the seconds it took."""
    folder.mkdir(parents=True)
    started = time.monotonic()
    start = Start(folder, trial.config)
    while start.is_running():
        time.sleep(0.005)
        if time.monotonic() - started > limit:
            start.kill()
    if any(start.exit_codes()):
        log = start.log.read_text()[-3000:]
        trial.problems.append(f"fails by itself with {start.exit_codes()}: {log}")
    return time.monotonic() - started


def run_trial(
    trial: Trial, folder: Path, golden: Path, seconds: float, kills: int, limit: float
) -> Trial:
    """Start, kill at most `kills` times, restart until done, and compare with `golden`."""
    folder.mkdir(parents=True)
    chance, states = random.Random(trial.seed), folder / "states"
    while True:
        before = being_written(states)
        start = Start(folder, trial.config)
        began, wait_for_save = time.monotonic(), chance.random() < 0.5
        # Relative to the time of an uninterrupted run; and how many states to let pass.
        instant = chance.uniform(0.0, seconds * 0.8)
        to_pass, delay = chance.randrange(8), chance.uniform(0.0, 0.01)
        seen, was_killed = set(before), False
        while start.is_running():
            now = time.monotonic() - began
            due = not wait_for_save and now > instant
            fresh = being_written(states) - seen if wait_for_save else set()
            if fresh:
                seen |= fresh
                to_pass -= len(fresh)
                due = to_pass < 0
            if due and trial.kills < kills:
                time.sleep(delay if fresh else 0.0)
                was_killed = start.kill()
                break
            if now > limit:
                start.kill()
                trial.problems.append(f"a start took more than {limit:.0f} seconds")
                return trial
            time.sleep(0.0003 if wait_for_save else 0.002)
        if was_killed:
            trial.kills += 1
            trial.inside_saves += bool(being_written(states) - before)
        elif all(code == 0 for code in start.exit_codes()):
            break
        elif -signal.SIGKILL not in start.exit_codes():
            trial.problems.append(f"a start failed: {start.log.read_text()[-3000:]}")
            return trial
    trial.problems += compare(folder, golden, subject.CONFIGS[trial.config].processes)
    lines = subject.read_trace(folder)
    trial.repeated = max(subject.repeated_updates(lines), default=0)
    return trial


def compare(folder: Path, golden: Path, processes: int) -> list[str]:
    """The differences between two complete runs."""
    try:
        states = [where / "states" / "final" for where in (golden, folder)]
        problems = [str(found) for found in compare_states(*states, ignore_plugins=CLOCKED)]
    except PaCoreError as error:
        problems = [str(error)]
    for rank in range(processes):
        expected, lines = (subject.read_trace(where, rank) for where in (golden, folder))
        problems += subject.trace_problems(expected, lines)
    left = being_written(folder / "states")
    return problems + [f"{name} was left" for name in sorted(left)]


def campaign(
    shares: Mapping[str, int], seed: int, limit: float, only_seed: int | None = None
) -> list[Trial]:
    """Run trials of each configuration until it was killed as often as its share says.

    Args:
        shares: how many kills each configuration gets.
        seed: of all instants.
        limit: seconds in which any start must end.
        only_seed: the seed of a single trial to repeat.
    """
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        for config, share in shares.items():
            golden = Path(name, config, "whole")
            whole = Trial(config, seed)
            seconds = run_whole(whole, golden, limit)
            if whole.problems:
                trials.append(whole)
                continue
            number, done = 0, 0
            while done < share:
                own = derive_key(seed, config, number) if only_seed is None else only_seed
                folder = Path(name, config, str(number))
                finished = run_trial(
                    Trial(config, own), folder, golden, seconds, share - done, limit
                )
                trials.append(finished)
                if finished.problems:
                    break
                number, done = number + 1, done + finished.kills
    for trial in trials:
        if trial.problems:
            print(f"LOST: {trial.reproducer}\n  " + "\n  ".join(trial.problems[:20]))
    return trials


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign and print its results; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="kills of forked starts, in total")
    parser.add_argument(
        "--cold-kills", type=int, default=0, help="kills of cold starts, of each kind"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--configs", nargs="+", default=FORKED, choices=subject.CONFIGS)
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds in which any start must end"
    )
    parser.add_argument("--trial", type=int, help="the seed of a single trial to repeat")
    parser.add_argument(
        "--broken", choices=sorted(broken.BUILDS), help="run a build that is broken this way"
    )
    options = parser.parse_args(arguments)
    if options.broken:
        broken.BUILDS[options.broken](setattr)
    shares = dict.fromkeys(options.configs, -(-options.kills // len(options.configs)))
    if options.cold_kills:
        shares |= dict.fromkeys(COLD, options.cold_kills)
    if not all(subject.CONFIGS[config].cold for config in shares):
        import torchmetrics.classification  # noqa: F401 - once, before the forks
    import pa_models  # noqa: F401

    started = time.monotonic()
    trials = campaign(shares, options.seed, options.limit, options.trial)
    total = {
        "kills": sum(trial.kills for trial in trials),
        "inside_saves": sum(trial.inside_saves for trial in trials),
        "runs": len(trials),
        "lost": sum(bool(trial.problems) for trial in trials),
        "repeated": max((trial.repeated for trial in trials), default=0),
        "seed": options.seed,
        "seconds": round(time.monotonic() - started),
    }
    print(
        "{kills} kills, {inside_saves} of them inside a save, {runs} runs, {lost} lost, at most "
        "{repeated} updates repeated, seed {seed}, {seconds} s".format(**total)
    )
    print(json.dumps(total | {"trials": [asdict(trial) for trial in trials]}))
    return 1 if total["lost"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
