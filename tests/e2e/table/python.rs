//! Runs the Python runners in the virtual environment that `make setup` creates.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

/// Runs `program` from tests/e2e and prints the output. The program reads `input` from a file.
///
/// # Panics
/// If the program fails, or if `make setup` has not installed Python and Envoy.
pub async fn run(program: &'static str, input: &Value) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (python, envoy) = (root.join("target/tools/venv/bin/python"), root.join("target/tools/bin/envoy"));
    for tool in [&python, &envoy] {
        assert!(tool.exists(), "{} is missing: run `make setup`", tool.display());
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("given.json");
    std::fs::write(&file, input.to_string()).unwrap();
    let mut child = Command::new(python)
        .arg(root.join("tests/e2e").join(program))
        .args([file.as_path(), dir.path(), &envoy, &root.join("envoy/envoy.yaml")])
        // The program exits when its standard input closes, so it ends with this process even if this process is
        // killed.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take();
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    drop(stdin);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}");
    assert!(output.status.success(), "{program} failed with {}:\n{out}{err}", output.status);
}
