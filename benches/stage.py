"""The programs that a benchmark runs, each in its place: servers on one processor, the sender and the rest on another.

Everything that is started ends with the stage, and everything that is written is in a directory under target/ that goes
with it. No setting of the caller reaches a program.
"""

import glob
import hashlib
import http.client
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS_MAX = 60  # for each program to be ready, for each command to end, beyond what it is told to take
LATE_MAX = 0.001
TICKS = os.sysconf("SC_CLK_TCK")


class Broken(Exception):
    """The benchmark cannot go on, or what it would show is not true."""


class Stage:
    """Everything that runs."""

    def __init__(self, programs):
        self.programs = programs  # where trustgate, always_allow, load and envoy are
        self.children = []
        self.elsewhere = []  # directories that others must be able to reach
        processors = sorted(os.sched_getaffinity(0))
        if len(processors) < 2:
            raise Broken("two processors are needed: one for the server, one for what drives it")
        self.server_cpu, self.other_cpu = processors[0], processors[-1]

    def __enter__(self):
        for program in self.programs.values():
            if not Path(program).is_file():
                raise Broken(f"{program} is not there; make it with `make bench-ready`")
        for name in ("taskset", "redis-server"):
            if not shutil.which(name):
                raise Broken(f"{name} is missing; tools/packages says how to install it")
        self.dir = Path(tempfile.mkdtemp(prefix="bench-", dir=ROOT / "target"))
        return self

    def __exit__(self, *_):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave anything running
        for child in reversed(self.children):
            child.stop()
        for directory in (self.dir, *self.elsewhere):
            shutil.rmtree(directory, ignore_errors=True)

    # --- servers

    def start(self, name, command, cpu, env=None, stop_signal=signal.SIGTERM, wrap=(), out_is_kept=True):
        """Starts a program on one processor; `wrap` is what it is run under."""
        command = ["taskset", "-c", str(cpu), *wrap, *command]
        command = [str(part) for part in command]
        child = Child(name, command, env or clean_environment(), self.dir, stop_signal, out_is_kept)
        self.children.append(child)
        return child

    def stop(self, child):
        child.stop()
        self.children.remove(child)

    def yardstick(self, current_thread, wrap=()):
        address = free_address()
        name = "yardstick-current-thread" if current_thread else "yardstick"
        options = ["--current-thread"] if current_thread else []
        command = [self.programs["always_allow"], "--listen", address, *options]
        server = self.start(name, command, self.server_cpu, wrap=wrap)
        server.address = address
        self.wait(server, lambda: accepts(address))
        return server

    def redis(self):
        address = free_address()
        options = ["--bind", "127.0.0.1", "--port", address.rpartition(":")[2], "--save", "", "--appendonly", "no"]
        server = self.start("redis", ["redis-server", *options, "--dir", self.dir], self.other_cpu)
        server.address = address
        self.wait(server, lambda: accepts(address))
        return server

    def postgres(self):
        """A PostgreSQL as it comes, reached through a socket in its directory `home`."""
        home = Path(tempfile.mkdtemp(prefix="trustgate-bench-"))
        self.elsewhere.append(home)
        wrap = ()
        if os.geteuid() == 0:  # as which it refuses to run
            nobody = pwd.getpwnam("nobody")
            os.chown(home, nobody.pw_uid, nobody.pw_gid)
            wrap = ("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups")
        command = [*wrap, postgres_program("initdb"), "--username=admin", "--auth=trust", "--no-locale", "--encoding=UTF8"]
        self.run([*command, "-D", home / "data"])
        options = ("-D", home / "data", "-k", home, "-c", "listen_addresses=")
        server = self.start("postgres", [postgres_program("postgres"), *options], self.other_cpu, None, signal.SIGINT, wrap)
        server.home = home
        self.wait(server, lambda: (home / "data" / "postmaster.pid").exists() and accepts_at(home / ".s.PGSQL.5432"))
        return server

    def database(self, server, name):
        """A new database; its URL."""
        self.run([postgres_program("createdb"), "-h", server.home, "-U", "admin", name])
        return f"postgres://admin@localhost/{name}?host={server.home}"

    def run(self, command):
        command = [str(word) for word in command]
        done = subprocess.run(command, env=clean_environment(), cwd="/", capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            raise Broken(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout

    def site(self, name="site", **settings):
        """Where a trustgate has its database, with its settings: {"section.name": value}."""
        return Site(self, name, settings)

    def wait(self, child, probe, seconds=SECONDS_MAX):
        end = time.monotonic() + seconds
        while not probe():
            child.alive()
            if time.monotonic() > end:
                raise Broken(f"waited {seconds} s for {child.name}" + child.tail())
            time.sleep(0.01)

    # --- load

    def load(self, address, *options, seconds, warm_up=1.0, cpu=None):
        """Sends checks; what came of them. Raises if that is not what was expected.

        `others` is how much of a processor went to whatever else the machine does.
        """
        began, all_before, own_before = time.monotonic(), machine_seconds(), self.own_seconds()
        command = [self.programs["load"], address, "--seconds", seconds, "--warm-up", warm_up, *options]
        command = ["taskset", "-c", self.other_cpu if cpu is None else cpu, *command]
        command = [str(part) for part in command]
        sender = subprocess.Popen(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = sender.communicate(timeout=seconds + warm_up + SECONDS_MAX)
        except subprocess.TimeoutExpired:
            raise Broken(f"the sender did not end: {' '.join(command)}") from None
        finally:
            if sender.poll() is None:
                sender.kill()
                sender.communicate()
        if sender.returncode != 0:
            for child in self.children:
                child.alive()
            raise Broken(f"{' '.join(command)}\n{err}{out}" + "".join(child.tail() for child in self.children))
        came = json.loads(out)
        others = machine_seconds() - all_before - (self.own_seconds() - own_before)
        came["others"] = max(others, 0.0) / (time.monotonic() - began)
        return came

    def own_seconds(self):
        """Processor time of everything that runs here, and of this program."""
        return sum(child.cpu_seconds() for child in self.children) + sum(os.times()[:4])

    def fill(self, server, file, *more):
        """Every key of the file into the cache; how long that took. What could not be read in time is read in another pass."""
        seconds = 0.0
        for _ in range(5):
            options = ("--keys", file, "--order", "once", "--expect", "answer", "-c", 4, "-m", 8, *more)
            came = self.load(server.address, *options, seconds=7_200, warm_up=0)
            seconds += came["seconds"]
            if came["denials"] + came["faults"] == 0:
                return seconds
        raise Broken(f"after five passes {came['faults']} keys could still not be read" + server.tail())

    def grants(self, address, *options, **more):
        """The same, where every check is granted, but for a few that fail because the machine stood still meanwhile."""
        came = self.load(address, *options, "--expect", "answer", **more)
        if came["denials"] > 0 or came["faults"] > LATE_MAX * came["answered"]:
            raise Broken(f"of {came['answered']} checks {came['denials']} were denied, {came['faults']} failed")
        return came

    def measured(self, server, *options, **more):
        """Checks that are granted, where nothing else is expected, and what they cost `server`: `cpu_us` each."""
        before = server.cpu_seconds()
        load = self.load if "--expect" in options else self.grants
        came = load(server.address, *options, **more)
        came["cpu_us"] = (server.cpu_seconds() - before) * 1e6 / came["answered"]
        return came


class Site:
    """A trustgate with its database and its settings."""

    def __init__(self, stage, name, settings):
        self.stage, self.name, self.server = stage, name, None
        self.state = stage.dir / name
        self.state.mkdir()
        self.admin = free_address()
        self.settings = {"grpc.listen": free_address(), "admin.listen": self.admin, **settings}

    def environment(self, settings=None):
        named = {f"TRUSTGATE__{n.upper().replace('.', '__')}": str(v) for n, v in (settings or self.settings).items()}
        return clean_environment() | {"STATE_DIRECTORY": str(self.state)} | named

    def serve(self, wrap=(), seconds=SECONDS_MAX, **changes):
        """Starts the server and waits until it is ready; how long that took is `started_in`."""
        settings = self.settings | changes
        began = time.monotonic()
        self.server = self.stage.start(
            "trustgate",
            [self.stage.programs["trustgate"], "serve"],
            self.stage.server_cpu,
            self.environment(settings),
            signal.SIGINT,  # without the drain delay
            wrap,
        )
        self.stage.wait(self.server, lambda: get(self.admin, "/readyz") is not None, seconds)
        self.server.started_in = time.monotonic() - began
        self.server.address = settings["grpc.listen"]
        return self.server

    def stop(self):
        self.stage.stop(self.server)

    def command(self, *words, seconds=SECONDS_MAX):
        """A command of trustgate; gives what it answered."""
        command = [str(word) for word in (self.stage.programs["trustgate"], "--output", "json", *words)]
        done = subprocess.run(
            command,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if done.returncode != 0:
            raise Broken(f"`trustgate {' '.join(command[3:])}` ended with {done.returncode}:\n{done.stderr}")
        return json.loads(done.stdout or "null")

    def issue(self, keys, trusts, file, prefix="tenant"):
        """Imports keys, spread evenly over that many trusts, and writes them to `file` with the trust of each."""
        self.command("migrate")
        ids = [self.command("trust", "create", f"{prefix}-{number}")["id"] for number in range(trusts)]
        for number, trust in enumerate(ids):
            chunk = self.state / "import"
            chunk.write_text("".join(f"{sha256(key)}\n" for key in keys[number::trusts]))
            self.command("key", "import", "--trust", trust, chunk, seconds=600)
            chunk.unlink()
        file.write_text("".join(f"{key} {ids[place % trusts]}\n" for place, key in enumerate(keys)))
        return file

    def metric(self, line):
        """The value of a metric, named with its labels as /metrics writes it; 0 if it is not there."""
        for found in (get(self.admin, "/metrics") or "").splitlines():
            name, _, value = found.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0

    def lookups(self, tier, outcome):
        return self.metric(f'trustgate_cache_lookups_total{{kind="api_key",outcome="{outcome}",tier="{tier}"}}')


class Child:
    """A program that was started; what it says is in a file."""

    def __init__(self, name, command, env, directory, stop_signal, out_is_kept=True):
        self.name, self.stop_signal = name, stop_signal
        self.log = directory / f"{name}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=env,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log if out_is_kept else subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches only the benchmark, which then stops everything in order
            )

    def alive(self):
        if self.process.poll() is not None:
            raise Broken(f"{self.name} ended with status {self.process.returncode}" + self.tail())

    def tail(self):
        last = self.log.read_text(errors="replace").splitlines()[-10:]
        return f"\n--- the end of the log of {self.name}:\n" + "\n".join(last or ["(empty)"])

    def stop(self, seconds=30):
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def cpu_seconds(self):
        """User and system time so far, of all threads, those that ended too."""
        if self.process.poll() is not None:
            return 0.0  # it is counted among the children that ended
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident_bytes(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise Broken(f"{self.name} has no resident memory")


# --- keys

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def make_keys(count, seed=1):
    """Keys of trustgate's own form: docs of `credential::format`. The same every time."""
    source = random.Random(seed)
    keys = []
    for _ in range(count):
        body = "".join(source.choices(ALPHABET, k=43))
        keys.append(f"tg_{body}{base62(zlib.crc32(f'tg_{body}'.encode()), 6)}")
    return keys


def base62(number, digits):
    text = []
    for _ in range(digits):
        number, digit = divmod(number, 62)
        text.append(ALPHABET[digit])
    return "".join(reversed(text))


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# --- small things


def clean_environment():
    unwanted = ("STATE_DIRECTORY", "RUST_LOG")
    return {k: v for k, v in os.environ.items() if not k.startswith("TRUSTGATE") and k not in unwanted}


def machine_seconds():
    """Processor time that was not idle, of the whole machine, and what a hypervisor kept for others."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


_given = set()


def free_address():
    """A port nobody listens on, below the range that the system gives to outgoing connections; never the same twice."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return f"127.0.0.1:{port}"


def accepts_at(path):
    """Whether somebody listens on that Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
            return True
        except OSError:
            return False


def postgres_program(name):
    """Debian keeps the server's programs out of PATH."""
    for place in (shutil.which(name), *sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))):
        if place:
            return place
    raise Broken(f"PostgreSQL's {name} is missing; tools/packages says how to install it")


def accepts(address):
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        return True
    except OSError:
        return False


def get(address, path):
    """The body of a 200, else None."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read().decode()
        return body if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def answers(address, path):
    """Whether there is any answer."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().read() is not None
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def say(line=""):
    print(line, flush=True)


def progress(text):
    """Shows what is being done: on a terminal in one line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)
