//! The real program in a place of its own: an empty environment and a directory for its database.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

/// A directory in which the program runs.
pub struct Place {
    dir: TempDir,
    variables: Vec<(String, String)>,
}

/// What a run of the program came to.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Place {
    /// An empty one.
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), variables: Vec::new() }
    }

    /// One whose database exists.
    pub fn migrated() -> Self {
        let place = Self::new();
        place.run(&["migrate"]).done();
        place
    }

    /// The same with a variable set.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same with the variables of another one, in which nothing is shared.
    pub fn like(mut self, other: &Self) -> Self {
        self.variables.clone_from(&other.variables);
        self
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes a file into the directory.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.feed(arguments, "")
    }

    /// Runs the program with its answer going to a disk that is full.
    pub fn run_to_full_disk(&self, arguments: &[&str]) -> Ran {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        self.launch(arguments, "", full.into())
    }

    /// Runs the program with `input` on standard input.
    pub fn feed(&self, arguments: &[&str], input: &str) -> Ran {
        self.launch(arguments, input, Stdio::piped())
    }

    fn launch(&self, arguments: &[&str], input: &str, answer: Stdio) -> Ran {
        let mut child = Command::new(env!("CARGO_BIN_EXE_trustgate"))
            .args(arguments)
            .env_clear()
            .env("STATE_DIRECTORY", self.dir.path())
            .env("USER", "somebody")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir(self.dir.path())
            .stdin(Stdio::piped())
            .stdout(answer)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_owned();
        // A command that fails early does not read its input.
        let feeder = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
        let output = child.wait_with_output().unwrap();
        feeder.join().unwrap();
        Ran {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs the program with `--output json` and returns its answer.
    pub fn json(&self, arguments: &[&str]) -> Value {
        self.run(&[&["--output", "json"], arguments].concat()).done().parsed()
    }
}

impl Ran {
    /// It went well and said nothing on standard error.
    #[track_caller]
    pub fn done(self) -> Self {
        assert_eq!((self.code, self.err.as_str()), (0, ""), "{self:?}");
        self
    }

    /// It failed with this code, and with these texts on standard error; nothing on standard output.
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

    #[track_caller]
    pub fn hides(&self, secret: &str) {
        assert!(!self.out.contains(secret) && !self.err.contains(secret), "{secret:?} in {self:?}");
    }
}
