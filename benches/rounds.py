"""Interleaved rounds, and the knobs that say how many and how long."""

import os
import statistics

from stage import progress, say

BRIEF = os.environ.get("BRIEF", "") not in ("", "0")
ROUNDS = int(os.environ.get("ROUNDS", 1 if BRIEF else 5))
SECONDS = float(os.environ.get("SECONDS", 1 if BRIEF else 5))
KEYS = int(os.environ.get("KEYS", 500 if BRIEF else 10_000))
TRUSTS = 10 if BRIEF else 100
WARM_UP = 0.5 if BRIEF else 1.0
OTHERS_MAX = 0.05  # of a processor: what a machine needs for itself
# Deadlines for what is not measured, or not in time.
UNHURRIED = {
    "store.read_timeout": "60s",
    "decision.deadline": "70s",
    "decision.envoy_timeout": "80s",
    "limits.preface_timeout": "60s",
}


class Rounds:
    """What was measured, in interleaved rounds."""

    def __init__(self, title):
        self.title, self.came, self.disturbed = title, {}, None

    def each(self, contenders):
        """Each contender in turn, round after round."""
        for number in range(ROUNDS):
            for name, contender in contenders.items():
                progress(f"{self.title}: round {number + 1} of {ROUNDS}: {name}")
                yield name, contender
        progress("")
        self.show()

    def add(self, name, came):
        for quantile, value in (came.get("latency_us") or {}).items():
            came[quantile] = value
        self.came.setdefault(name, []).append(came)

    def add_difference(self, name, base, figure):
        """How much more of a figure `name` has than `base` in the same round."""
        for came, other in zip(self.came[name], self.came[base]):
            came[f"added_{figure}"] = came[figure] - other[figure]

    def median(self, name, figure):
        return statistics.median(came[figure] for came in self.came[name])

    def spread(self, name, figure):
        return self.spread_of([came[figure] for came in self.came[name]])

    @staticmethod
    def spread_of(values):
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def ratio(self, name, base, figure):
        """Round by round, since both met the same machine in it."""
        pairs = zip(self.came[name], self.came[base])
        values = [came[figure] / other[figure] for came, other in pairs if other[figure]]
        return self.spread_of(values) if values else None

    def figures(self):
        names = ("checks_per_second", "cpu_us", "envoy_cpu_us", "p50", "p99", "p99.9", "max", "added_p99")
        rows = {
            name: {figure: self.spread(name, figure) for figure in names if figure in came[0]}
            for name, came in self.came.items()
        }
        return {"title": self.title, "rows": rows, "rounds": ROUNDS, "seconds": SECONDS, "disturbed": self.disturbed}

    def others(self):
        """How much of a processor went to whatever else the machine did, at the worst."""
        return max(came["others"] for rounds in self.came.values() for came in rounds)

    def late(self):
        """Checks that were not decided in time."""
        return sum(came["faults"] for rounds in self.came.values() for came in rounds)

    def show(self):
        wrong = []
        if self.others() > OTHERS_MAX:
            wrong.append(f"other programs took up to {self.others():.0%} of a processor")
        if self.late():
            wrong.append(f"{self.late()} checks failed")
        self.disturbed = f"DISTURBED: {'; '.join(wrong)}" if wrong else None
        say(f"\n{self.title} ({ROUNDS} rounds; median)")
        say(f"  {'':42} {'checks/s':>10} {'CPU us':>8} {'p50 us':>8} {'p99 us':>9}")
        for name in self.came:
            line = f"{self.median(name, 'checks_per_second'):>10,.0f} {self.median(name, 'cpu_us'):>8.2f}"
            say(f"  {name:42} {line} {self.median(name, 'p50'):>8.0f} {self.median(name, 'p99'):>9.0f}")
        if self.disturbed:
            say(f"  {self.disturbed}")
