//! Child processes that cannot outlive the test. A small shell starts each program, and ends it when the shell's
//! standard input closes. That happens however the test process ends.

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

/// How to end a program that does not end by itself.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// SIGQUIT, for programs that then end their own children.
    Quit,
    /// SIGKILL.
    Kill,
}

/// Starts the command in the arguments after `$2`, with its output in `$1/log`. At the end of input, sends signal `$2`
/// to the program, writes its exit code to `$1/exit`, and removes `$1` unless the input was `keep`. The program runs in
/// a separate session, as under a service manager: the kernel then divides processor time between programs instead of
/// between their threads (sched(7), "The autogroup feature").
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
    /// Starts `command`, a program and its arguments, and later ends it with SIGQUIT. No other program may use `dir`:
    /// it contains the output, and is removed at the end.
    pub fn start(dir: &Path, command: &[&str]) -> Self {
        Self::start_with_end(End::Quit, dir, command)
    }

    /// As [`Self::start`], but later ends the program with `end`.
    pub fn start_with_end<S: AsRef<OsStr>>(end: End, dir: &Path, command: &[S]) -> Self {
        for old in ["shell.pid", "exit"] {
            let _ = std::fs::remove_file(dir.join(old));
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

    /// The process id of the program; `None` if the program has not started yet.
    pub fn pid(&self) -> Option<u32> {
        std::fs::read_to_string(self.dir.join("shell.pid")).ok()?.trim().parse().ok()
    }

    /// The output of the program so far: standard output and standard error.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.dir.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// True if the program was started and has ended.
    pub fn has_ended(&self) -> bool {
        self.pid().is_some_and(has_ended)
    }

    /// Sends a signal to the program.
    ///
    /// # Panics
    /// If it was not started yet.
    pub fn signal(&self, name: &str) {
        signal(name, &[self.pid().expect("started")]);
    }

    /// Calls `ready` until it returns a value; returns `None` if the program ends first.
    ///
    /// # Panics
    /// If neither happens within 30 s; the message contains the output of the program.
    pub async fn until<T>(&self, ready: impl AsyncFn() -> Option<T>) -> Option<T> {
        let waiting = tokio::time::timeout(STARTING, async {
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
        waiting.await.unwrap_or_else(|_| panic!("neither ready nor ended within {STARTING:?}:\n{}", self.log()))
    }

    /// Waits until the program ends by itself, for at most `limit`; returns its exit code and its output.
    pub async fn ended(mut self, limit: Duration) -> (i32, String) {
        eventually("the program ends", limit, || async { self.has_ended() }).await;
        self.keep();
        let code = std::fs::read_to_string(self.dir.join("exit")).expect("an exit code from the shell");
        let log = self.log();
        std::fs::remove_dir_all(&self.dir).expect("a directory of the test");
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

/// The maximum time that a program may take to become ready; usually less than 1 s.
const STARTING: Duration = Duration::from_secs(30);

/// Creates a directory for a program; its [`Guarded`] removes the directory.
pub fn directory(name: &str) -> PathBuf {
    tempfile::Builder::new().prefix(&format!("trustgate-{name}-")).tempdir().expect("a directory").keep()
}

/// Sends a signal to processes.
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
        // Ignore the error: the process may have ended in the meantime.
        let _ = kill_process(pid, signal);
    }
}

/// True if a process has ended, whether or not it was reaped.
pub fn has_ended(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

/// Paused processes, which continue when this value is dropped.
pub struct Frozen(pub(super) Vec<u32>);

impl Frozen {
    /// Pauses one process (SIGSTOP).
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

/// A free port below the range that the kernel uses for outgoing connections, so that a restarted server can use it
/// again. Another process may take it before the server does; the caller then tries another port.
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

/// The first of `candidates` in `PATH` or in `/usr/sbin`, where Debian installs servers and which few users have in
/// `PATH`.
///
/// # Panics
/// If there is none; the message names the package to install.
pub fn program(candidates: &[&str], package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = || std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    let found =
        candidates.iter().find_map(|name| directories().map(|dir| dir.join(name)).find(|program| program.is_file()));
    found.unwrap_or_else(|| panic!("this test needs {}: `apt-get install {package}`", candidates.join(" or ")))
}
