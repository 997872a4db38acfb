//! The yardstick: an `ext_authz` server that lets everything in, written as most people write one.
//!
//! tonic and envoy-types with their defaults: the request is decoded, `x-api-key` is looked up in the map of headers, the
//! answer is made with the builder. It looks nothing up, counts nothing and refuses nobody, so what it costs is what an
//! answer costs before any work is done for it. Never meant to guard anything.

use std::net::SocketAddr;

use clap::Parser;
use envoy_types::ext_authz::v3::{
    CheckRequestExt as _, CheckResponseExt as _, OkHttpResponseBuilder,
    pb::{Authorization, AuthorizationServer, CheckRequest, CheckResponse, HeaderAppendAction},
};
use tokio::runtime::Builder;
use tonic::{Request, Response, Status, transport::Server};

/// Who everybody is taken for.
const TRUST_ID: &str = "7a1f3c52-9f0e-4b6d-8c41-2f6f0f6f9d10";

#[derive(Parser)]
#[command(about = "An ext_authz server that allows everything: what an answer costs at the least")]
struct Arguments {
    /// Where to listen.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:50061")]
    listen: SocketAddr,
    /// One thread does everything, instead of what `#[tokio::main]` starts.
    #[arg(long)]
    current_thread: bool,
}

struct AlwaysAllow;

#[tonic::async_trait]
impl Authorization for AlwaysAllow {
    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let request = request.into_inner();
        let key = request.get_client_headers().and_then(|headers| headers.get("x-api-key"));
        let mut ok = OkHttpResponseBuilder::new();
        if key.is_some() {
            ok.add_header("x-trust-id", TRUST_ID, Some(HeaderAppendAction::OverwriteIfExistsOrAdd), false);
        }
        let mut response = CheckResponse::with_status(Status::ok("allowed"));
        response.set_http_response(ok);
        Ok(Response::new(response))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments = Arguments::parse();
    // sqlx, which is built with us, makes `tracing` hand its spans to `log` as long as nobody subscribes, which costs 4 % of
    // the instructions. A server of its own has no sqlx.
    tracing::subscriber::set_global_default(tracing::subscriber::NoSubscriber::default())?;
    // The other is word for word what `#[tokio::main]` makes.
    let mut builder =
        if arguments.current_thread { Builder::new_current_thread() } else { Builder::new_multi_thread() };
    builder.enable_all().build()?.block_on(async {
        Server::builder().add_service(AuthorizationServer::new(AlwaysAllow)).serve(arguments.listen).await?;
        Ok(())
    })
}
