"""Peak memory of a child process, sampled while it works."""

import threading
import time
from collections.abc import Callable
from typing import Any

import psutil


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
