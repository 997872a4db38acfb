//! Runs the real program with an empty environment, in a temporary directory that also contains the database.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

/// A temporary directory in which the program runs, and the environment variables of the program.
pub struct Place {
    dir: TempDir,
    variables: Vec<(String, String)>,
}

/// The exit code and the output of one run of the program.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Place {
    /// Creates an empty directory and sets no environment variables.
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), variables: Vec::new() }
    }

    /// Creates a directory and runs `trustgate migrate`, which creates the database in it.
    pub fn migrated() -> Self {
        let place = Self::new();
        place.run(&["migrate"]).done();
        place
    }

    /// Adds an environment variable.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Copies the environment variables from `other`, but not its directory.
    pub fn like(mut self, other: &Self) -> Self {
        self.variables.clone_from(&other.variables);
        self
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes a file to the directory.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.feed(arguments, "")
    }

    /// Runs the program with `/dev/full` as standard output, so that each write fails as on a full disk.
    pub fn run_to_full_disk(&self, arguments: &[&str]) -> Ran {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        self.launch(arguments, "", full.into())
    }

    /// Runs the program with `input` on standard input.
    pub fn feed(&self, arguments: &[&str], input: &str) -> Ran {
        self.launch(arguments, input, Stdio::piped())
    }

    fn launch(&self, arguments: &[&str], input: &str, stdout: Stdio) -> Ran {
        let mut child = Command::new(env!("CARGO_BIN_EXE_trustgate"))
            .args(arguments)
            .env_clear()
            .env("STATE_DIRECTORY", self.dir.path())
            .env("USER", "operator")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir(self.dir.path())
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_owned();
        // A command that fails early does not read its input, so this write may fail.
        let feeder = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
        let output = child.wait_with_output().unwrap();
        feeder.join().unwrap();
        Ran {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs the program with `--output json` and returns the parsed output.
    pub fn json(&self, arguments: &[&str]) -> Value {
        self.run(&[&["--output", "json"], arguments].concat()).done().parsed()
    }
}

impl Ran {
    /// Asserts that the run succeeded and wrote nothing to standard error.
    #[track_caller]
    pub fn done(self) -> Self {
        assert_eq!((self.code, self.err.as_str()), (0, ""), "{self:?}");
        self
    }

    /// Asserts that the run failed with exit code `code`, with each of `texts` in standard error and an empty standard
    /// output.
    #[track_caller]
    pub fn failed(self, code: i32, texts: &[&str]) -> Self {
        assert_eq!((self.code, self.out.as_str()), (code, ""), "{self:?}");
        for text in texts {
            assert!(self.err.contains(text), "no {text:?} in {self:?}");
        }
        self
    }

    pub fn parsed(&self) -> Value {
        serde_json::from_str(&self.out).unwrap()
    }

    /// Asserts that the output does not contain `secret`.
    #[track_caller]
    pub fn hides(&self, secret: &str) {
        assert!(!self.out.contains(secret) && !self.err.contains(secret), "{secret:?} in {self:?}");
    }
}
