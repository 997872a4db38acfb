//! Determines the gRPC method that a request calls, or the HTTP status with which to refuse the request.
//!
//! An HTTP caller must not get 200 for a request that is not a gRPC call: Envoy in `http_service` mode treats any 200
//! as a grant (`envoy.extensions.filters.http.ext_authz.v3.HttpService`). gRPC clients map the HTTP status of a refusal
//! to a gRPC code, for example 404 to UNIMPLEMENTED
//! (<https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md>).

use http::{
    HeaderMap, Method, Request, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, TE},
};

use crate::ext_authz::framing::CHECK_PATH;

const HEALTH_CHECK_PATH: &str = "/grpc.health.v1.Health/Check";
const HEALTH_WATCH_PATH: &str = "/grpc.health.v1.Health/Watch";

/// A gRPC method that this server implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rpc {
    /// `envoy.service.auth.v3.Authorization/Check`
    Check,
    /// `grpc.health.v1.Health/Check`
    HealthCheck,
    /// `grpc.health.v1.Health/Watch`: a stream of answers that lasts until the client or the server ends it.
    HealthWatch,
}

impl Rpc {
    /// Returns the method that `request` calls.
    ///
    /// # Errors
    /// The HTTP status for a request that is not a gRPC call to one of these methods.
    pub(crate) fn of<B>(request: &Request<B>) -> Result<Self, StatusCode> {
        if request.method() != Method::POST {
            return Err(StatusCode::METHOD_NOT_ALLOWED);
        }
        let headers = request.headers();
        if !is_grpc(headers) {
            return Err(StatusCode::UNSUPPORTED_MEDIA_TYPE);
        }
        // Include the query in the comparison, because the path of a gRPC call has no query.
        let rpc = match request.uri().path_and_query().map_or("", |path| path.as_str()) {
            CHECK_PATH => Self::Check,
            HEALTH_CHECK_PATH => Self::HealthCheck,
            HEALTH_WATCH_PATH => Self::HealthWatch,
            _ => return Err(StatusCode::NOT_FOUND),
        };
        if only(headers, &TE) != Some(b"trailers") {
            return Err(StatusCode::BAD_REQUEST);
        }
        // gRPC clients send no `content-length`, but Envoy in `http_service` mode does. Without this rule, a client
        // could send the path, the headers and the body of a health check through such an Envoy and get 200. A `Check`
        // with a `content-length` is accepted, because a proxy in front of this server may add the header; SECURITY.md
        // describes the remaining risk.
        if rpc != Self::Check && headers.contains_key(CONTENT_LENGTH) {
            return Err(StatusCode::BAD_REQUEST);
        }
        Ok(rpc)
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let content_type = only(headers, &CONTENT_TYPE);
    content_type.is_some_and(|value| {
        value.eq_ignore_ascii_case(b"application/grpc") || value.eq_ignore_ascii_case(b"application/grpc+proto")
    })
}

/// Returns the value of the header `name` if the header occurs exactly once.
fn only<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h [u8]> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    values.next().is_none().then_some(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_grpc_calls_of_known_methods_are_accepted() {
        const GRPC: (&str, &str) = ("content-type", "application/grpc");
        const TRAILERS: (&str, &str) = ("te", "trailers");
        let (bad, media, unknown, method) = (Err(400), Err(415), Err(404), Err(405));
        for (method, path, headers, want) in [
            ("POST", CHECK_PATH, &[GRPC, TRAILERS][..], Ok(Rpc::Check)),
            ("POST", CHECK_PATH, &[("content-type", "Application/gRPC+proto"), TRAILERS], Ok(Rpc::Check)),
            ("POST", CHECK_PATH, &[GRPC, TRAILERS, ("content-length", "5")], Ok(Rpc::Check)),
            ("POST", HEALTH_CHECK_PATH, &[GRPC, TRAILERS], Ok(Rpc::HealthCheck)),
            ("POST", HEALTH_WATCH_PATH, &[GRPC, TRAILERS], Ok(Rpc::HealthWatch)),
            ("POST", HEALTH_CHECK_PATH, &[GRPC, TRAILERS, ("content-length", "5")], bad),
            ("POST", HEALTH_WATCH_PATH, &[GRPC, TRAILERS, ("content-length", "0")], bad),
            ("GET", CHECK_PATH, &[GRPC, TRAILERS], method),
            ("OPTIONS", "/", &[], method),
            ("POST", CHECK_PATH, &[TRAILERS], media),
            ("POST", CHECK_PATH, &[("content-type", "application/grpc-web"), TRAILERS], media),
            ("POST", CHECK_PATH, &[("content-type", "application/grpc+json"), TRAILERS], media),
            ("POST", CHECK_PATH, &[("content-type", "application/grpc, text/html"), TRAILERS], media),
            ("POST", CHECK_PATH, &[GRPC, ("content-type", "text/html"), TRAILERS], media),
            ("POST", CHECK_PATH, &[GRPC], bad),
            ("POST", CHECK_PATH, &[GRPC, ("te", "gzip")], bad),
            ("POST", CHECK_PATH, &[GRPC, TRAILERS, TRAILERS], bad),
            ("POST", "/", &[GRPC, TRAILERS], unknown),
            ("POST", "/envoy.service.auth.v3.Authorization/Check/", &[GRPC, TRAILERS], unknown),
            ("POST", "/envoy.service.auth.v3.Authorization/Check?a=b", &[GRPC, TRAILERS], unknown),
            ("POST", "/envoy.service.auth.v2.Authorization/Check", &[GRPC, TRAILERS], unknown),
            ("POST", "/grpc.health.v1.Health/List", &[GRPC, TRAILERS], unknown),
        ] {
            let mut request = Request::builder().method(method).uri(path);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let found = Rpc::of(&request.body(()).unwrap()).map_err(|status| status.as_u16());
            assert_eq!(found, want, "{method} {path} {headers:?}");
        }
    }
}
