"""Instructions per check, counted by valgrind: the same on every run, whatever else the machine does.

Counted is what a server does in user mode for N checks and for twice as many; the difference is what N checks cost, without
start and end. Each step of a check is counted in the same way in process. The kernel's part is not in it, and valgrind's
processor has no instructions for SHA-256, so that hashing a key counts for much more than it takes.
"""

import re
import subprocess

from rounds import BRIEF, ROUNDS, UNHURRIED, Rounds
from stage import Broken, make_keys, progress, say

CHECKS = 500 if BRIEF else 10_000
STEPS = 200 if BRIEF else 2_000
TIMED = 20_000 if BRIEF else 1_000_000
# callgrind can leave out what surrounds a step, but does not survive a signal to a server of many threads.
CALLGRIND = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
CACHEGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
FLAGS = ("-c", 4, "-m", 32)
# What is slow here is valgrind; and a poll now and then is no part of a check.
SETTINGS = UNHURRIED | {"freshness.poll_interval": "20s", "freshness.poll_timeout": "5s", "freshness.lease": "60s"}


def measure(stage):
    """Of servers, and of the steps in process."""
    redis = stage.redis()
    site = stage.site(**SETTINGS, **{"redis.url": f"redis://{redis.address}/0"})
    keys = make_keys(100)
    file = site.issue(keys, 10, stage.dir / "keys")
    trustless = stage.dir / "keys-alone"
    trustless.write_text("".join(f"{key}\n" for key in keys))

    servers = {}
    for name, start, end, file in (
        ("yardstick, as written", lambda: stage.yardstick(False, CACHEGRIND), stage.stop, trustless),
        ("yardstick, current-thread", lambda: stage.yardstick(True, CACHEGRIND), stage.stop, trustless),
        ("trustgate, L1 hit", lambda: site.serve(CACHEGRIND, seconds=300), lambda _: site.stop(), file),
    ):
        servers[name] = per_check(stage, name, start, end, file)
    say("\nuser instructions per check")
    for name, count in servers.items():
        say(f"  {name:42} {count:>10,.0f}")
    ratio = servers["trustgate, L1 hit"] / servers["yardstick, current-thread"]
    say(f"  trustgate to yardstick, current-thread: {ratio:.2f}")
    return {"servers": servers, "ratio": ratio, "checks": CHECKS, "steps": steps(stage, site, keys[0])}


def per_check(stage, name, start, end, file):
    counts = []
    for times in (1, 2):
        progress(f"valgrind: {name}: {times * CHECKS:,} checks")
        server = start()
        stage.fill(server, file)
        stage.load(server.address, "--keys", file, *FLAGS, "--requests", times * CHECKS, seconds=600, warm_up=0)
        end(server)
        counts.append(collected(server.log.read_text()))
    return (counts[1] - counts[0]) / CHECKS


def steps(stage, site, key):
    """Instructions and nanoseconds of each step of a check in process, an L1 hit."""
    environment = site.environment()

    def run(step, count, wrap=()):
        command = ["taskset", "-c", stage.server_cpu, *wrap, stage.programs["steps"], step, count, "--key", key]
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
        raise Broken("valgrind did not say what it counted:\n" + log[-2000:])
    return int("".join(found[-1]).replace(",", ""))
