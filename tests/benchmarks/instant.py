"""A subject of the benchmarks that takes no time."""

from benchmarks.harness.cells import Accuracy, Trial


class Instant:
    """An implementation that is always right and does nothing; notes its cells."""

    name = "instant"

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []

    def version(self):
        return "1"

    def available(self):
        return True, "1"

    def refuses(self, cell):
        return None

    def prepare(self, cell):
        return None

    def trial(self, prepared, cell):
        self.ran.append((cell.suite, cell.priority))
        return Trial([lambda: None], lambda: Accuracy(0.0, 0.01), cell.work)
