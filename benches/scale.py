"""From a thousand keys to a million: memory, cost of a hit, start and import; what floods do to good keys, and churn.

SCALE_MAX is the most keys (1 000 000). Hits are measured with the embedded database; what is in the cache costs the same
whatever database it came from.
"""

import json
import os
import statistics
import threading
import time

from rounds import BRIEF, ROUNDS, SECONDS, UNHURRIED, WARM_UP, Rounds
from stage import Broken, make_keys, progress, say

SCALE_MAX = int(os.environ.get("SCALE_MAX", 5_000 if BRIEF else 1_000_000))
SIZES = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size < SCALE_MAX] + [SCALE_MAX]
IMPORT_MAX = 500_000  # keys of one `key import`
CHURN_SECONDS = 2 if BRIEF else 60
CHURN_RATE = 1_000
ENTRY_BYTES = 512  # what an entry may take
HIT_FLAGS = ("-c", 4, "-m", 32)
GOOD = ("-c", 4, "-m", 32, "--rate", 1_000)


def measure(stage):
    """Every size, with its own server; then all of them in turn."""
    postgres = stage.postgres()
    sites, sizes = {}, {}
    for size in SIZES:
        url = stage.database(postgres, f"keys_{size}")
        site, sizes[f"{size}, PostgreSQL"] = furnish(stage, size, "PostgreSQL", **{"store.url": url})
        site[0].stop()
        sites[size], sizes[f"{size}, SQLite"] = furnish(stage, size, "SQLite")
    stage.stop(postgres)
    hits = Rounds("hits, keys uniformly at random: closed loop")
    names = {f"{size:,} keys": size for size in SIZES}
    for name, size in hits.each(names):
        site, file = sites[size]
        options = ("--keys", file, "--order", "uniform", *HIT_FLAGS)
        hits.add(name, stage.measured(site.server, *options, seconds=SECONDS, warm_up=WARM_UP))
    ratio = hits.ratio(f"{SIZES[-1]:,} keys", f"{SIZES[0]:,} keys", "checks_per_second")
    for size in SIZES[:-1]:
        sites[size][0].stop()
    site, file = sites[SIZES[-1]]
    came = {"sizes": sizes, "hits": hits.figures(), "ratio": ratio, "beside": beside(stage, site, file).figures()}
    site.stop()
    return came | {"churn": churn(stage)}


def furnish(stage, size, database, **settings):
    """A server that holds `size` keys in its cache, and what that took."""
    progress(f"{size:,} keys: making them")
    # Room for all of them: what is measured is what they take.
    settings |= {"cache.size": "2GiB", "cache.value_age_max": "6h"} | (UNHURRIED if BRIEF else {})
    site = stage.site(f"{database}-{size}", **settings)
    keys = make_keys(size)
    file = stage.dir / f"keys-{size}"
    progress(f"{size:,} keys: importing them")
    began = time.monotonic()
    with file.open("w") as lines:
        for part in range(0, size, IMPORT_MAX):
            chunk = stage.dir / "part"
            site.issue(keys[part : part + IMPORT_MAX], 1, chunk, prefix=f"part-{part}")
            lines.write(chunk.read_text())
    imported_in = time.monotonic() - began
    starts = []
    for number in range(3):
        site.serve(seconds=300)
        starts.append(site.server.started_in)
        if number < 2:
            site.stop()
    # A few checks, so that what every server allocates at its first is not counted as memory of keys.
    first = ("--made-up", "--expect", "answer", "-m", 8, "--requests", 500)
    stage.load(site.server.address, *first, seconds=60, warm_up=0)
    before = site.server.resident_bytes()
    progress(f"{size:,} keys: each once, into the cache")
    filled_in = stage.fill(site.server, file)
    figures = {
        "keys": size,
        "database": database,
        "import_seconds": imported_in,
        "start_ms": statistics.median(starts) * 1e3,
        "bytes_per_key": (site.server.resident_bytes() - before) / size,
        "resident_mb": site.server.resident_bytes() / 1e6,
        "fills_per_second": size / filled_in,
    }
    say(
        f"\n{size:,} keys in {database}: import {figures['import_seconds']:.1f} s, start {figures['start_ms']:.0f} ms, "
        f"{figures['bytes_per_key']:.0f} bytes for each in memory, {figures['fills_per_second']:,.0f} reads/s"
    )
    return (site, file), figures


def beside(stage, site, file):
    """Good keys at 1 000/s, alone and beside something else: open loop, so that no stall is hidden."""
    rounds = Rounds(f"good keys at 1 000/s, of {SIZES[-1]:,}, beside something else: open loop")
    flood = ("--made-up", "--expect", "answer", "-c", 4, "-m", 256)
    others = {
        "alone": None,
        "beside 1 000 store reads/s": (*flood, "--rate", 1_000),
        "beside 10 000 made-up keys/s": (*flood, "--rate", 10_000),
    }
    for name, other in rounds.each(others):
        seconds = max(SECONDS, CHURN_SECONDS / ROUNDS)
        with Beside(stage, site, other, seconds + WARM_UP + 1):
            options = ("--keys", file, "--order", "uniform", *GOOD)
            rounds.add(name, stage.measured(site.server, *options, seconds=seconds, warm_up=WARM_UP + 0.5))
    return rounds


def churn(stage):
    """The longest look-up in a full cache while other values come and go, in process."""
    # Room for about all of them, so that each new one pushes another out.
    size = f"{SCALE_MAX * ENTRY_BYTES // 2**20}MiB"
    progress(f"{SCALE_MAX:,} keys in {size}, others come and go for {CHURN_SECONDS} s")
    command = (stage.programs["churn"], size, SCALE_MAX, "--rate", CHURN_RATE, "--seconds", CHURN_SECONDS)
    came = json.loads(stage.run(command))
    if came["put"] < 0.9 * CHURN_RATE * CHURN_SECONDS or came["found"] < 0.5 * came["lookups"]:
        raise Broken(f"that was no churn in a full cache: {came}")
    say(
        f"\n{came['entries']:,} values in {size}, {CHURN_RATE:,} others a second: of {came['lookups']:,} look-ups the longest "
        f"took {came['longest_us']:,.0f} us, or {came['longest_cpu_us']:,.0f} us of a processor"
    )
    return came | {"rate": CHURN_RATE, "seconds": CHURN_SECONDS}


class Beside:
    """Another load at the same time; if it fails, so does the measurement."""

    def __init__(self, stage, site, options, seconds):
        self.wrong = None
        work = lambda: self.run(stage, site, options, seconds)  # noqa: E731
        self.thread = threading.Thread(target=work) if options else None

    def run(self, stage, site, options, seconds):
        try:
            seed = time.time_ns()  # never the same keys twice
            stage.load(site.server.address, *options, "--seed", seed, seconds=seconds, warm_up=0)
        except Broken as why:
            self.wrong = why

    def __enter__(self):
        if self.thread:
            self.thread.start()

    def __exit__(self, *_):
        if self.thread:
            self.thread.join()
        if self.wrong:
            raise self.wrong
