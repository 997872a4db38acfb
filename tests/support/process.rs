//! Child processes that cannot outlive the test: a small shell holds each, and ends it when its own input ends, which
//! happens however the test process goes.

use std::{
    ffi::OsStr,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use super::eventually;

/// A running program.
pub struct Guarded {
    shell: Child,
    input: Option<ChildStdin>,
    dir: PathBuf,
}

/// How a program is ended that does not end by itself.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// SIGQUIT: for programs that have children of their own and end them then.
    Quit,
    /// SIGKILL.
    Kill,
}

/// Starts what stands behind `$3` with its output in `$1/log`, and ends it with signal `$2` at the end of input, with its
/// exit code in `$1/exit`; then removes `$1`, unless told to keep it. A session of its own, as service managers give each,
/// lets the system share out processors between programs and not between their threads (sched(7), "The autogroup feature").
const SHELL: &str = r#"
trap "" INT TERM HUP
dir=$1; end=$2; shift 2
setsid "$@" >>"$dir/log" 2>&1 </dev/null &
server=$!
echo $server >"$dir/shell.pid.new" && mv "$dir/shell.pid.new" "$dir/shell.pid"
read -r word
kill -$end $server 2>/dev/null; kill -CONT $server 2>/dev/null
wait $server 2>/dev/null
echo $? >"$dir/exit"
[ "$word" = keep ] || rm -rf "$dir"
"#;

impl Guarded {
    /// Starts `command`, which is a program and its arguments; SIGQUIT ends it. `dir` is its own: it holds the output and
    /// is removed at the end.
    pub fn start(dir: &Path, command: &[&str]) -> Self {
        Self::start_to(End::Quit, dir, command)
    }

    /// The same for a program that ends by `end`.
    pub fn start_to<S: AsRef<OsStr>>(end: End, dir: &Path, command: &[S]) -> Self {
        for left in ["shell.pid", "exit"] {
            let _ = std::fs::remove_file(dir.join(left));
        }
        let mut shell = Command::new("sh")
            .args(["-c", SHELL, "sh"])
            .arg(dir)
            .arg(match end {
                End::Quit => "QUIT",
                End::Kill => "KILL",
            })
            .args(command)
            .stdin(Stdio::piped())
            .spawn()
            .expect("sh is there");
        let input = shell.stdin.take();
        Self { shell, input, dir: dir.to_owned() }
    }

    /// The process id of the program, once it was started.
    pub fn pid(&self) -> Option<u32> {
        std::fs::read_to_string(self.dir.join("shell.pid")).ok()?.trim().parse().ok()
    }

    /// What the program wrote so far, on either stream.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.dir.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether the program was started and is there no more.
    pub fn has_ended(&self) -> bool {
        self.pid().is_some_and(has_ended)
    }

    /// Sends the program a signal.
    ///
    /// # Panics
    /// If it was not started yet.
    pub fn signal(&self, name: &str) {
        signal(name, &[self.pid().expect("started")]);
    }

    /// Asks `ready` until it gives something; `None` if the program ended before.
    ///
    /// # Panics
    /// If neither happens in 30 s, with what the program wrote.
    pub async fn until<T>(&self, ready: impl AsyncFn() -> Option<T>) -> Option<T> {
        let asked = tokio::time::timeout(STARTING, async {
            loop {
                let ended = self.has_ended();
                if let Some(found) = ready().await {
                    return Some(found);
                }
                if ended {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        asked.await.unwrap_or_else(|_| panic!("neither ready nor ended within {STARTING:?}:\n{}", self.log()))
    }

    /// Waits at most `limit` for the program to end by itself; returns its exit code and what it wrote.
    pub async fn ended(mut self, limit: Duration) -> (i32, String) {
        eventually("the program ends", limit, || async { self.has_ended() }).await;
        self.keep();
        let code = std::fs::read_to_string(self.dir.join("exit")).expect("the shell wrote it");
        let log = self.log();
        std::fs::remove_dir_all(&self.dir).expect("it is ours");
        (code.trim().parse().expect("a number"), log)
    }

    /// Ends the program and keeps its directory.
    pub fn stop(mut self) {
        self.keep();
    }

    fn keep(&mut self) {
        if let Some(mut input) = self.input.take() {
            input.write_all(b"keep\n").expect("the shell reads");
        }
        self.shell.wait().expect("the shell ends");
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.shell.wait();
    }
}

/// How long a program may take to be ready; usual: less than 1 s.
const STARTING: Duration = Duration::from_secs(30);

/// A directory for a program; it goes with its [`Guarded`].
pub fn directory(name: &str) -> PathBuf {
    tempfile::Builder::new().prefix(&format!("trustgate-{name}-")).tempdir().expect("a directory").keep()
}

/// Sends processes a signal.
pub fn signal(name: &str, pids: &[u32]) {
    let signal = match name {
        "CONT" => Signal::CONT,
        "HUP" => Signal::HUP,
        "INT" => Signal::INT,
        "KILL" => Signal::KILL,
        "QUIT" => Signal::QUIT,
        "STOP" => Signal::STOP,
        "TERM" => Signal::TERM,
        "USR1" => Signal::USR1,
        "USR2" => Signal::USR2,
        other => panic!("add the signal {other} here"),
    };
    for pid in pids {
        let pid = i32::try_from(*pid).ok().and_then(Pid::from_raw).expect("a process id");
        // A process that ended meanwhile is none to signal.
        let _ = kill_process(pid, signal);
    }
}

/// Whether a process is there no more, or only waits to be reaped.
pub fn has_ended(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

/// Processes that are stopped until this is dropped.
pub struct Frozen(pub(super) Vec<u32>);

impl Frozen {
    /// Stops one process (SIGSTOP).
    pub fn of(pid: u32) -> Self {
        signal("STOP", &[pid]);
        Self(vec![pid])
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        signal("CONT", &self.0);
    }
}

/// A port nobody listens on, below the range that the system gives to outgoing connections: a server that is restarted
/// finds it free. Somebody may still take it before the server does; then try another.
pub fn free_port() -> u16 {
    loop {
        let mut random = [0; 2];
        getrandom::fill(&mut random).expect("the system's random numbers");
        let port = 20_000 + u16::from_be_bytes(random) % 12_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// The first of `candidates` in `PATH` or `/usr/sbin`, where Debian puts servers and which is in few users' `PATH`.
///
/// # Panics
/// If there is none, with the package that brings it.
pub fn program(candidates: &[&str], package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = || std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    let found =
        candidates.iter().find_map(|name| directories().map(|dir| dir.join(name)).find(|program| program.is_file()));
    found.unwrap_or_else(|| panic!("this test needs {}: `apt-get install {package}`", candidates.join(" or ")))
}
