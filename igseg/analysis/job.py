"""How a long batch keeps going: which process explains which image, reading ahead, writing behind.

The images are numbered in the order of the dataset. Each process claims the next number that no
process has claimed. A single process counts; under torchrun the counter stands in the group's
store. So a slow image or a slow GPU delays no other process. While an image is on the device, a
thread reads the next image, and worker processes draw and write the images before it. What came of
each image, its `Outcome`, goes to the process of rank 0, which keeps the summary.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from uuid import uuid4

from filelock import FileLock, Timeout

from igseg.errors import InputError, OutputError, unexpected

if TYPE_CHECKING:  # slow to import, and not needed by processes that draw
    from loky import ProcessPoolExecutor
    from torch.distributed.distributed_c10d import Store

DONE, SKIPPED, FAILED = 'done', 'skipped', 'failed'
LOCK, HOLDER = '.lock', '.holder.json'  # in the output folder
MAX_WRITERS = {False: 2, True: 8}  # processes that write, for each rank; True: beside a GPU
POLL = 0.1  # seconds between two looks at what other ranks have finished
GRACE = 10.0  # seconds that an interrupted batch waits for the other ranks
NETWORK_DELAY = 5.0  # seconds until a shared folder shows what another machine has written

Item = TypeVar('Item')


@dataclass(frozen=True)
class Outcome:
    """What came of an image."""

    number: int  # its place in the batch
    image: str
    status: str = DONE  # or SKIPPED (empty target), or FAILED (unusable input, or not written)
    reason: str = ''  # one sentence, if it is not done
    rows: tuple[dict[str, Any], ...] = ()  # of summary.csv, for each target, if it is done


# --------------------------------------------------------------------------- who explains what


class Share(Protocol):
    """A process's share of a batch's images, and its way to tell rank 0 what came of them."""

    rank: int
    size: int  # processes in all

    def claim(self, total: int, ahead: bool) -> int | None:
        """The next number that no process has claimed; None if there is none. ahead: the number is
        not needed yet; then also None if another process may be waiting for it."""

    def report(self, outcome: Outcome) -> None:
        """Tell rank 0 what came of an image."""

    def collect(self) -> list[Outcome]:
        """On rank 0: all that was reported since the last call."""

    def begin(self) -> None:
        """Called by each process before its first image: the others wait for rank 0."""

    def leave(self) -> None:
        """Called by each process after its last report."""

    def others_left(self) -> bool:
        """Whether all but rank 0 have left."""


class Alone:
    """All images, for one process."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self._next = 0
        self._outcomes: list[Outcome] = []

    def claim(self, total: int, ahead: bool) -> int | None:
        """See `Share`."""
        if self._next >= total:
            return None
        self._next += 1
        return self._next - 1

    def report(self, outcome: Outcome) -> None:
        """See `Share`."""
        self._outcomes.append(outcome)

    def collect(self) -> list[Outcome]:
        """See `Share`."""
        new, self._outcomes = self._outcomes, []
        return new

    def begin(self) -> None:
        """See `Share`."""

    def leave(self) -> None:
        """See `Share`."""

    def others_left(self) -> bool:
        """See `Share`."""
        return True


class Group:
    """A share of the images, for a process that torchrun started.

    Only the group's key-value store is used. No collective operation is ever called, so no rank
    waits for a slower one, and no time limit of NCCL's or gloo's can end a long batch.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """store: all ranks share it."""
        self.store, self.rank, self.size = store, rank, size
        self._collected = 0

    @classmethod
    def of_torchrun(cls) -> Group:
        """The group of this process, by the variables that torchrun set."""
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous('env://'))
        return cls(PrefixStore('images', store), rank, size)

    def claim(self, total: int, ahead: bool) -> int | None:
        """See `Share`."""
        if ahead and self.store.add('claimed', 0) >= total - self.size:
            return None
        number = self.store.add('claimed', 1) - 1
        return number if number < total else None

    def report(self, outcome: Outcome) -> None:
        """See `Share`."""
        place = self.store.add('reported', 1) - 1
        self.store.set(f'outcome {place}', json.dumps(asdict(outcome)))

    def collect(self) -> list[Outcome]:
        """See `Share`."""
        new = []
        while self._collected < self.store.add('reported', 0):
            key = f'outcome {self._collected}'
            if not self.store.check([key]):  # not written yet; `get` alone would not hear a signal,
                break  # and would wait for ever for a rank that ended in this moment
            fields = json.loads(self.store.get(key))
            new.append(Outcome(**fields | {'rows': tuple(fields['rows'])}))
            self.store.delete_key(key)
            self._collected += 1
        return new

    def begin(self) -> None:
        """See `Share`. After a restart torchrun's store may still hold entries of processes that
        died. So rank 0 takes an empty part of the store and invites the living ranks there."""
        from torch.distributed.distributed_c10d import PrefixStore

        common, process_name = self.store, uuid4().hex
        if self.rank > 0:
            common.set(f'rank {self.rank}', process_name)
            invitation = f'invitation of {process_name}'
            while not common.check([invitation]):  # `get` alone would not hear a signal
                time.sleep(POLL)
            self.store = PrefixStore(common.get(invitation).decode(), common)
            self.store.add('joined', 1)
            return
        self.store = PrefixStore(process_name, common)
        names = [f'rank {rank}' for rank in range(1, self.size)]
        while self.store.add('joined', 0) < len(names):
            for name in names:
                if common.check(
                    [name]
                ):  # perhaps a dead rank's, until the living one overwrites it
                    common.set(f'invitation of {common.get(name).decode()}', process_name)
            time.sleep(POLL)

    def leave(self) -> None:
        """See `Share`."""
        if self.rank > 0:
            self.store.add('left', 1)

    def others_left(self) -> bool:
        """See `Share`."""
        return self.store.add('left', 0) == self.size - 1


def device_of_rank(device: str, ranks: int) -> str:
    """The device of this process: a GPU for each of several processes, if GPUs are used."""
    import torch  # not above: the processes that draw do not need it

    from igseg.network.loading import resolve_device

    if ranks == 1 or device not in ('auto', 'cuda') or not torch.cuda.is_available():
        return device
    gpu = f'cuda:{os.environ["LOCAL_RANK"]}'
    torch.cuda.set_device(resolve_device(gpu))
    return gpu


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return 'TORCHELASTIC_RUN_ID' in os.environ and int(os.environ.get('WORLD_SIZE', 1)) > 1


# --------------------------------------------------------------------------- signals, the folder


class StopSignals:
    """Turns SIGINT and SIGTERM into a KeyboardInterrupt that cannot get lost.

    Python drops an exception that a signal handler raises while a destructor or a callback runs.
    This class keeps the signal's number, and `check` raises again. Signals that follow at once are
    counted with the first, so that they do not stop the summary from being written: torchrun
    passes on a Ctrl-C that its processes have already received. A signal that the process ignores,
    as background jobs of a shell ignore Ctrl-C, stays ignored.
    """

    AT_ONCE = 3.0  # seconds
    PASSED_ON = 30.0  # seconds in which torchrun, on however busy a machine, has passed a signal on

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once = self.PASSED_ON if started_by_torchrun() else self.AT_ONCE
        self._when = -math.inf

    def __enter__(self) -> StopSignals:
        self._before: dict[int, Any] = {}  # number -> handler
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if time.monotonic() - self._when < self._at_once:
            return
        self.number, self._when = number, time.monotonic()
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.number is not None:
            raise KeyboardInterrupt

    @property
    def exit_status(self) -> int:
        """The exit status of a process that the signal has ended: 130 or 143."""
        return 128 + (self.number or signal.SIGINT)


def _holder(folder: Path) -> str:
    """The run that holds a folder, in words; empty if it is unknown."""
    try:
        holder = json.loads((folder / HOLDER).read_text())
        return f' (process {holder["process"]} on {holder["host"]} since {holder["since"]})'
    except (OSError, ValueError, KeyError, TypeError):
        return ''


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder. The operating system frees the folder when the
    process ends in any way. Raises InputError, which names the holder, if another run has it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f'{folder} is in use by another run{_holder(folder)} '
            '(wait until it has finished, or give another --output_dir)'
        ) from None
    except OSError as error:
        raise OutputError(f'cannot lock {folder}: {error.strerror or error}') from None
    try:
        with contextlib.suppress(OSError):  # only for the message above
            (folder / HOLDER).write_text(json.dumps(
                {'process': os.getpid(), 'host': socket.gethostname(),
                 'since': time.strftime('%Y-%m-%d %H:%M:%S')}
            ))  # fmt: skip
        yield
    finally:
        for name in (HOLDER, LOCK):  # before the release, so that no file of another run is removed
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        lock.release()


# --------------------------------------------------------------------------- reading ahead


def read_ahead(
    share: Share, total: int, read: Callable[[int], Item]
) -> Iterator[tuple[int, Callable[[], Item]]]:
    """The numbers that this process claims, each with a function that returns what was read, or
    raises what reading raised. While the caller works on an item, the next one is read."""
    with ThreadPoolExecutor(1, 'reading') as reader:
        waiting: list[tuple[int, Future[Item]]] = []
        while True:
            for ahead in range(len(waiting), 2):
                number = share.claim(total, ahead=bool(ahead))
                if number is None:
                    break
                waiting.append((number, reader.submit(read, number)))
            if not waiting:
                return
            number, future = waiting.pop(0)
            yield number, future.result
            del future  # with the image it holds


# --------------------------------------------------------------------------- writing behind


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def start_worker(parent: int) -> None:
    """Prepare a process that draws and writes. It has a low priority, else each parallel loop of
    the computation would wait for a core. It ignores Ctrl-C, which its parent handles, and it ends
    when its parent ends in any way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, 'nice'):
        os.nice(19)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _new_pool(processes: int) -> ProcessPoolExecutor:
    from loky import ProcessPoolExecutor  # slow to import

    return ProcessPoolExecutor(processes, initializer=start_worker, initargs=(os.getpid(),))


class Writers:
    """Worker processes that draw and write explained images; and what came of all images.

    At most two images wait for each process; then `add` waits too, so that memory stays bounded.
    Without worker processes the caller's process does everything at once. The end of the context
    waits until all files are written.
    """

    def __init__(self, processes: int) -> None:
        self.in_trouble = False  # whether the last image could not be written
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: dict[Future[object], Outcome] = {}
        self._finished: list[Outcome] = []

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *error: object) -> None:
        while self._waiting:
            self._settle_some()
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def add(self, outcome: Outcome, write: Callable[[], object]) -> None:
        """Have an image written. Its outcome is `outcome`, or FAILED if writing fails."""
        if not self._processes:
            self._settle(outcome, write)
            return
        while len(self._waiting) >= 2 * self._processes:
            self._settle_some()
        try:
            if self._pool is None:
                self._pool = _new_pool(self._processes)
            self._waiting[self._pool.submit(write)] = outcome
        except BrokenExecutor:  # a process was killed while nothing was being written
            self._pool = None
            self.add(outcome, write)

    @property
    def waiting(self) -> int:
        """How many images wait to be written, or are being written."""
        return len(self._waiting)

    def settle(self, outcome: Outcome) -> None:
        """Note what came of an image of which nothing is written."""
        self._finished.append(outcome)

    def finished(self) -> list[Outcome]:
        """What came of images since the last call."""
        self.settle_done()
        finished, self._finished = self._finished, []
        return finished

    def settle_done(self) -> None:
        """Note what came of images whose writing has ended."""
        for future in [future for future in self._waiting if future.done()]:
            self._settle(self._waiting.pop(future), future.result)

    def _settle_some(self) -> None:
        done, _ = wait(self._waiting, return_when=FIRST_COMPLETED)
        for future in done:
            self._settle(self._waiting.pop(future), future.result)

    def _settle(self, outcome: Outcome, result: Callable[[], object]) -> None:
        try:
            result()
            self.in_trouble = False
        except InputError as error:
            self.in_trouble = isinstance(error, OutputError)
            outcome = replace(outcome, status=FAILED, reason=str(error), rows=())
        except BrokenExecutor:
            self._pool = None  # the next image starts a new one
            reason = (
                'the process that draws and writes was killed, probably for want of memory '
                '(run the same command again; --figures none needs less)'
            )
            outcome = replace(outcome, status=FAILED, reason=reason, rows=())
        except Exception as error:  # a bug costs this image, not the batch
            outcome = replace(outcome, status=FAILED, reason=unexpected(error), rows=())
        self.settle(outcome)


def writer_processes(images: int, on_gpu: bool) -> int:
    """How many processes should write. None for a few images: to start them would take longer than
    they save. More beside a GPU, which explains faster than two processes draw."""
    if images < 8:
        return 0
    ranks = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return max(1, min(MAX_WRITERS[on_gpu], (os.cpu_count() or 1) // ranks))
