"""Two ways to see how much memory some work takes at its peak: of the process, and of its tensors alone."""

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_growth(work: Callable[[], Any], *, interval: float = 0.002) -> tuple[int, Any]:
    """Run `work` and watch this process's resident memory.

    Returns:
        (bytes that the peak lies above the start, what `work` returned). Pages of files that are mapped while they
        are read count too.
    """
    process = psutil.Process()
    start = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(interval)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return max(peak, process.memory_info().rss) - start, result


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make and that are still alive, as a GPU's allocator would.

    Under `torch.no_grad()`, not in inference mode, where composite operators hide what they make. What an operator
    needs inside is not seen.

    Attributes:
        nbytes: alive now, of those made since the mode was entered.
        peak: the largest that `nbytes` was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given:
                    self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if nbytes == 0 or address in self._alive:
            return
        self._alive.add(address)
        self.nbytes += nbytes
        self.peak = max(self.peak, self.nbytes)
        weakref.finalize(storage, self._remove, address, nbytes)

    def _remove(self, address: int, nbytes: int) -> None:
        self._alive.discard(address)
        self.nbytes -= nbytes
