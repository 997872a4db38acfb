"""Interleaved rounds of measurements, and the environment variables that set their number and length."""

import os
import statistics

from fixture import progress, say

BRIEF = os.environ.get("BRIEF", "") not in ("", "0")
ROUNDS = int(os.environ.get("ROUNDS", 1 if BRIEF else 5))
SECONDS = float(os.environ.get("SECONDS", 1 if BRIEF else 5))
KEYS = int(os.environ.get("KEYS", 500 if BRIEF else 10_000))
TRUSTS = 10 if BRIEF else 100
WARM_UP = 0.5 if BRIEF else 1.0
OTHERS_MAX = 0.05  # of a processor: the usual activity of an idle machine
# Deadlines for servers whose latency is not measured.
LONG_DEADLINES = {
    "store.read_timeout": "60s",
    "decision.deadline": "70s",
    "decision.envoy_timeout": "80s",
    "limits.preface_timeout": "60s",
}


class Rounds:
    """The results of interleaved rounds."""

    def __init__(self, title):
        self.title, self.results, self.disturbed = title, {}, None

    def each(self, candidates):
        """Yields each candidate once per round. Prints the results after the last round."""
        for number in range(ROUNDS):
            for name, candidate in candidates.items():
                progress(f"{self.title}: round {number + 1} of {ROUNDS}: {name}")
                yield name, candidate
        progress("")
        self.show()

    def add(self, name, result):
        for quantile, value in (result.get("latency_us") or {}).items():
            result[quantile] = value
        self.results.setdefault(name, []).append(result)

    def add_difference(self, name, base, figure):
        """Adds the difference of a figure between `name` and `base` in the same round."""
        for result, other in zip(self.results[name], self.results[base]):
            result[f"added_{figure}"] = result[figure] - other[figure]

    def median(self, name, figure):
        return statistics.median(result[figure] for result in self.results[name])

    def spread(self, name, figure):
        return self.spread_of([result[figure] for result in self.results[name]])

    @staticmethod
    def spread_of(values):
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def ratio(self, name, base, figure):
        """Returns the ratio of a figure per round: in one round, the machine treats both alike."""
        pairs = zip(self.results[name], self.results[base])
        values = [result[figure] / other[figure] for result, other in pairs if other[figure]]
        return self.spread_of(values) if values else None

    def figures(self):
        names = ("checks_per_second", "cpu_us", "envoy_cpu_us", "p50", "p99", "p99.9", "max", "added_p99")
        rows = {
            name: {figure: self.spread(name, figure) for figure in names if figure in results[0]}
            for name, results in self.results.items()
        }
        return {"title": self.title, "rows": rows, "rounds": ROUNDS, "seconds": SECONDS, "disturbed": self.disturbed}

    def others(self):
        """Returns the largest share of a processor that other programs used."""
        return max(result["others"] for results in self.results.values() for result in results)

    def late(self):
        """Returns the number of checks that were not decided in time."""
        return sum(result["faults"] for results in self.results.values() for result in results)

    def show(self):
        problems = []
        if self.others() > OTHERS_MAX:
            problems.append(f"other programs took up to {self.others():.0%} of a processor")
        if self.late():
            problems.append(f"{self.late()} checks failed")
        self.disturbed = f"DISTURBED: {'; '.join(problems)}" if problems else None
        say(f"\n{self.title} ({ROUNDS} rounds; median)")
        say(f"  {'':42} {'checks/s':>10} {'CPU us':>8} {'p50 us':>8} {'p99 us':>9}")
        for name in self.results:
            line = f"{self.median(name, 'checks_per_second'):>10,.0f} {self.median(name, 'cpu_us'):>8.2f}"
            say(f"  {name:42} {line} {self.median(name, 'p50'):>8.0f} {self.median(name, 'p99'):>9.0f}")
        if self.disturbed:
            say(f"  {self.disturbed}")
