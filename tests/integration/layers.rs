//! Checks the structure of the source code: a module imports only modules in the same layer or a lower layer, imports
//! have no cycles, and certain crates are used only in certain modules.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// For each crate, the modules that may use it, including their submodules. A crate that is used in only one module can
/// be replaced without changes elsewhere.
const HOMES: &[(&str, &[&str])] = &[
    ("clap", &["cli"]),
    ("comfy_table", &["cli"]),
    ("envoy_types", &["ext_authz", "canary::client"]),
    ("h2", &["grpc"]),
    ("hyper", &["server::admin"]),
    ("hyper_util", &["server::admin"]),
    ("indicatif", &["cli"]),
    ("moka", &["cache::l1"]),
    ("prost", &["ext_authz"]),
    // The module `redis` manages the connection. The other modules send commands.
    ("redis", &["redis", "cache::l2", "freshness::deny_list", "doctor::redis"]),
    ("rustls", &["grpc"]),
    ("sqlx", &["store", "doctor"]),
    ("toml_edit", &["config"]),
    // `server` creates the health service, `grpc` passes health checks to it, and `canary::client` is a gRPC client.
    ("tonic", &["grpc", "server", "canary::client"]),
    ("tonic_health", &["server"]),
    ("tracing_subscriber", &["base::telemetry"]),
];

/// Rust source code in which comments and string literals are replaced with spaces.
struct Code(String);

/// A source file of the library.
struct Source {
    /// The path of the module, such as `store::sqlite`, or `main` for the program.
    module: String,
    code: Code,
}

#[test]
fn imports_follow_the_order_of_layers_in_lib_rs() {
    let layers = layers();
    let mut wrong = Vec::new();
    let mut imports = 0;
    for source in sources() {
        let Some(own) = layer(&layers, &source.module) else {
            wrong.push(format!("{} is in no layer: list it in src/lib.rs", source.module));
            continue;
        };
        for path in source.imports() {
            imports += 1;
            match layer(&layers, &path) {
                Some(layer) if layer <= own => {}
                Some(_) => wrong.push(format!("{} imports {path}, which is above it", source.module)),
                None => wrong.push(format!("{} imports {path}, which is in no layer", source.module)),
            }
        }
    }
    assert!(imports > 100, "only {imports} imports were found: the parser of this test is broken");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn lib_rs_lists_every_module_once() {
    let layers = layers();
    let modules: Vec<String> = sources().into_iter().map(|source| source.module).collect();
    for (at, layer) in layers.iter().enumerate() {
        assert!(modules.contains(layer), "src/lib.rs lists {layer}, which is not a module");
        assert!(!layers[..at].contains(layer), "src/lib.rs lists {layer} twice");
    }
    for module in modules.iter().filter(|module| !module.contains("::")) {
        assert!(layers.contains(module), "src/lib.rs does not list {module}");
    }
}

#[test]
fn no_module_has_an_import_cycle() {
    let sources = sources();
    let file_of = |path: &str| {
        let files = sources.iter().enumerate().filter(|(_, source)| is_within(path, &source.module));
        files.max_by_key(|(_, source)| source.module.len()).map(|(index, _)| index)
    };
    let graph: Vec<Vec<usize>> = sources
        .iter()
        .enumerate()
        .map(|(own, source)| {
            let imports = source.imports_before(source.tests_at());
            imports.iter().filter_map(|path| file_of(path)).filter(|file| *file != own).collect()
        })
        .collect();
    let found = cycle(&graph).map(|cycle| cycle.iter().map(|file| &*sources[*file].module).collect::<Vec<_>>());
    assert_eq!(found, None, "each of these modules imports the next, and the last imports the first");
}

#[test]
fn import_cycles_are_detected() {
    assert_eq!(cycle(&[vec![1], vec![2], vec![]]), None);
    assert_eq!(cycle(&[vec![1, 2], vec![2], vec![]]), None);
    assert_eq!(cycle(&[vec![1], vec![2], vec![1]]), Some(vec![1, 2]));
    assert_eq!(cycle(&[vec![], vec![1, 0]]), Some(vec![1]));
}

/// Returns a cycle in `graph`, if one exists. `graph` lists the successors of each node.
fn cycle(graph: &[Vec<usize>]) -> Option<Vec<usize>> {
    fn visit(graph: &[Vec<usize>], node: usize, path: &mut Vec<usize>, done: &mut [bool]) -> Option<Vec<usize>> {
        if let Some(start) = path.iter().position(|earlier| *earlier == node) {
            return Some(path[start..].to_vec());
        }
        if done[node] {
            return None;
        }
        path.push(node);
        let found = graph[node].iter().find_map(|next| visit(graph, *next, path, done));
        path.pop();
        done[node] = true;
        found
    }
    let mut done = vec![false; graph.len()];
    (0..graph.len()).find_map(|node| visit(graph, node, &mut Vec::new(), &mut done))
}

#[test]
fn crates_are_used_only_in_the_modules_that_may_use_them() {
    let mut wrong = Vec::new();
    let mut homes_seen = vec![0; HOMES.len()];
    for source in sources() {
        for ((name, homes), seen) in HOMES.iter().zip(&mut homes_seen) {
            if source.uses_crate(name) {
                *seen += 1;
                if !homes.iter().any(|home| is_within(&source.module, home)) {
                    wrong.push(format!("{} uses {name}, whose home is {}", source.module, homes.join(", ")));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    for ((name, _), seen) in HOMES.iter().zip(homes_seen) {
        assert!(seen > 0, "no module uses {name}: remove it from the list");
    }
}

#[test]
fn import_paths_resolve_as_in_rust() {
    let imports = |text: &str| Source::new("a::b".into(), text).imports();
    assert_eq!(imports("use crate::x::{self, y::{Z, w}, V as U};"), ["x::self", "x::y::Z", "x::y::w", "x::V"]);
    assert_eq!(imports("fn f() -> crate::x::Y { super::z::f(self::c) }"), ["x::Y", "a::z::f", "a::b::c"]);
    assert_eq!(imports("crate::settings! {} crate::words! {}"), ["base::settings", "base::settings"]);
    assert_eq!(
        imports("#[cfg(test)]\nmod tests {\n    use super::*;\n    use super::super::d::E;\n}"),
        ["a::b", "a::d::E"]
    );
    assert_eq!(
        imports("// crate::x\n/* crate::y */ let a = \"crate::z\"; $crate::w; pub(crate) fn g(&self) {}"),
        [""; 0]
    );
    let uses_redis = |text: &str| Source::new("a::b".into(), text).uses_crate("redis");
    assert!(uses_redis("use redis::{Client, Cmd};"));
    assert!(uses_redis("use crate::{redis::Redis, x}; fn f() -> redis::Cmd {}"));
    assert!(!uses_redis("use crate::redis::Redis; use crate::{redis::Redis, x};"));
    assert!(!uses_redis("use crate::{redis, x}; fn f() -> redis::Redis {}"));
    assert!(!uses_redis("#[cfg(test)]\nmod tests {\n    use redis::Client;\n}"));
}

/// Returns the modules in the order of their layers, lowest first.
fn layers() -> Vec<String> {
    let map = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let listed = map.lines().filter_map(|line| line.strip_prefix("//! - "));
    listed
        .map(|line| {
            let (name, meaning) = line.split_once(", ").unwrap_or_else(|| panic!("not `NAME, MEANING`: {line}"));
            assert!(!meaning.is_empty());
            name.trim_matches(['[', ']', '`']).trim_start_matches("mod@").to_owned()
        })
        .collect()
}

/// Returns the index of the longest name in `layers` that matches `path`.
fn layer(layers: &[String], path: &str) -> Option<usize> {
    let fitting = layers.iter().enumerate().filter(|(_, layer)| is_within(path, layer));
    fitting.max_by_key(|(_, layer)| layer.len()).map(|(at, _)| at)
}

fn is_within(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let mut files = Vec::new();
    let mut directories = vec![src.clone()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    let named = files.iter().map(|file| {
        let name = file.strip_prefix(&src).unwrap().with_extension("");
        (name.to_str().unwrap().replace('/', "::"), fs::read_to_string(file).unwrap())
    });
    named.filter(|(module, _)| module != "lib").map(|(module, text)| Source::new(module, &text)).collect()
}

impl Source {
    fn new(module: String, text: &str) -> Self {
        Self { module, code: Code::of(text) }
    }

    /// Returns the position of the unit tests, which are at the end of the file.
    fn tests_at(&self) -> usize {
        self.code.0.find("mod tests {").unwrap_or(usize::MAX)
    }

    /// Returns every path in the file that refers to a library module, relative to the crate root.
    fn imports(&self) -> Vec<String> {
        self.imports_before(usize::MAX)
    }

    /// Like [`Self::imports`], but only for paths before the position `end`.
    fn imports_before(&self, end: usize) -> Vec<String> {
        let mut found = Vec::new();
        let starts: &[&str] = if self.module == "main" { &["trustgate"] } else { &["crate", "super", "self"] };
        for start in starts {
            for at in self.code.paths(start).into_iter().filter(|at| *at < end) {
                let mut rest = &self.code.0[at + start.len() + "::".len()..];
                let mut base = match *start {
                    "super" | "self" => self.module.clone(),
                    _ => String::new(),
                };
                if *start == "super" {
                    // In the unit tests, the first `super` refers to the module of this file.
                    let mut up = usize::from(at < self.tests_at());
                    while let Some(further) = rest.strip_prefix("super::") {
                        (rest, up) = (further, up + 1);
                    }
                    for _ in 0..up {
                        base = base.rsplit_once("::").map_or_else(String::new, |(parent, _)| parent.to_owned());
                    }
                }
                expand(&base, rest, &mut found);
            }
        }
        found
    }

    /// Returns true if the file, apart from its tests, uses the crate `name`. Inside the braces of an import, or if the
    /// file imports a library module named `name`, the name does not refer to the crate.
    fn uses_crate(&self, name: &str) -> bool {
        if self.module.ends_with("::tests") || self.imports().iter().any(|path| path == name) {
            return false;
        }
        let end = self.tests_at();
        self.code.paths(name).into_iter().filter(|at| *at < end).any(|at| {
            let before = &self.code.0[..at];
            !before.rfind("use ").is_some_and(|start| !before[start..].contains(';') && before[start..].contains('{'))
        })
    }
}

/// Parses the import tree at the start of `text` and adds its paths to `found`. Returns the rest of `text`.
fn expand<'t>(base: &str, text: &'t str, found: &mut Vec<String>) -> &'t str {
    let join = |name: &str| if base.is_empty() { name.to_owned() } else { format!("{base}::{name}") };
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start().trim_start_matches(',').trim_start();
            if let Some(after) = rest.strip_prefix('}') {
                return after;
            }
            assert!(!rest.is_empty(), "an import list is not closed");
            rest = expand(base, rest, found).trim_start();
            if let Some(after) = rest.strip_prefix("as ") {
                rest = after.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
            }
        }
    }
    if let Some(rest) = text.strip_prefix('*') {
        found.push(base.to_owned());
        return rest;
    }
    let end = text.find(|c: char| !is_name(c)).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    // The macros that declare settings are defined in `base::settings` and exported at the crate root.
    let path = if base.is_empty() && rest.starts_with('!') { "base::settings".to_owned() } else { join(name) };
    match rest.strip_prefix("::") {
        Some(rest) if !rest.starts_with('<') => expand(&path, rest, found),
        _ => {
            found.push(path);
            rest
        }
    }
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

impl Code {
    fn of(text: &str) -> Self {
        let mut code = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            let skipped = match next {
                '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
                '/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |end| end + 2),
                '"' => text_length(rest),
                'r' if !code.ends_with(is_name) && rest[1..].trim_start_matches('#').starts_with('"') => {
                    let hashes = rest[1..].find('"').unwrap();
                    let end = format!("\"{}", "#".repeat(hashes));
                    let start = hashes + 2;
                    rest[start..].find(&end).map_or(rest.len(), |at| start + at + end.len())
                }
                // A character literal that contains a double quote.
                '\'' if rest.starts_with("'\"'") => 3,
                '\'' if rest.starts_with("'\\\"'") => 4,
                other => {
                    code.push(other);
                    rest = &rest[other.len_utf8()..];
                    continue;
                }
            };
            code.push(' ');
            rest = &rest[skipped..];
        }
        Self(code)
    }

    /// Returns the positions of the paths that begin with `name`.
    fn paths(&self, name: &str) -> Vec<usize> {
        let start = format!("{name}::");
        let starts = self.0.match_indices(&start).map(|(at, _)| at);
        starts.filter(|at| !self.0[..*at].ends_with(|c: char| is_name(c) || c == ':' || c == '$')).collect()
    }
}

/// Returns the length of the string literal at the start of `rest`, including its quotes.
fn text_length(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}
