"""SIGTERM and Ctrl-C during a training: remembered at once, looked at between two steps."""

import signal

PATIENCE = 4.0  # seconds that a step or an evaluation on a CPU has to end by itself after a signal


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived, and the state has been saved. `signal` is its number."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal = signal_number


class BrokenOff(BaseException):
    """What ran for longer than PATIENCE after a signal is given up. Not an Exception, so that nobody catches it on its way."""


class Signals:
    """From its making to `close`, the numbers of SIGTERM and SIGINT are put into `caught` instead of ending the process.

    An `impatient` one also gives up what `attempt` runs PATIENCE seconds after the first: for one process on a CPU, where a step may take minutes.
    An evaluation changes nothing, and a step nothing before the optimizer's turn, which is not given up: the state to save is exact.
    """

    def __init__(self, optimizer, impatient: bool):
        self.caught, self.broken_off, self.impatient, self._breakable = [], False, impatient, False
        self._handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        if impatient:
            self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._break_off)
        self._hook = optimizer.register_step_pre_hook(self._optimizer_begins)

    def _remember(self, number, _):
        self.caught.append(number)
        if self.impatient:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, 1.0)  # again each second, for an exception may get lost on its way

    def _break_off(self, *_):
        if self._breakable and self.caught:
            raise BrokenOff

    def _optimizer_begins(self, *_):
        self._breakable = False

    def attempt(self, action, *args):
        """What action(*args) returns; None when it was given up, and then `broken_off` is true."""
        try:
            try:
                self._breakable = True
                return action(*args)
            finally:
                self._breakable = False
        except BrokenOff:
            self._breakable, self.broken_off = False, True

    def close(self):
        """The handlers from before."""
        if self.impatient and self.caught:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._hook.remove()
