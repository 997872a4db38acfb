//! Checks that the files named in the settings can be read.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use crate::{
    base::{secret::Secret, settings::Reader},
    canary::settings::CanarySettings,
    config::{Config, Purpose},
    ext_authz::credential::Pepper,
    freshness::deny_list,
    grpc::GrpcSettings,
};

/// Checks that the files needed for `purpose` can be read. The files are read again when they are used; this check only
/// reports problems early.
pub(super) fn run(config: &Config, purpose: Purpose, reader: &mut Reader) {
    let Config { store, redis, credential, freshness, .. } = config;
    let own_management = store.management_url.is_some() || store.management_url_file.is_some();
    // `trustgate deny` must work during an outage, so files that this command does not need may be missing.
    let denying = purpose == Purpose::Deny;
    let serve = !matches!(purpose, Purpose::Manage | Purpose::Canary);
    let manage = matches!(purpose, Purpose::Manage | Purpose::Canary | Purpose::Check);
    let database = !denying || redis.mac_key_file.is_none();
    for (section, name, file, used) in [
        ("store", "url_file", &store.url_file, database && (serve || !own_management)),
        ("store", "password_file", &store.password_file, database),
        ("store", "management_url_file", &store.management_url_file, manage),
        ("redis", "url_file", &redis.url_file, serve),
        ("redis", "password_file", &redis.password_file, serve),
        ("redis", "sentinel_password_file", &redis.sentinel_password_file, serve),
        ("credential", "pepper_file", &credential.pepper_file, !denying),
    ] {
        if let (Some(file), true) = (file, used) {
            let read = match (section, name) {
                ("redis", "url_file") => Secret::read_text(file).map(drop),
                ("credential", _) => Pepper::read_file(file).map(|pepper| {
                    if let Err(short) = pepper.check_length() {
                        reader.refuse(section, name, format!("{}: {short}", file.display()));
                    }
                }),
                _ => Secret::read(file).map(drop),
            };
            readable(reader, section, name, file, read);
        }
    }
    for file in credential.previous_pepper_files.iter().filter(|_| !denying) {
        readable(reader, "credential", "previous_pepper_files", file, Secret::read(file).map(drop));
    }
    // These files may contain binary data, so only check that the first byte can be read.
    for (name, file) in [("mac_key_file", &redis.mac_key_file), ("ca_file", &redis.ca_file)] {
        if let (Some(file), true) = (file, serve) {
            readable(reader, "redis", name, file, first_byte(file));
        }
    }
    // `serve` and `doctor` load the TLS files themselves and report more detailed errors.
    let GrpcSettings { tls_certificate_file, tls_key_file, tls_client_ca_file, .. } = &config.grpc;
    let used = purpose == Purpose::Check && tls_certificate_file.is_some() && tls_key_file.is_some();
    for (name, file) in [
        ("tls_certificate_file", tls_certificate_file),
        ("tls_key_file", tls_key_file),
        ("tls_client_ca_file", tls_client_ca_file),
    ] {
        if let (Some(file), true) = (file, used) {
            readable(reader, "grpc", name, file, first_byte(file));
        }
    }
    let CanarySettings { tls_ca_file, tls_certificate_file, tls_key_file, .. } = &config.canary;
    for (name, file) in
        [("tls_ca_file", tls_ca_file), ("tls_certificate_file", tls_certificate_file), ("tls_key_file", tls_key_file)]
    {
        if let (Some(file), Purpose::Canary | Purpose::Check) = (file, purpose) {
            readable(reader, "canary", name, file, first_byte(file));
        }
    }
    match &freshness.deny_file {
        // The server ignores invalid lines in the deny file, so for `serve` the file only has to be readable. `config
        // check` also reports invalid lines.
        Some(file) if purpose == Purpose::Serve => {
            readable(reader, "freshness", "deny_file", file, File::open(file).map(drop));
        }
        Some(file) if purpose == Purpose::Check => {
            readable(reader, "freshness", "deny_file", file, deny_list::check_file(file));
        }
        _ => {}
    }
}

/// Reads the first byte of `file`, to check that the file can be read and is not empty.
fn first_byte(file: &Path) -> io::Result<()> {
    File::open(file)?.read_exact(&mut [0])
}

fn readable(reader: &mut Reader, section: &str, name: &str, file: &Path, read: io::Result<()>) {
    if let Err(error) = read {
        reader.refuse(section, name, format!("cannot read {}: {error}", file.display()));
    }
}
