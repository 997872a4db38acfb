//! Child processes that cannot outlive the test. A small shell script starts each program, and ends the program when
//! the script's standard input closes. The kernel closes that input when the test process ends, even if the test
//! process is killed.

use std::{
    ffi::OsStr,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use super::eventually;

/// A running program. Dropping this value ends the program and removes its directory.
pub struct Guarded {
    shell: Child,
    input: Option<ChildStdin>,
    dir: PathBuf,
}

/// The signal that ends a program.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// SIGQUIT, for programs that end their child processes when they receive it.
    Quit,
    /// SIGKILL, for all other programs.
    Kill,
}

/// The script that starts a program. Its arguments are a directory, the name of a signal, and the command.
///
/// The script writes the output of the program to `log` in the directory. When the script reads a line or its input
/// ends, it sends the signal to the program, writes the exit code to `exit`, and removes the directory unless the line
/// is `keep`. The program runs in a separate session, as it would under systemd: the kernel then divides processor time
/// between programs instead of between their threads (sched(7), "The autogroup feature").
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
    /// Starts `command`, a program and its arguments. Dropping the returned value ends the program with SIGQUIT. `dir`
    /// receives the output and is removed at the end, so no other program may use it.
    pub fn start(dir: &Path, command: &[&str]) -> Self {
        Self::start_with_end(End::Quit, dir, command)
    }

    /// Like [`Self::start`], but ends the program with `end`.
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
            .expect("sh is installed");
        let input = shell.stdin.take();
        Self { shell, input, dir: dir.to_owned() }
    }

    /// Returns the process id of the program; `None` if the program has not started yet.
    pub fn pid(&self) -> Option<u32> {
        std::fs::read_to_string(self.dir.join("shell.pid")).ok()?.trim().parse().ok()
    }

    /// Returns the output of the program so far: standard output and standard error.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.dir.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Returns true if the program has started and ended.
    pub fn has_ended(&self) -> bool {
        self.pid().is_some_and(has_ended)
    }

    /// Sends the signal `name`, such as `TERM`, to the program.
    ///
    /// # Panics
    /// If the program has not started yet.
    pub fn signal(&self, name: &str) {
        signal(name, &[self.pid().expect("started")]);
    }

    /// Calls `ready` every 10 ms until `ready` returns a value, and returns that value; returns `None` if the program
    /// ends first.
    ///
    /// # Panics
    /// If `ready` returns no value and the program does not end within 30 s; the message contains the output of the
    /// program.
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

    /// Waits up to `limit` for the program to exit; returns the program's exit code and output.
    pub async fn ended(mut self, limit: Duration) -> (i32, String) {
        eventually("the program ends", limit, || async { self.has_ended() }).await;
        self.keep();
        let code = std::fs::read_to_string(self.dir.join("exit")).expect("an exit code from the shell");
        let log = self.log();
        std::fs::remove_dir_all(&self.dir).expect("a test directory");
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

/// The maximum time that a program may take to become ready. Programs usually take less than 1 s.
const STARTING: Duration = Duration::from_secs(30);

/// Creates a directory for a program. The [`Guarded`] value of the program removes the directory.
pub fn directory(name: &str) -> PathBuf {
    tempfile::Builder::new().prefix(&format!("trustgate-{name}-")).tempdir().expect("a directory").keep()
}

/// Sends the signal `name`, such as `TERM`, to each of `pids`.
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

/// Returns true if a process has ended, even if its parent has not reaped it yet.
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

/// Returns a free port below the range that the kernel uses for outgoing connections, so that a server can listen on
/// the same port after a restart. Another process may take the port before the server does; the caller must then try
/// another port.
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

/// Returns the path of the first of `candidates` that is installed in `PATH` or in `/usr/sbin`. Debian installs servers
/// in `/usr/sbin`, which most users do not have in `PATH`.
///
/// # Panics
/// If none of `candidates` is installed; the message names the package to install.
pub fn program(candidates: &[&str], package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = || std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    let found =
        candidates.iter().find_map(|name| directories().map(|dir| dir.join(name)).find(|program| program.is_file()));
    found.unwrap_or_else(|| panic!("this test needs {}: `apt-get install {package}`", candidates.join(" or ")))
}
