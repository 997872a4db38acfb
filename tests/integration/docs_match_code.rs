//! Checks that the documentation, `envoy/`, `helm/` and the code agree on metrics, settings, commands, identity headers
//! and versions.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    path::Path,
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use trustgate::testing::{
    base::metrics::{self, Registry},
    canary::{metrics::CanaryMetrics, settings::CanarySettings},
    config::{self, Purpose, SECTIONS},
    ext_authz::identity,
    server::{AppBuilder, Delay},
};

use crate::program::Place;

/// The request header that contains the key by default.
const DEFAULT_CREDENTIAL_HEADER: &str = "x-api-key";

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_page_lists_exactly_the_metrics_that_a_server_and_a_canary_expose() {
    let dir = tempfile::tempdir().unwrap();
    let variables = [
        ("TRUSTGATE__GRPC__LISTEN", "127.0.0.1:0"),
        ("TRUSTGATE__ADMIN__LISTEN", "127.0.0.1:0"),
        ("TRUSTGATE__REDIS__URL", "redis://127.0.0.1:1/0"), // unreachable, but the metrics exist
    ];
    let variables = variables.map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let config = config::load(None, variables, Purpose::Serve).unwrap();
    let state = dir.path().to_str().unwrap();
    let env = |name: &str| (name == "STATE_DIRECTORY").then(|| state.to_owned());
    let running = AppBuilder::new(config, &env).unwrap().start().await.unwrap();
    running.ready().await;

    let mut admin = TcpStream::connect(running.admin_address()).await.unwrap();
    admin.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut exposed = String::new();
    admin.read_to_string(&mut exposed).await.unwrap();
    running.stop(Delay::None).await.unwrap();

    let canary = Registry::new();
    CanaryMetrics::register(&canary, &CanarySettings::default().targets).unwrap();
    exposed += &metrics::text(&canary);
    assert_eq!(documented_metrics(&file("docs/metrics.md")), exposed_metrics(&exposed));
}

/// Parses the metrics endpoint's text format. Returns the type and the labels of each metric by name.
fn exposed_metrics(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut metrics = BTreeMap::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            metrics.insert(name.to_owned(), (kind.to_owned(), BTreeSet::new()));
        } else if let Some((name, rest)) = line.split_once('{').filter(|_| !line.starts_with('#')) {
            let labels = rest.split_once('}').unwrap().0.split(',').map(|label| label.split_once('=').unwrap().0);
            let name = metrics.get(name).map_or_else(|| name.rsplit_once('_').unwrap().0, |_| name).to_owned();
            metrics.get_mut(&name).unwrap().1.extend(labels.filter(|name| *name != "le").map(str::to_owned));
        }
    }
    metrics
}

/// Parses the tables of `page`, whose first three columns are the name, the type and the labels of a metric. Returns
/// the type and the labels of each metric by name.
fn documented_metrics(page: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let rows = rows(page).filter(|cells| cells.len() > 3);
    rows.map(|cells| {
        let labels = quoted(&cells[2]).into_iter().map(str::to_owned).collect();
        (cells[0].trim_matches('`').to_owned(), (cells[1].clone(), labels))
    })
    .collect()
}

/// The pages whose settings, metrics and commands are compared with the code.
const PAGES: [&str; 7] = [
    "README.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/envoy.md",
    "docs/metrics.md",
    "docs/operations.md",
];

/// The maximum number of lines of the README, which must be readable in ten minutes.
const README_LINES_MAX: usize = 320;

#[test]
fn the_readme_is_short() {
    let lines = file("README.md").lines().count();
    assert!(
        lines <= README_LINES_MAX,
        "README.md has {lines} lines, at most {README_LINES_MAX} are allowed: move details to docs/"
    );
}

#[test]
fn the_index_of_the_docs_lists_every_page() {
    let index = file("docs/README.md");
    let pages = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).unwrap();
    for page in pages.map(|page| page.unwrap().file_name().into_string().unwrap()) {
        let link = if page == "adr" { "](adr/".to_owned() } else { format!("]({page})") };
        assert!(page == "README.md" || index.contains(&link), "docs/README.md does not list {page}");
    }
}

/// The last column of each row names the tests that prove the claims in the row.
#[test]
fn each_row_of_the_migration_page_names_tests_that_exist() {
    let page = file("docs/migrating.md");
    let tests: String = ["integration", "e2e", "bound"].into_iter().flat_map(sources).collect();
    let test_cells: Vec<_> =
        cells(section(&page, "## What the cache in front of such a table does, and what does it here").as_str())
            .skip(2)
            .map(|cells| cells[2].clone())
            .collect();
    assert!(test_cells.len() > 9, "{test_cells:?}");
    for cell in test_cells {
        let names = quoted(&cell);
        assert!(!names.is_empty(), "{cell}");
        for name in names {
            assert!(tests.contains(&format!("fn {name}(")), "there is no test {name}");
        }
    }
}

fn sources(binary: &str) -> Vec<String> {
    let files = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(binary)).unwrap();
    let files = files.map(|file| file.unwrap().path()).filter(|path| path.extension().is_some_and(|of| of == "rs"));
    files.map(|path| fs::read_to_string(path).unwrap()).collect()
}

#[test]
fn the_docs_mention_only_metrics_and_settings_that_exist() {
    let settings = settings();
    let metrics = documented_metrics(&file("docs/metrics.md"));
    let (mut settings_found, mut metrics_found) = (0, 0);
    for page in PAGES {
        let text = file(page);
        for word in quoted(&text).into_iter().flat_map(str::split_whitespace) {
            let name = word.trim_matches(|c: char| !c.is_alphanumeric());
            let name = name.split(['=', '{', '"']).next().unwrap();
            if let Some(rest) = name.strip_prefix("TRUSTGATE__") {
                let setting = rest.to_lowercase().replacen("__", ".", 1);
                assert!(setting == "section.name" || settings.contains(&setting), "{page}: {name}");
                settings_found += 1;
            } else if name.starts_with("trustgate_") && !name.contains('.') {
                let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
                let is_role = ["trustgate_owner", "trustgate_manage", "trustgate_serve"].contains(&name);
                assert!(is_role || metrics.contains_key(base), "{page}: there is no metric {name}");
                metrics_found += 1;
            } else if let Some((section, rest)) = name.split_once('.')
                && SECTIONS.iter().any(|one| one.name == section)
                && !rest.contains(['.', '/', ':'])
                && !["rs", "md", "yaml"].contains(&rest)
            {
                assert!(settings.contains(name), "{page}: there is no setting {name}");
                settings_found += 1;
            }
        }
    }
    assert!(settings_found > 20 && metrics_found > 10, "{settings_found} settings, {metrics_found} metrics");
}

#[test]
fn the_alerts_use_only_metrics_that_exist() {
    let (metrics, alerts) = (documented_metrics(&file("docs/metrics.md")), file("docs/alerts.yaml"));
    let words = alerts.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let names: BTreeSet<_> = words.filter(|word| word.starts_with("trustgate_")).collect();
    for name in &names {
        assert!(metrics.contains_key(name.trim_end_matches("_bucket")), "docs/alerts.yaml: there is no metric {name}");
    }
    assert!(names.len() > 10, "{names:?}");
}

#[test]
fn the_configuration_in_the_readme_is_accepted() {
    let readme = file("README.md");
    let blocks = blocks(&readme, "toml");
    assert!(!blocks.is_empty());
    for block in blocks {
        let place = Place::new();
        place.write("trustgate.toml", &block);
        let checked = place.run(&["--config", "trustgate.toml", "--output", "json", "config", "check"]).parsed();
        let config_errors = checked["mistakes"].as_array().unwrap().iter();
        // The files with the secrets do not exist on this machine.
        let wrong: Vec<_> = config_errors
            .filter(|config_error| !config_error["problem"].as_str().unwrap().starts_with("cannot read /"))
            .collect();
        assert!(wrong.is_empty(), "{wrong:?} in\n{block}");
    }
}

#[test]
fn the_readme_lists_exactly_the_existing_commands_and_options() {
    let place = Place::new();
    let mut commands = BTreeMap::new();
    leaf_commands(&place, &mut Vec::new(), &mut commands);
    let readme = file("README.md");
    let mut listed = BTreeMap::new();
    for cells in rows(&section(&readme, "## Commands")) {
        let usage = cells[0].trim_matches('`');
        let words = usage.split_whitespace().take_while(|word| word.chars().all(|c| c.is_ascii_lowercase()));
        let options = usage.split(|c: char| !c.is_ascii_lowercase() && c != '-').filter(|word| word.starts_with("--"));
        let command = words.collect::<Vec<_>>().join(" ");
        let options = options.map(str::to_owned).collect::<BTreeSet<_>>();
        assert!(listed.insert(command, options).is_none(), "{usage} is listed twice");
    }
    assert_eq!(listed, commands);

    // The commands that the pages show in shell blocks and in inline code must also exist.
    let mut seen = 0;
    for page in PAGES {
        let text = file(page);
        let shell = blocks(&text, "sh").concat();
        let fenced = shell.lines().filter_map(|line| line.split("| ").last()?.strip_prefix("trustgate "));
        let inline = quoted(&text).into_iter().filter_map(|code| code.strip_prefix("trustgate "));
        for command in fenced.chain(inline) {
            let words = command.split_whitespace().skip_while(|word| word.starts_with("--"));
            let words: Vec<_> = words.take_while(|word| word.chars().all(|c| c.is_ascii_lowercase())).collect();
            let exists = commands.keys().any(|known| {
                let known: Vec<_> = known.split(' ').collect();
                known.starts_with(&words) || words.starts_with(&known)
            });
            assert!(exists, "{page}: trustgate {command}");
            seen += 1;
        }
    }
    assert!(seen > 10, "only {seen} commands were seen");
}

/// Adds each command without subcommands to `found`, with the options that its `--help` lists.
fn leaf_commands(place: &Place, path: &mut Vec<String>, found: &mut BTreeMap<String, BTreeSet<String>>) {
    let arguments: Vec<_> = path.iter().map(String::as_str).chain(["--help"]).collect();
    let help = place.run(&arguments).done().out;
    let first_words = |heading: &str| -> Vec<String> {
        let lines = help.lines().skip_while(|line| *line != heading).skip(1).take_while(|line| !line.is_empty());
        lines.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
    };
    let below = first_words("Commands:");
    if below.is_empty() {
        let common = ["--config", "--output", "--help", "--version"];
        let options = help.lines().filter_map(|line| {
            let word = line.trim_start().trim_start_matches("-h, ").trim_start_matches("-V, ");
            let option = word.split(|c: char| !c.is_ascii_lowercase() && c != '-').next()?;
            (word.starts_with("--") && !common.contains(&option)).then(|| option.to_owned())
        });
        found.insert(path.join(" "), options.collect());
    }
    for command in below.into_iter().filter(|command| command != "help") {
        path.push(command);
        leaf_commands(place, path, found);
        path.pop();
    }
}

#[test]
fn the_yaml_in_the_readme_is_part_of_the_envoy_example() {
    let readme = file("README.md");
    let whole = plain_yaml(&file("envoy/envoy.yaml"));
    let steps = section(&readme, "## Into an existing Envoy in five minutes");
    let blocks = blocks(&steps, "yaml");
    assert_eq!(blocks.len(), 3, "the early header removal, the filter and the cluster");
    for block in blocks {
        let block = plain_yaml(&block);
        assert!(whole.contains(&block), "envoy/envoy.yaml does not contain this block:\n{block}");
    }
}

/// Returns the lines of a YAML document without comments, empty lines or indentation.
fn plain_yaml(text: &str) -> String {
    let lines = text.lines().map(|line| line.split_once(" #").map_or(line, |(code, _)| code).trim());
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).flat_map(|line| [line, "\n"]).collect()
}

#[test]
fn each_snippet_that_strips_identity_headers_strips_all_of_them() {
    let envoy = file("envoy/envoy.yaml");
    let removed: Vec<_> = between(&envoy, "identity headers")
        .lines()
        .map(|line| line.trim().strip_prefix("- remove: ").unwrap_or_else(|| panic!("{line}")).to_owned())
        .collect();
    assert_eq!(removed, identity::HEADERS);

    let expression = between(&envoy, "identity expression");
    // The expression permits the whole prefix, so that a snippet that an operator copies today also covers identity
    // headers that later releases add.
    assert_eq!(
        expression.trim(),
        format!("allow_expression: {{regex: \"^(x-trust-[a-z-]+|{DEFAULT_CREDENTIAL_HEADER})$\"}}")
    );
    for name in identity::HEADERS {
        let rest = name.strip_prefix("x-trust-").unwrap();
        assert!(rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{name}");
    }

    for page in ["README.md", "SECURITY.md", "docs/envoy.md"] {
        for block in blocks(&file(page), "yaml").iter().filter(|block| block.contains(identity::TRUST_ID)) {
            for name in identity::HEADERS {
                assert!(block.contains(name), "{page}: {name} is missing in\n{block}");
            }
        }
    }
}

/// Returns the lines between `# BEGIN name` and `# END name`.
fn between(text: &str, name: &str) -> String {
    let (begin, end) = (format!("# BEGIN {name}"), format!("# END {name}"));
    let lines = text.lines().skip_while(|line| !line.contains(&begin)).skip(1);
    let found: Vec<_> = lines.take_while(|line| !line.contains(&end)).collect();
    assert!(!found.is_empty() && text.contains(&end), "no lines between {begin} and {end}");
    found.join("\n")
}

#[test]
fn the_chart_has_each_setting_except_listeners_secrets_and_the_canary() {
    let schema: Value = serde_json::from_str(&file("helm/trustgate/values.schema.json")).unwrap();
    let sections = schema["properties"]["config"]["properties"].as_object().unwrap();
    let known: BTreeSet<_> = sections
        .iter()
        .flat_map(|(section, schema)| {
            let names = schema["properties"].as_object().unwrap().keys();
            names.map(move |name| format!("{section}.{name}"))
        })
        .collect();
    let listens = |setting: &str| setting.ends_with(".listen") || setting.starts_with("grpc.socket_");
    // The chart mounts Kubernetes Secrets as files, and sets the paths of these files itself.
    let is_secret = |setting: &str| {
        let name = setting.split_once('.').unwrap().1;
        name.ends_with("_file")
            || name.ends_with("_files")
            || ["password", "sentinel_password", "pepper", "management_url"].contains(&name)
    };
    // The chart runs no canary.
    let is_canary = |setting: &str| setting.starts_with("canary.");
    let is_left_out = |setting: &String| listens(setting) || is_secret(setting) || is_canary(setting);
    let wanted: BTreeSet<_> = settings().into_iter().filter(|setting| !is_left_out(setting)).collect();
    assert_eq!(known, wanted);
}

#[test]
fn the_crate_the_chart_and_the_changelog_have_the_same_version() {
    let version = env!("CARGO_PKG_VERSION");
    let chart = file("helm/trustgate/Chart.yaml");
    assert!(chart.lines().any(|line| line == format!("appVersion: \"{version}\"")), "Chart.yaml: appVersion");
    let changes = file("CHANGELOG.md");
    let newest = changes.lines().find(|line| line.starts_with("## ")).unwrap();
    assert!(newest.starts_with(&format!("## [{version}] - ")), "CHANGELOG.md begins with {newest}");
    let manifest: toml_edit::Document<String> = file("Cargo.toml").parse().unwrap();
    let compiler = manifest["package"]["rust-version"].as_str().unwrap();
    assert!(file("README.md").contains(&format!("Rust {compiler}")), "README.md: the Rust version");
}

fn settings() -> BTreeSet<String> {
    let all = SECTIONS.iter().flat_map(|section| section.fields.iter().map(|field| (section.name, field.name)));
    all.map(|(section, name)| format!("{section}.{name}")).collect()
}

fn file(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the cells of each table row in `page` whose first cell is a name in backticks.
fn rows(page: &str) -> impl Iterator<Item = Vec<String>> {
    cells(page).filter(|cells| cells[0].starts_with('`'))
}

/// Returns the cells of each table row in `page`.
fn cells(page: &str) -> impl Iterator<Item = Vec<String>> {
    let lines = page.lines().filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'));
    lines.map(|line| {
        // `\|` is an escaped bar inside a cell.
        let line = line.replace("\\|", "\u{0}");
        line.split('|').map(|cell| cell.trim().replace('\u{0}', "|")).collect::<Vec<_>>()
    })
}

/// Returns the strings between backticks: code blocks and inline code.
fn quoted(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (at, part) in text.split("```").enumerate() {
        if at % 2 == 1 {
            found.push(part);
        } else {
            found.extend(part.split('`').skip(1).step_by(2));
        }
    }
    found
}

/// Returns the code blocks with this language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_owned()).collect()
}

/// Returns the lines from `heading` to the next heading of level two.
fn section(text: &str, heading: &str) -> String {
    let mut lines = text.lines().skip_while(|line| *line != heading);
    assert!(lines.next().is_some(), "no {heading:?}");
    lines.take_while(|line| !line.starts_with("## ")).flat_map(|line| [line, "\n"]).collect()
}
