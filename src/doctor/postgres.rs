//! What can be found out about a PostgreSQL server, the way to it and the rights on our tables, for `doctor`.
//!
//! Changes nothing: its one NOTIFY goes to a channel that nobody else listens to.

use std::{net::IpAddr, time::Duration};

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    diagnosis::{Diagnosis, located, milliseconds, resolve},
    session::{
        ADDRESS, ALTERED, CONNECTION, Examination, HINTS, Kind, MANAGEMENT, RIGHTS, Report, SERVER, Session, Tables,
        Trouble, URL, WATCH,
    },
};
use crate::store::{
    StoreSettings,
    change_log::{listen, postgres},
    names::SchemaName,
    postgres::code,
    reads::postgres::Postgres,
    rows::RowExt as _,
    schema::grants::{self, Needs},
    url::{Backend, Role, StoreUrl},
};

/// How long a hint may take to be of any use.
const HINT: Duration = Duration::from_secs(1);
/// How many statements or problems are listed; the rest is counted.
const LISTED: usize = 3;

/// Examines the server that `postgres` leads to, and our tables there.
pub(crate) async fn run(postgres: Postgres, examination: Examination<'_>, report: &mut Report) {
    let options = match postgres.address.postgres() {
        Ok(options) => options,
        Err(error) => {
            return report.add(Diagnosis::failed(ADDRESS, error.to_string(), "correct the setting").about(URL));
        }
    };
    let nearby = match address(&options, examination).await {
        Ok((diagnosis, nearby)) => {
            report.add(diagnosis);
            nearby
        }
        Err(diagnosis) => return report.add(diagnosis),
    };
    let mut session = match Session::open(&postgres, examination).await {
        Ok(session) => session,
        Err(trouble) => return report.add(refused(&trouble, &postgres.address).about(URL)),
    };
    report.add(connection(&mut session, &options, nearby).await);
    let who = match who(&mut session).await {
        Ok(who) => who,
        Err(trouble) => {
            let remedy = "the server does not answer simple questions: see its log";
            return report.add(Diagnosis::failed(SERVER, trouble.to_string(), remedy).about(URL));
        }
    };
    report.add(server(&who));
    let tables = session.diagnose(Kind::Server, report).await;
    if postgres.tracks_changes() {
        let manager = manager(&who, examination, report).await;
        if tables != Tables::Unfit {
            report.add(rights(&mut session, &who, manager.as_deref(), &postgres.schema).await);
        }
        if let Tables::Fit { triggers_intact } = tables {
            report.add(naming(&mut session, triggers_intact, &postgres).await);
        }
        report.add(hints(&mut session, &postgres.address, examination).await);
    } else {
        let because = "the table is yours, and not attached";
        report.add(Diagnosis::skipped(RIGHTS, because));
        report.add(Diagnosis::skipped(MANAGEMENT, because));
        report.add(Diagnosis::skipped(WATCH, "the table is yours, and not attached: nobody names changes there"));
        report.add(Diagnosis::skipped(HINTS, "the table is yours, and not attached: nobody sends any"));
    }
    session.close().await;
}

/// Where the server is, and whether that is this machine.
async fn address(options: &PgConnectOptions, examination: Examination<'_>) -> Result<(Diagnosis, bool), Diagnosis> {
    let directory = options.get_socket().map(|directory| directory.display().to_string());
    let directory = directory.or_else(|| options.get_host().starts_with('/').then(|| options.get_host().to_owned()));
    if let Some(directory) = directory {
        // libpq(5), "host": the name of the socket inside of it.
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
            let found = format!("{}, port {}, known after {}", located(host.0, &addresses), host.1, milliseconds(took));
            Ok((Diagnosis::ok(ADDRESS, found), addresses.iter().all(IpAddr::is_loopback)))
        }
        Err(problem) => {
            let remedy = "correct the host in the URL, or the resolver of this machine (/etc/resolv.conf, the DNS of \
                          the cluster)";
            Err(Diagnosis::failed(ADDRESS, problem, remedy).about(URL))
        }
    }
}

/// There is no connection.
fn refused(trouble: &Trouble, address: &StoreUrl) -> Diagnosis {
    let remedy = match trouble {
        Trouble::Sql(error) => match code(error).as_deref() {
            Some("28P01" | "28000") => {
                "correct the user in the URL or its password (store.password_file, store.password, the URL), or let it \
                 in: pg_hba.conf"
            }
            Some("3D000") => "create the database, or correct its name in the URL",
            Some("53300") => "raise max_connections of the server, or lower store.connections_max",
            Some("57P03") => "wait until the server has started",
            Some(_) => "see the log of the server",
            None if matches!(error, sqlx::Error::Tls(_)) => {
                "correct sslmode or sslrootcert in the URL: the certificate must be of an authority that is trusted, \
                 for the host in the URL"
            }
            None => "start the server, and let this machine reach its port: listen_addresses, firewall, network policy",
        },
        Trouble::Late(_) | Trouble::Gone => {
            "find out what keeps the server, or the network before it, from answering; or raise store.connect_timeout"
        }
    };
    Diagnosis::failed(CONNECTION, format!("{}: {trouble}", address.describe_postgres()), remedy)
}

/// How long connecting took, and whether anybody on the way can read along.
async fn connection(session: &mut Session<'_, Postgres>, options: &PgConnectOptions, nearby: bool) -> Diagnosis {
    let took = milliseconds(session.connected_after);
    let asked = session.ask(&TLS.to_owned()).await;
    let tls = asked.and_then(|rows| {
        let tls = rows.first().map(|row| Ok::<_, sqlx::Error>((row.number(0)? == 1, row.text(1)?)));
        tls.transpose().map_err(Trouble::Sql)
    });
    let checked = matches!(options.get_ssl_mode(), PgSslMode::VerifyCa | PgSslMode::VerifyFull);
    match tls {
        Ok(Some((true, version))) if checked || nearby => {
            Diagnosis::ok(CONNECTION, format!("after {took}, with {version}"))
        }
        Ok(Some((true, version))) => Diagnosis::warning(
            CONNECTION,
            format!("after {took}, with {version}, but the server's certificate is not checked"),
            "add sslmode=verify-full to the URL, and sslrootcert where the authority is your own: until then anybody \
             on the way may pass for the database",
        )
        .about(URL),
        Ok(_) if nearby => Diagnosis::ok(CONNECTION, format!("after {took}, without TLS, on this machine")),
        Ok(_) => Diagnosis::warning(
            CONNECTION,
            format!("after {took}, without TLS, to another machine"),
            "add sslmode=verify-full to the URL: until then anybody on the way can read along and answer for the \
             database",
        )
        .about(URL),
        Err(trouble) => {
            let found = format!("after {took}, but whether it uses TLS is not known: {trouble}");
            Diagnosis::warning(CONNECTION, found, "let the role read pg_stat_ssl").about(URL)
        }
    }
}

const TLS: &str =
    "SELECT s.ssl::int::bigint, coalesce(s.version, '') FROM pg_stat_ssl s WHERE s.pid = pg_backend_pid()";

/// Who answers, and as whom we ask.
struct Who {
    /// `primary`, `standby` or `read-only`.
    state: String,
    version: String,
    role: String,
    /// The same for every role of one database, and different for another one.
    database: String,
}

async fn who(session: &mut Session<'_, Postgres>) -> Result<Who, Trouble> {
    let rows = session.ask(&WHO.to_owned()).await?;
    let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    Ok(Who { state: row.text(0)?, version: row.text(1)?, role: row.text(2)?, database: row.text(3)? })
}

const WHO: &str = "
SELECT CASE
        WHEN pg_is_in_recovery() THEN 'standby'
        WHEN current_setting('transaction_read_only')::boolean THEN 'read-only'
        ELSE 'primary'
    END,
    current_setting('server_version'), current_user::text,
    (SELECT system_identifier FROM pg_control_system()) || ' ' || current_database()";

fn server(who: &Who) -> Diagnosis {
    let Who { state, version, role, .. } = who;
    let found = format!("PostgreSQL {version}, {state}, as the role {role:?}");
    match state.as_str() {
        "standby" => {
            let remedy = "lead the URL to the primary: a standby cannot confirm what its primary has committed, so no \
                          replica becomes ready there";
            Diagnosis::failed(SERVER, found, remedy).about(URL)
        }
        "read-only" => {
            let remedy = "unset default_transaction_read_only for this role, database or server: a database that is \
                          read-only confirms nothing";
            Diagnosis::failed(SERVER, found, remedy).about(URL)
        }
        _ => Diagnosis::ok(SERVER, found),
    }
}

/// What the role of management may; the role, where it is another than `serve`'s.
async fn manager(serve: &Who, examination: Examination<'_>, report: &mut Report) -> Option<String> {
    const SETTING: &[&str] = &["store.management_url", "store.management_url_file"];
    let StoreSettings { management_url, management_url_file, schema, .. } = examination.settings;
    if management_url.is_none() && management_url_file.is_none() {
        report.add(Diagnosis::skipped(
            MANAGEMENT,
            "store.management_url is not set: whoever manages has a URL of their own, or uses store.url",
        ));
        return None;
    }
    let address = StoreUrl::of(examination.settings, Role::Manage);
    let failed = |found: String, remedy: &str| Diagnosis::failed(MANAGEMENT, found, remedy).about(SETTING);
    let place = address.backend(examination.env).and_then(|place| address.postgres().map(|_| place));
    match place {
        Ok(Backend::Postgres) => {}
        Ok(Backend::Sqlite(_)) => {
            report.add(failed("it leads to another database than store.url".to_owned(), "correct one of the two"));
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
    let diagnosis = match who(&mut session).await {
        Err(trouble) => Err(failed(trouble.to_string(), "see the log of the server")),
        Ok(who) if who.database != serve.database => {
            Err(failed("it leads to another database than store.url".to_owned(), "correct one of the two"))
        }
        Ok(who) => Ok((missing(&mut session, &grants::MANAGE, &who.role, schema).await, who.role)),
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
                Err(trouble) => failed(trouble.to_string(), "see the log of the server"),
            };
            report.add(diagnosis);
            (role != serve.role).then_some(role)
        }
    }
}

/// What the role of `serve` may; more than it needs only where `manager` is there to do the rest.
async fn rights(
    session: &mut Session<'_, Postgres>,
    who: &Who,
    manager: Option<&str>,
    schema: &SchemaName,
) -> Diagnosis {
    let failed = |found: String, remedy: String| Diagnosis::failed(RIGHTS, found, remedy).about(URL);
    match missing(session, &grants::SERVE, &who.role, schema).await {
        Ok(None) => {}
        Ok(Some((found, remedy))) => return failed(found, remedy),
        Err(trouble) => return failed(trouble.to_string(), "see the log of the server".to_owned()),
    }
    let found = has_all(&who.role, &grants::SERVE);
    let writes = session.ask(&grants::WRITES.replace("{s}", schema.as_str())).await;
    let writes =
        writes.is_ok_and(|rows| rows.first().and_then(|row| row.number(0).ok()).is_some_and(|count| count > 0));
    match manager {
        Some(manager) if writes => Diagnosis::warning(
            RIGHTS,
            format!("{found}, and may change trusts and keys too"),
            format!(
                "let `serve` connect as a role with nothing but what `trustgate migrate --print-grants` prints for it: \
                 only {manager:?} needs to change keys"
            ),
        )
        .about(URL),
        _ => Diagnosis::ok(RIGHTS, found),
    }
}

fn has_all(role: &str, needs: &Needs) -> String {
    format!("{role:?} has all {} rights that it needs", needs.count())
}

/// What `role`, whose connection this is, lacks of what it needs, and the statements that give it.
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
    let found = format!("{role:?} lacks {} of {} rights that it needs", statements.len(), needs.count());
    let mut remedy = vec!["as the owner of the tables:"];
    remedy.extend(statements.iter().take(LISTED).map(String::as_str));
    if statements.len() > LISTED {
        remedy.push(
            "and so on: `trustgate migrate --print-grants` prints all, for the roles that --serve-role and --manage-role \
             name",
        );
    }
    Ok(Some((found, remedy.join("\n"))))
}

/// What the first column of the answer says, row by row.
async fn texts(session: &mut Session<'_, Postgres>, question: &String) -> Result<Vec<String>, Trouble> {
    session.ask(question).await?.iter().map(|row| row.text(0).map_err(Trouble::Sql)).collect()
}

/// Whether every change is named, by what a poll says and by the triggers themselves.
async fn naming(session: &mut Session<'_, Postgres>, triggers_intact: Option<bool>, postgres: &Postgres) -> Diagnosis {
    let mut problems = texts(session, &postgres::problems(&postgres.schema)).await;
    if let (Ok(found), Some(question)) = (&mut problems, postgres.unattached()) {
        match texts(session, &question).await {
            Ok(unattached) => found.extend(unattached),
            Err(trouble) => problems = Err(trouble),
        }
    }
    match (problems, triggers_intact) {
        (Ok(problems), _) if !problems.is_empty() => {
            let listed = problems.iter().take(LISTED).cloned().collect::<Vec<_>>().join("; ");
            let more = problems.len().saturating_sub(LISTED);
            let found = if more > 0 { format!("{listed}; and {more} more") } else { listed };
            let command =
                if problems.iter().any(|problem| problem.ends_with(postgres::ATTACH)) { "attach" } else { "migrate" };
            let remedy = format!(
                "run `trustgate {command}`, which puts it right: until then revocations may go unnoticed, so no replica \
                 relies on what it holds"
            );
            Diagnosis::failed(WATCH, found, remedy)
        }
        (Ok(_), Some(true)) => Diagnosis::ok(WATCH, "every change is named: all triggers are as they were made"),
        // Rights that were given are such an alteration too.
        (Ok(_), Some(false)) => Diagnosis::ok(WATCH, ALTERED),
        (Ok(_), None) => Diagnosis::skipped(WATCH, "because no poll was answered; the triggers are as they were made"),
        (Err(trouble), _) => Diagnosis::failed(WATCH, trouble.to_string(), "see database_rights"),
    }
}

/// Whether a word of the database reaches us without being asked for, and how soon.
async fn hints(session: &mut Session<'_, Postgres>, address: &StoreUrl, examination: Examination<'_>) -> Diagnosis {
    const SETTING: &[&str] = &["freshness.hints"];
    if !examination.usage.hints {
        return Diagnosis::skipped(HINTS, "freshness.hints is false").about(SETTING);
    }
    let lost = |problem: String| {
        let found = format!("hints do not arrive: the bound rests on polling alone ({problem})");
        let remedy = "nothing, if a pooler is in between: the bound is the same, and a revocation takes up to \
                      freshness.poll_interval more; else connect to the server itself";
        Diagnosis::warning(HINTS, found, remedy).about(URL)
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
    match timeout(HINT, listener.try_recv()).await {
        Ok(Ok(Some(_))) => Diagnosis::ok(
            HINTS,
            format!("a hint arrives after {}", milliseconds(examination.clock.now().since(sent_at))),
        ),
        Ok(Ok(None)) => lost("the connection broke".to_owned()),
        Ok(Err(error)) => lost(Trouble::Sql(error).to_string()),
        Err(_) => lost(format!("not within {HINT:?}")),
    }
}
