"""What holds for all tests."""

import signal
import threading


def pytest_configure() -> None:
    """Let programs that tests start be interruptible, whoever started the tests.

    A shell without job control starts what it puts in the background with interrupts ignored, and so do some CI
    systems; programs hand that on to those they start, and Python then does not listen for Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
