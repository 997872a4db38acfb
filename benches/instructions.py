"""Counts instructions per check with valgrind. The count does not depend on the other programs of the machine.

valgrind counts a server's user-mode instructions for N checks and for 2 N checks. The difference is the cost of N
checks without the server's start and stop. Each step of a check is counted in the same way, in process. The count
excludes the kernel. valgrind's processor has no SHA-256 instructions, so the count for hashing a key is much too high.
"""

import re
import subprocess

from fixture import Broken, make_keys, progress, say
from rounds import BRIEF, LONG_DEADLINES, ROUNDS, Rounds

CHECKS = 500 if BRIEF else 10_000
STEPS = 200 if BRIEF else 2_000
TIMED = 20_000 if BRIEF else 1_000_000
# callgrind can count a single step, but fails when a server with several threads gets a signal. Servers use cachegrind.
CALLGRIND = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
CACHEGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
FLAGS = ("-c", 4, "-m", 32)
# The deadlines are long because valgrind is slow. Polls are rare because they are not part of a check.
SETTINGS = LONG_DEADLINES | {"freshness.poll_interval": "20s", "freshness.poll_timeout": "5s", "freshness.lease": "60s"}


def measure(fixture):
    """Counts the instructions of each server, and of the steps in process."""
    redis = fixture.redis()
    instance = fixture.instance(**SETTINGS, **{"redis.url": f"redis://{redis.address}/0"})
    keys = make_keys(100)
    file = instance.issue(keys, 10, fixture.dir / "keys")
    keys_only = fixture.dir / "keys-only"
    keys_only.write_text("".join(f"{key}\n" for key in keys))

    servers = {}
    for name, start, end, file in (
        ("yardstick, as written", lambda: fixture.yardstick(False, CACHEGRIND), fixture.stop, keys_only),
        ("yardstick, current-thread", lambda: fixture.yardstick(True, CACHEGRIND), fixture.stop, keys_only),
        ("trustgate, L1 hit", lambda: instance.serve(CACHEGRIND, seconds=300), lambda _: instance.stop(), file),
    ):
        servers[name] = per_check(fixture, name, start, end, file)
    say("\nuser instructions per check")
    for name, count in servers.items():
        say(f"  {name:42} {count:>10,.0f}")
    ratio = servers["trustgate, L1 hit"] / servers["yardstick, current-thread"]
    say(f"  trustgate to yardstick, current-thread: {ratio:.2f}")
    return {"servers": servers, "ratio": ratio, "checks": CHECKS, "steps": steps(fixture, instance, keys[0])}


def per_check(fixture, name, start, end, file):
    counts = []
    for times in (1, 2):
        progress(f"valgrind: {name}: {times * CHECKS:,} checks")
        server = start()
        fixture.fill(server, file)
        fixture.load(server.address, "--keys", file, *FLAGS, "--requests", times * CHECKS, seconds=600, warm_up=0)
        end(server)
        counts.append(collected(server.log.read_text()))
    return (counts[1] - counts[0]) / CHECKS


def steps(fixture, instance, key):
    """Measures instructions and nanoseconds of each step of a check that hits L1, in process."""
    environment = instance.environment()

    def run(step, count, wrap=()):
        command = ["taskset", "-c", fixture.server_cpu, *wrap, fixture.programs["steps"], step, count, "--key", key]
        command = [str(word) for word in command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            raise Broken(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done

    names = ("parse", "extract", "hash", "decide", "encode", "check")
    counted = {}
    for step in names:
        progress(f"valgrind: {step}")
        wrap = (*CALLGRIND, "--toggle-collect=*steps*measured*")
        once, twice = (collected(run(step, times * STEPS, wrap).stderr) for times in (1, 2))
        counted[step] = (twice - once) / STEPS
    timed = {step: [] for step in names}
    for number in range(ROUNDS):
        for step in names:
            progress(f"time of {step}: round {number + 1} of {ROUNDS}")
            timed[step].append(int(run(step, TIMED).stdout))
    progress("")
    say("\nin process, an L1 hit                        instructions   nanoseconds")
    for step in names:
        say(f"  {step:42} {counted[step]:>12,.0f} {sorted(timed[step])[ROUNDS // 2]:>13,}")
    rest = counted["check"] - sum(counted[step] for step in names if step != "check")
    say(f"  {'look-up, metrics and the rest of check':42} {rest:>12,.0f}")
    return {
        step: {"instructions": counted[step], "nanos": Rounds.spread_of(timed[step])} for step in names
    } | {"rest": {"instructions": rest}}


def collected(log):
    found = re.findall(r"Collected : (\d+)|I +refs: +([\d,]+)", log)
    if not found:
        raise Broken("valgrind printed no count:\n" + log[-2000:])
    return int("".join(found[-1]).replace(",", ""))
