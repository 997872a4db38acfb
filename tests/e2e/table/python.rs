//! The Python runners: programs of the virtual environment that `make setup` makes.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

/// Runs a program of tests/e2e with `given` as a file, and shows what it wrote.
///
/// # Panics
/// If it found something wrong.
pub async fn run(program: &'static str, given: &Value) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (python, envoy) = (root.join("target/tools/venv/bin/python"), root.join("target/tools/bin/envoy"));
    for tool in [&python, &envoy] {
        assert!(tool.exists(), "{} is missing: run `make setup`", tool.display());
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("given.json");
    std::fs::write(&file, given.to_string()).unwrap();
    let mut child = Command::new(python)
        .arg(root.join("tests/e2e").join(program))
        .args([file.as_path(), dir.path(), &envoy, &root.join("envoy/envoy.yaml")])
        // It ends when its input does: with this process, however that goes.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let input = child.stdin.take();
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    drop(input);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}");
    assert!(output.status.success(), "{program} ended with {}:\n{out}{err}", output.status);
}
