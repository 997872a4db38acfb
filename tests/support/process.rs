//! Child processes that cannot outlive the test: a small shell holds each, and ends it when its own input ends, which
//! happens however the test process goes.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
};

/// A running server.
pub struct Guarded {
    shell: Child,
    input: Option<ChildStdin>,
    pid_file: PathBuf,
}

/// Starts what stands behind `$2` with its output in `$1/log`, and ends it at the end of input; then removes `$1`, unless
/// told to keep it.
const SHELL: &str = r#"
trap "" INT TERM HUP
dir=$1; shift
"$@" >>"$dir/log" 2>&1 </dev/null &
server=$!
echo $server >"$dir/shell.pid.new" && mv "$dir/shell.pid.new" "$dir/shell.pid"
read -r word
kill -QUIT $server 2>/dev/null; kill -CONT $server 2>/dev/null
wait $server
[ "$word" = keep ] || rm -rf "$dir"
"#;

impl Guarded {
    /// Starts `command`, which is a program and its arguments. `dir` is its own: it holds the output and is removed at
    /// the end.
    pub fn start(dir: &Path, command: &[&str]) -> Self {
        let pid_file = dir.join("shell.pid");
        let _ = std::fs::remove_file(&pid_file);
        let mut shell = Command::new("sh")
            .args(["-c", SHELL, "sh"])
            .arg(dir)
            .args(command)
            .stdin(Stdio::piped())
            .spawn()
            .expect("sh is there");
        let input = shell.stdin.take();
        Self { shell, input, pid_file }
    }

    /// The process id of the server, once it was started.
    pub fn pid(&self) -> Option<u32> {
        std::fs::read_to_string(&self.pid_file).ok()?.trim().parse().ok()
    }

    /// Ends the server and keeps its directory.
    pub fn stop(mut self) {
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
