//! Examines a PostgreSQL server for `doctor`: the connection, the server, our tables and the rights of the roles.
//!
//! The examinations change nothing. They send one NOTIFY, on a channel with a random name to which only `doctor`
//! listens.

use std::{net::IpAddr, time::Duration};

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    diagnosis::{Diagnosis, located, milliseconds, resolve},
    session::{
        ADDRESS, ALTERED, CONNECTION, Examination, Kind, MANAGEMENT, NOTIFICATIONS, RIGHTS, Report, SERVER, Session,
        TablesState, Trouble, URL, WATCH,
    },
};
use crate::store::{
    StoreSettings,
    change_log::{listen, postgres, problem::TrackingProblem},
    names::SchemaName,
    postgres::code,
    reads::postgres::Postgres,
    rows::RowExt as _,
    schema::grants::{self, Needs},
    url::{Backend, Role, StoreUrl},
};

/// Timeout for the arrival of a notification.
const NOTIFICATION_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of statements or problems that one diagnosis lists.
const LISTED: usize = 3;

/// Examines the server at the address in `postgres`, and our tables on that server.
pub(crate) async fn run(postgres: Postgres, examination: Examination<'_>, report: &mut Report) {
    let options = match postgres.address.postgres() {
        Ok(options) => options,
        Err(error) => {
            return report.add(Diagnosis::failed(ADDRESS, error.to_string(), "correct the setting").about(URL));
        }
    };
    let is_local = match address(&options, examination).await {
        Ok((diagnosis, is_local)) => {
            report.add(diagnosis);
            is_local
        }
        Err(diagnosis) => return report.add(diagnosis),
    };
    let mut session = match Session::open(&postgres, examination).await {
        Ok(session) => session,
        Err(trouble) => return report.add(refused(&trouble, &postgres.address).about(URL)),
    };
    report.add(connection(&mut session, &options, is_local).await);
    let identity = match identify(&mut session).await {
        Ok(identity) => identity,
        Err(trouble) => {
            let remedy = "see the server log: it does not answer simple queries";
            return report.add(Diagnosis::failed(SERVER, trouble.to_string(), remedy).about(URL));
        }
    };
    report.add(server(&identity));
    let tables = session.diagnose(Kind::Server, report).await;
    if postgres.tracks_changes() {
        let manager = manager(&identity, examination, report).await;
        if tables != TablesState::Unfit {
            report.add(rights(&mut session, &identity, manager.as_deref(), &postgres.schema).await);
        }
        if let TablesState::Fit { triggers_intact } = tables {
            report.add(watch(&mut session, triggers_intact, &postgres).await);
        }
        report.add(notifications(&mut session, &postgres.address, examination).await);
    } else {
        let because = "the existing table is not attached";
        report.add(Diagnosis::skipped(RIGHTS, because));
        report.add(Diagnosis::skipped(MANAGEMENT, because));
        report.add(Diagnosis::skipped(WATCH, "the existing table is not attached: its changes are not recorded"));
        report.add(Diagnosis::skipped(NOTIFICATIONS, "the existing table is not attached: it sends no notifications"));
    }
    session.close().await;
}

/// Examines the address of the server. Returns the diagnosis, and true if the server is on this machine.
async fn address(options: &PgConnectOptions, examination: Examination<'_>) -> Result<(Diagnosis, bool), Diagnosis> {
    let directory = options.get_socket().map(|directory| directory.display().to_string());
    let directory = directory.or_else(|| options.get_host().starts_with('/').then(|| options.get_host().to_owned()));
    if let Some(directory) = directory {
        // PostgreSQL derives the name of the socket in this directory from the port: see "host" in the libpq
        // documentation.
        let socket = format!("{directory}/.s.PGSQL.{}", options.get_port());
        return match std::fs::metadata(&socket) {
            Ok(_) => Ok((Diagnosis::ok(ADDRESS, format!("the socket {socket}")), true)),
            Err(error) => {
                let remedy = "start the server, or correct the directory or the port in the URL";
                Err(Diagnosis::failed(ADDRESS, format!("{socket}: {error}"), remedy).about(URL))
            }
        };
    }
    let host = (options.get_host(), options.get_port());
    let began = examination.clock.now();
    match resolve(host, examination.settings.connect_timeout).await {
        Ok(addresses) => {
            let took = examination.clock.now().since(began);
            let found = format!("{}, port {}, resolved in {}", located(host.0, &addresses), host.1, milliseconds(took));
            Ok((Diagnosis::ok(ADDRESS, found), addresses.iter().all(IpAddr::is_loopback)))
        }
        Err(problem) => {
            let remedy = "correct the host in the URL, or the name resolution of this machine (/etc/resolv.conf, the \
                          DNS of the cluster)";
            Err(Diagnosis::failed(ADDRESS, problem, remedy).about(URL))
        }
    }
}

/// Diagnoses why the connection failed.
fn refused(trouble: &Trouble, address: &StoreUrl) -> Diagnosis {
    let remedy = match trouble {
        Trouble::Sql(error) => match code(error).as_deref() {
            Some("28P01" | "28000") => {
                "correct the user in the URL or its password (store.password_file, store.password, the URL), or permit \
                 the user in pg_hba.conf"
            }
            Some("3D000") => "create the database, or correct its name in the URL",
            Some("53300") => "raise max_connections on the server, or lower store.connections_max",
            Some("57P03") => "wait until the server has started",
            Some(_) => "see the server log",
            None if matches!(error, sqlx::Error::Tls(_)) => {
                "correct sslmode or sslrootcert in the URL: the certificate must come from a trusted authority and \
                 name the host in the URL"
            }
            None => {
                "start the server, and make its port reachable from this machine: check listen_addresses, firewalls \
                 and network policies"
            }
        },
        Trouble::Late(_) | Trouble::Gone => {
            "find out why the server or the network does not answer, or raise store.connect_timeout"
        }
    };
    Diagnosis::failed(CONNECTION, format!("{}: {trouble}", address.describe_postgres()), remedy)
}

/// Diagnoses how long it took to connect, and whether TLS protects a connection to another machine.
async fn connection(session: &mut Session<'_, Postgres>, options: &PgConnectOptions, is_local: bool) -> Diagnosis {
    let took = milliseconds(session.connected_after);
    let answer = session.ask(&TLS.to_owned()).await;
    let tls = answer.and_then(|rows| {
        let tls = rows.first().map(|row| Ok::<_, sqlx::Error>((row.number(0)? == 1, row.text(1)?)));
        tls.transpose().map_err(Trouble::Sql)
    });
    let verified = matches!(options.get_ssl_mode(), PgSslMode::VerifyCa | PgSslMode::VerifyFull);
    match tls {
        Ok(Some((true, version))) if verified || is_local => {
            Diagnosis::ok(CONNECTION, format!("connected in {took}, with {version}"))
        }
        Ok(Some((true, version))) => Diagnosis::warning(
            CONNECTION,
            format!("connected in {took}, with {version}, but the server's certificate is not verified"),
            "add sslmode=verify-full to the URL, and sslrootcert for a private authority: until then an attacker on \
             the network can impersonate the database",
        )
        .about(URL),
        Ok(_) if is_local => Diagnosis::ok(CONNECTION, format!("connected in {took}, without TLS, on this machine")),
        Ok(_) => Diagnosis::warning(
            CONNECTION,
            format!("connected in {took}, without TLS, to another machine"),
            "add sslmode=verify-full to the URL: until then an attacker on the network can read the connection and \
             impersonate the database",
        )
        .about(URL),
        Err(trouble) => {
            let found = format!("connected in {took}, but cannot determine whether TLS is used: {trouble}");
            Diagnosis::warning(CONNECTION, found, "let the role read pg_stat_ssl").about(URL)
        }
    }
}

const TLS: &str =
    "SELECT s.ssl::int::bigint, coalesce(s.version, '') FROM pg_stat_ssl s WHERE s.pid = pg_backend_pid()";

/// The properties of the server, the database and the connection's role.
struct ServerIdentity {
    /// `primary`, `standby` or `read-only`.
    state: String,
    version: String,
    role: String,
    /// Identifies the database. The value does not depend on the role of the connection.
    database: String,
}

async fn identify(session: &mut Session<'_, Postgres>) -> Result<ServerIdentity, Trouble> {
    let rows = session.ask(&IDENTITY.to_owned()).await?;
    let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    Ok(ServerIdentity { state: row.text(0)?, version: row.text(1)?, role: row.text(2)?, database: row.text(3)? })
}

const IDENTITY: &str = "
SELECT CASE
        WHEN pg_is_in_recovery() THEN 'standby'
        WHEN current_setting('transaction_read_only')::boolean THEN 'read-only'
        ELSE 'primary'
    END,
    current_setting('server_version'), current_user::text,
    (SELECT system_identifier FROM pg_control_system()) || ' ' || current_database()";

fn server(identity: &ServerIdentity) -> Diagnosis {
    let ServerIdentity { state, version, role, .. } = identity;
    let found = format!("PostgreSQL {version}, {state}, as the role {role:?}");
    match state.as_str() {
        "standby" => {
            let remedy = "point the URL to the primary: a standby cannot confirm what its primary has committed, so no \
                          replica that uses the standby becomes ready";
            Diagnosis::failed(SERVER, found, remedy).about(URL)
        }
        "read-only" => {
            let remedy = "unset default_transaction_read_only for this role, database or server: polls confirm nothing \
                          on a read-only database";
            Diagnosis::failed(SERVER, found, remedy).about(URL)
        }
        _ => Diagnosis::ok(SERVER, found),
    }
}

/// Examines the rights of the role that management commands connect as. Returns that role if it is not the role of
/// `serve`.
async fn manager(serve: &ServerIdentity, examination: Examination<'_>, report: &mut Report) -> Option<String> {
    const SETTING: &[&str] = &["store.management_url", "store.management_url_file"];
    let StoreSettings { management_url, management_url_file, schema, .. } = examination.settings;
    if management_url.is_none() && management_url_file.is_none() {
        report.add(Diagnosis::skipped(
            MANAGEMENT,
            "store.management_url is not set: with this configuration, management commands use store.url",
        ));
        return None;
    }
    let address = StoreUrl::of(examination.settings, Role::Manage);
    let failed = |found: String, remedy: &str| Diagnosis::failed(MANAGEMENT, found, remedy).about(SETTING);
    let place = address.backend(examination.env).and_then(|place| address.postgres().map(|_| place));
    match place {
        Ok(Backend::Postgres) => {}
        Ok(Backend::Sqlite(_)) => {
            report.add(failed(
                "store.management_url leads to a different database from store.url".to_owned(),
                "correct one of the URLs",
            ));
            return None;
        }
        Err(error) => {
            report.add(failed(error.to_string(), "correct the setting"));
            return None;
        }
    }
    let statement_timeout = examination.settings.connect_timeout;
    let postgres = Postgres { address, schema: schema.clone(), existing: None, statement_timeout };
    let mut session = match Session::open(&postgres, examination).await {
        Ok(session) => session,
        Err(trouble) => {
            report.add(Diagnosis { name: MANAGEMENT, ..refused(&trouble, &postgres.address).about(SETTING) });
            return None;
        }
    };
    let diagnosis = match identify(&mut session).await {
        Err(trouble) => Err(failed(trouble.to_string(), "see the server log")),
        Ok(identity) if identity.database != serve.database => Err(failed(
            "store.management_url leads to a different database from store.url".to_owned(),
            "correct one of the URLs",
        )),
        Ok(identity) => Ok((missing(&mut session, &grants::MANAGE, &identity.role, schema).await, identity.role)),
    };
    session.close().await;
    match diagnosis {
        Err(diagnosis) => {
            report.add(diagnosis);
            None
        }
        Ok((missing, role)) => {
            let diagnosis = match missing {
                Ok(None) => Diagnosis::ok(MANAGEMENT, has_all(&role, &grants::MANAGE)),
                Ok(Some((found, remedy))) => Diagnosis::failed(MANAGEMENT, found, remedy).about(SETTING),
                Err(trouble) => failed(trouble.to_string(), "see the server log"),
            };
            report.add(diagnosis);
            (role != serve.role).then_some(role)
        }
    }
}

/// Diagnoses the rights of the role that `serve` connects as. Warns if this role may change keys even though
/// management commands connect as a different role, `manager`.
async fn rights(
    session: &mut Session<'_, Postgres>,
    identity: &ServerIdentity,
    manager: Option<&str>,
    schema: &SchemaName,
) -> Diagnosis {
    let failed = |found: String, remedy: String| Diagnosis::failed(RIGHTS, found, remedy).about(URL);
    match missing(session, &grants::SERVE, &identity.role, schema).await {
        Ok(None) => {}
        Ok(Some((found, remedy))) => return failed(found, remedy),
        Err(trouble) => return failed(trouble.to_string(), "see the server log".to_owned()),
    }
    let found = has_all(&identity.role, &grants::SERVE);
    let writes = session.ask(&grants::WRITES.replace("{s}", schema.as_str())).await;
    let writes =
        writes.is_ok_and(|rows| rows.first().and_then(|row| row.number(0).ok()).is_some_and(|count| count > 0));
    match manager {
        Some(manager) if writes => Diagnosis::warning(
            RIGHTS,
            format!("{found}, and may also change trusts and keys"),
            format!(
                "connect `serve` as a role that has only the rights that `trustgate migrate --print-grants` prints for \
                 `trustgate serve`; only {manager:?} needs to change keys"
            ),
        )
        .about(URL),
        _ => Diagnosis::ok(RIGHTS, found),
    }
}

fn has_all(role: &str, needs: &Needs) -> String {
    format!("{role:?} has all {} rights that it needs", needs.count())
}

/// Finds the rights in `needs` that `role`, the role of the connection, lacks. Returns a description of these rights
/// and the statements that grant them; `None` if no right is missing.
async fn missing(
    session: &mut Session<'_, Postgres>,
    needs: &Needs,
    role: &str,
    schema: &SchemaName,
) -> Result<Option<(String, String)>, Trouble> {
    let rows = session.ask(&needs.question(schema)).await?;
    let positions = rows.iter().map(|row| row.number(0)).collect::<Result<Vec<_>, _>>()?;
    let statement = |position: &i64| needs.at(usize::try_from(*position).ok()?, schema, role);
    let statements: Vec<_> = positions.iter().filter_map(statement).collect();
    if statements.is_empty() {
        return Ok(None);
    }
    let found = format!("{role:?} lacks {} of the {} rights that it needs", statements.len(), needs.count());
    let mut remedy = vec!["as the owner of the tables, run:"];
    remedy.extend(statements.iter().take(LISTED).map(String::as_str));
    if statements.len() > LISTED {
        remedy.push(
            "and so on: `trustgate migrate --print-grants` prints all statements, for the roles in --serve-role and \
             --manage-role",
        );
    }
    Ok(Some((found, remedy.join("\n"))))
}

/// Returns the first column of the rows that the query `question` returns.
async fn texts(session: &mut Session<'_, Postgres>, question: &String) -> Result<Vec<String>, Trouble> {
    session.ask(question).await?.iter().map(|row| row.text(0).map_err(Trouble::Sql)).collect()
}

/// Diagnoses whether every change is recorded, based on the poll results and on the trigger definitions.
async fn watch(session: &mut Session<'_, Postgres>, triggers_intact: Option<bool>, postgres: &Postgres) -> Diagnosis {
    let problems = texts(session, &postgres::problems(&postgres.schema)).await;
    let mut problems = problems.map(|found| found.into_iter().map(TrackingProblem::of_gaps).collect::<Vec<_>>());
    if let (Ok(found), Some((question, problem))) = (&mut problems, postgres.unattached()) {
        match session.ask(&question).await {
            Ok(rows) if rows.is_empty() => {}
            Ok(_) => found.push(problem),
            Err(trouble) => problems = Err(trouble),
        }
    }
    match (problems, triggers_intact) {
        (Ok(problems), _) if !problems.is_empty() => {
            let listed = problems.iter().take(LISTED).map(ToString::to_string).collect::<Vec<_>>().join("; ");
            let more = problems.len().saturating_sub(LISTED);
            let found = if more > 0 { format!("{listed}; and {more} more") } else { listed };
            let command = if problems.iter().any(TrackingProblem::needs_attach) { "attach" } else { "migrate" };
            let remedy = format!(
                "run `trustgate {command}` to repair this: until then revocations may go unnoticed, so replicas do not \
                 rely on cached data"
            );
            Diagnosis::failed(WATCH, found, remedy)
        }
        (Ok(_), Some(true)) => {
            Diagnosis::ok(WATCH, "every change is recorded: no trigger has been altered since it was created")
        }
        // Granting a right also counts as an alteration.
        (Ok(_), Some(false)) => Diagnosis::ok(WATCH, ALTERED),
        (Ok(_), None) => Diagnosis::skipped(
            WATCH,
            "no poll was answered, so it is unknown whether replicas accept the triggers; no trigger has been altered \
             since it was created",
        ),
        (Err(trouble), _) => Diagnosis::failed(WATCH, trouble.to_string(), "see database_rights"),
    }
}

/// Diagnoses whether notifications from the database arrive, and how long they take.
async fn notifications(
    session: &mut Session<'_, Postgres>,
    address: &StoreUrl,
    examination: Examination<'_>,
) -> Diagnosis {
    const SETTING: &[&str] = &["freshness.notifications"];
    if !examination.usage.notifications {
        return Diagnosis::skipped(NOTIFICATIONS, "freshness.notifications is false").about(SETTING);
    }
    let lost = |problem: String| {
        let found = format!("notifications do not arrive: replicas rely on polling only ({problem})");
        let remedy = "with a connection pooler, no action is needed: the revocation bound is the same, but revocations \
                      may take up to freshness.poll_interval longer; otherwise connect to the server directly";
        Diagnosis::warning(NOTIFICATIONS, found, remedy).about(URL)
    };
    let channel = format!("trustgate_doctor_{}", Uuid::new_v4().simple());
    let mut listener = match listen::open(address, &channel).await {
        Ok(listener) => listener,
        Err(error) => return lost(Trouble::Sql(error).to_string()),
    };
    let sent_at = examination.clock.now();
    if let Err(trouble) = session.ask(&format!("SELECT pg_notify('{channel}', '')")).await {
        return lost(trouble.to_string());
    }
    match timeout(NOTIFICATION_TIMEOUT, listener.try_recv()).await {
        Ok(Ok(Some(_))) => {
            let took = examination.clock.now().since(sent_at);
            Diagnosis::ok(NOTIFICATIONS, format!("a notification arrived after {}", milliseconds(took)))
        }
        Ok(Ok(None)) => lost("the connection was lost".to_owned()),
        Ok(Err(error)) => lost(Trouble::Sql(error).to_string()),
        Err(_) => lost(format!("no notification within {NOTIFICATION_TIMEOUT:?}")),
    }
}
