"""What holds for all tests."""

import hashlib
import signal
import threading
from pathlib import Path

import torch

from batchlab import kernels


def pytest_sessionstart() -> None:
    """Let torch.compile forget what it compiled with other kernels: its cache on disk knows only their names."""
    sources = sorted(Path(kernels.__file__).parent.glob("*.[chp]*"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    torch.compiler.config.cache_key_tag = f"batchlab kernels {digest}"


def pytest_configure() -> None:
    """Let programs that tests start be interruptible, whoever started the tests.

    A shell without job control starts what it puts in the background with interrupts ignored, and so do some CI
    systems; programs hand that on to those they start, and Python then does not listen for Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
