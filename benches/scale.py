"""Measures servers with 1 000 to 1 000 000 keys: memory, hits, start, import, floods of made-up keys, and churn.

SCALE_MAX is the largest number of keys (1 000 000). Hits are measured with the embedded database, because the cost of a
cache hit does not depend on the database.
"""

import json
import os
import statistics
import threading
import time

from fixture import Broken, make_keys, progress, say
from rounds import BRIEF, LONG_DEADLINES, ROUNDS, SECONDS, WARM_UP, Rounds

SCALE_MAX = int(os.environ.get("SCALE_MAX", 5_000 if BRIEF else 1_000_000))
SIZES = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size < SCALE_MAX] + [SCALE_MAX]
IMPORT_MAX = 500_000  # the most keys for one `key import`
CHURN_SECONDS = 2 if BRIEF else 60
CHURN_RATE = 1_000
ENTRY_BYTES = 512  # the assumed memory of one cache entry
HIT_FLAGS = ("-c", 4, "-m", 32)
GOOD = ("-c", 4, "-m", 32, "--rate", 1_000)


def measure(fixture):
    """Measures every size with a server of its own, and then hits of all sizes in interleaved rounds."""
    postgres = fixture.postgres()
    instances, sizes = {}, {}
    for size in SIZES:
        url = fixture.database(postgres, f"keys_{size}")
        (instance, _), sizes[f"{size}, PostgreSQL"] = fill(fixture, size, "PostgreSQL", **{"store.url": url})
        instance.stop()
        instances[size], sizes[f"{size}, SQLite"] = fill(fixture, size, "SQLite")
    fixture.stop(postgres)
    hits = Rounds("hits, keys uniformly at random: closed loop")
    names = {f"{size:,} keys": size for size in SIZES}
    for name, size in hits.each(names):
        instance, file = instances[size]
        options = ("--keys", file, "--order", "uniform", *HIT_FLAGS)
        hits.add(name, fixture.measured(instance.server, *options, seconds=SECONDS, warm_up=WARM_UP))
    ratio = hits.ratio(f"{SIZES[-1]:,} keys", f"{SIZES[0]:,} keys", "checks_per_second")
    for size in SIZES[:-1]:
        instances[size][0].stop()
    instance, file = instances[SIZES[-1]]
    other_load = with_other_load(fixture, instance, file).figures()
    instance.stop()
    result = {"sizes": sizes, "hits": hits.figures(), "ratio": ratio, "beside": other_load}
    return result | {"churn": churn(fixture)}


def fill(fixture, size, database, **settings):
    """Starts a server and fills its cache with `size` keys. Returns it, the file of keys, and the measured figures."""
    progress(f"{size:,} keys: generating them")
    # The cache has room for all keys, because this measures the memory that they need.
    settings |= {"cache.size": "2GiB", "cache.value_age_max": "6h"} | (LONG_DEADLINES if BRIEF else {})
    instance = fixture.instance(f"{database}-{size}", **settings)
    keys = make_keys(size)
    file = fixture.dir / f"keys-{size}"
    progress(f"{size:,} keys: importing them")
    began = time.monotonic()
    with file.open("w") as lines:
        for part in range(0, size, IMPORT_MAX):
            chunk = fixture.dir / "part"
            instance.issue(keys[part : part + IMPORT_MAX], 1, chunk, prefix=f"part-{part}")
            lines.write(chunk.read_text())
    imported_in = time.monotonic() - began
    starts = []
    for number in range(3):
        instance.serve(seconds=300)
        starts.append(instance.server.started_in)
        if number < 2:
            instance.stop()
    # Sends a few checks first, so that the memory that every server allocates for them does not count for the keys.
    first = ("--made-up", "--expect", "answer", "-m", 8, "--requests", 500)
    fixture.load(instance.server.address, *first, seconds=60, warm_up=0)
    before = instance.server.resident_bytes()
    progress(f"{size:,} keys: filling the cache")
    filled_in = fixture.fill(instance.server, file)
    figures = {
        "keys": size,
        "database": database,
        "import_seconds": imported_in,
        "start_ms": statistics.median(starts) * 1e3,
        "bytes_per_key": (instance.server.resident_bytes() - before) / size,
        "resident_mb": instance.server.resident_bytes() / 1e6,
        "fills_per_second": size / filled_in,
    }
    say(
        f"\n{size:,} keys in {database}: import {figures['import_seconds']:.1f} s, start {figures['start_ms']:.0f} ms, "
        f"{figures['bytes_per_key']:.0f} bytes of memory per key, {figures['fills_per_second']:,.0f} reads/s"
    )
    return (instance, file), figures


def with_other_load(fixture, instance, file):
    """Measures good keys at 1 000/s with and without other load. In an open loop, a stall shows in the latency."""
    rounds = Rounds(f"{SIZES[-1]:,} good keys at 1 000/s with other load: open loop")
    flood = ("--made-up", "--expect", "answer", "-c", 4, "-m", 256)
    loads = {
        "no other load": None,
        "with 1 000 store reads/s": (*flood, "--rate", 1_000),
        "with 10 000 made-up keys/s": (*flood, "--rate", 10_000),
    }
    for name, load in rounds.each(loads):
        seconds = max(SECONDS, CHURN_SECONDS / ROUNDS)
        with OtherLoad(fixture, instance, load, seconds + WARM_UP + 1):
            options = ("--keys", file, "--order", "uniform", *GOOD)
            rounds.add(name, fixture.measured(instance.server, *options, seconds=seconds, warm_up=WARM_UP + 0.5))
    return rounds


def churn(fixture):
    """Measures the longest look-up in a full cache during inserts and evictions, in process."""
    # The cache has room for about all keys, so that each new entry evicts another.
    size = f"{SCALE_MAX * ENTRY_BYTES // 2**20}MiB"
    progress(f"{SCALE_MAX:,} keys in {size}: inserts and evictions for {CHURN_SECONDS} s")
    command = (fixture.programs["churn"], size, SCALE_MAX, "--rate", CHURN_RATE, "--seconds", CHURN_SECONDS)
    result = json.loads(fixture.run(command))
    if result["put"] < 0.9 * CHURN_RATE * CHURN_SECONDS or result["found"] < 0.5 * result["lookups"]:
        raise Broken(f"churn: too few inserts or hits for a full cache: {result}")
    say(
        f"\n{result['entries']:,} entries in {size}, {CHURN_RATE:,} inserts/s: of {result['lookups']:,} look-ups the "
        f"longest took {result['longest_us']:,.0f} us; the most processor time of one was "
        f"{result['longest_cpu_us']:,.0f} us"
    )
    return result | {"rate": CHURN_RATE, "seconds": CHURN_SECONDS}


class OtherLoad:
    """Sends another load during a measurement. If this load fails, the measurement fails."""

    def __init__(self, fixture, instance, options, seconds):
        self.error = None
        work = lambda: self.run(fixture, instance, options, seconds)  # noqa: E731
        self.thread = threading.Thread(target=work) if options else None

    def run(self, fixture, instance, options, seconds):
        try:
            seed = time.time_ns()  # other keys in each round
            fixture.load(instance.server.address, *options, "--seed", seed, seconds=seconds, warm_up=0)
        except Broken as error:
            self.error = error

    def __enter__(self):
        if self.thread:
            self.thread.start()

    def __exit__(self, *_):
        if self.thread:
            self.thread.join()
        if self.error:
            raise self.error
