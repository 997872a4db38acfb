//! Prepares the `CheckRequest` to send, and reads the part of a `CheckResponse` that distinguishes grants, denials and
//! faults.
//!
//! An answer counts as wrong if it is not clearly a grant, a denial or a fault, or if it is a grant for another trust.

/// The outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Granted; if the trust of the key is known, the grant is for this trust.
    Grant,
    /// Denied.
    Denial,
    /// The server could not decide.
    Fault,
    /// The answer is wrong or missing for this reason.
    Wrong(&'static str),
}

/// The part of the stored message that is replaced with a key. The placeholder has the length of the keys that
/// trustgate issues.
pub(crate) const PLACEHOLDER: &[u8; KEY_BYTES] = b"tg_0000000000000000000000000000000000000000000000000";
/// The length of every key that is sent, in bytes.
pub(crate) const KEY_BYTES: usize = 52;
/// The header that contains the key.
const KEY_HEADER: &[u8] = b"x-api-key";
/// A header name of the same length that is not a source of keys.
const OTHER_HEADER: &[u8] = b"x-api-kez";

/// A message as Envoy sends it, with its gRPC prefix.
pub(crate) struct Template {
    pub(crate) framed: Vec<u8>,
    /// The position of the key in `framed`.
    pub(crate) key_at: usize,
}

impl Template {
    /// Creates a template from a `CheckRequest` that contains [`PLACEHOLDER`] once. If `with_key` is false, renames the
    /// header of the key, so that the request has no key.
    ///
    /// # Errors
    /// If the message is too long, or does not contain the placeholder or the header exactly once.
    pub(crate) fn of(message: &[u8], with_key: bool) -> Result<Self, String> {
        let length = u32::try_from(message.len()).map_err(|_| "the message is too long")?;
        let mut framed = vec![0];
        framed.extend_from_slice(&length.to_be_bytes());
        framed.extend_from_slice(message);
        let key_at = only(&framed, PLACEHOLDER)?;
        if !with_key {
            let header_at = only(&framed, KEY_HEADER)?;
            framed[header_at..header_at + KEY_HEADER.len()].copy_from_slice(OTHER_HEADER);
        }
        Ok(Self { framed, key_at })
    }
}

/// Returns the position of `wanted`, which `bytes` must contain exactly once.
fn only(bytes: &[u8], wanted: &[u8]) -> Result<usize, String> {
    let mut places = bytes.windows(wanted.len()).enumerate().filter(|(_, part)| *part == wanted);
    match (places.next(), places.next()) {
        (Some((at, _)), None) => Ok(at),
        (found, _) => {
            let count = if found.is_some() { "more than once" } else { "not at all" };
            Err(format!("invalid message: it contains {:?} {count}", String::from_utf8_lossy(wanted)))
        }
    }
}

/// Reads the outcome from a `CheckResponse` with its gRPC prefix. `trust`: the id of the key's trust, if it is known.
pub(crate) fn read(framed: &[u8], trust: Option<&[u8]>) -> Outcome {
    let Some((prefix, message)) = framed.split_at_checked(5) else { return Outcome::Wrong("incomplete message") };
    let [compressed, length @ ..] = prefix else { return Outcome::Wrong("incomplete message") };
    if *compressed != 0 || length != u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes() {
        return Outcome::Wrong("not exactly one message");
    }
    decode(message, trust).unwrap_or(Outcome::Wrong("invalid CheckResponse"))
}

/// Decodes a `CheckResponse`. Field numbers: `envoy/service/auth/v3/external_auth.proto`, `google/rpc/status.proto`.
fn decode(message: &[u8], trust: Option<&[u8]>) -> Result<Outcome, Malformed> {
    let (mut code, mut ok, mut denied, mut is_error) = (0, None, None, false);
    let mut fields = Fields(message);
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Field::Bytes(status)) => code = number_in(status, 1)?,
            (2, Field::Bytes(response)) => denied = Some(response),
            (3, Field::Bytes(response)) => ok = Some(response),
            (5, Field::Bytes(_)) => is_error = true,
            _ => {}
        }
    }
    Ok(match (code, ok, denied) {
        _ if is_error => Outcome::Fault,
        (0, Some(ok), None) => match (trust_in(ok)?, trust) {
            (None, _) => Outcome::Wrong("grant without x-trust-id"),
            (Some(found), Some(trust)) if found != trust => Outcome::Wrong("grant for another trust"),
            (Some(_), _) => Outcome::Grant,
        },
        (0, ..) => Outcome::Wrong("status code OK that does not match the response"),
        (_, None, Some(denied)) => {
            let mut fields = Fields(denied);
            let mut status = 0;
            while let Some((number, value)) = fields.next()? {
                if let (1, Field::Bytes(http)) = (number, value) {
                    status = number_in(http, 1)?;
                }
            }
            if status >= 500 { Outcome::Fault } else { Outcome::Denial }
        }
        (..) => Outcome::Wrong("status code that does not match the response"),
    })
}

/// Returns the value of `x-trust-id` among the headers of an `OkHttpResponse`.
fn trust_in(ok: &[u8]) -> Result<Option<&[u8]>, Malformed> {
    let mut options = Fields(ok);
    while let Some((number, option)) = options.next()? {
        let (2, Field::Bytes(option)) = (number, option) else { continue };
        let mut parts = Fields(option);
        while let Some((number, header)) = parts.next()? {
            let (1, Field::Bytes(header)) = (number, header) else { continue };
            let (mut name, mut value) = (&[][..], &[][..]);
            let mut fields = Fields(header);
            while let Some((number, field)) = fields.next()? {
                match (number, field) {
                    (1, Field::Bytes(bytes)) => name = bytes,
                    (2 | 3, Field::Bytes(bytes)) if !bytes.is_empty() => value = bytes,
                    _ => {}
                }
            }
            if name == b"x-trust-id" {
                return Ok(Some(value));
            }
        }
    }
    Ok(None)
}

/// Returns the value of the integer field `wanted` of a message; 0 if the field is absent.
fn number_in(message: &[u8], wanted: u64) -> Result<u64, Malformed> {
    let mut found = 0;
    let mut fields = Fields(message);
    while let Some((number, value)) = fields.next()? {
        if let Field::Number(value) = value
            && number == wanted
        {
            found = value;
        }
    }
    Ok(found)
}

/// The error for bytes that are not a valid protobuf message.
struct Malformed;

/// Iterates over the fields of a protobuf message.
struct Fields<'m>(&'m [u8]);

enum Field<'m> {
    Number(u64),
    Bytes(&'m [u8]),
    Fixed,
}

impl<'m> Fields<'m> {
    /// Returns the next field with its number; `None` at the end of the message.
    fn next(&mut self) -> Result<Option<(u64, Field<'m>)>, Malformed> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let field = match tag & 7 {
            0 => Field::Number(self.varint()?),
            1 => self.take(8).map(|_| Field::Fixed)?,
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Field::Fixed)?,
            _ => return Err(Malformed),
        };
        Ok(Some((tag >> 3, field)))
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or(Malformed)?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Malformed)
    }

    fn take(&mut self, length: u64) -> Result<&'m [u8], Malformed> {
        let length = usize::try_from(length).map_err(|_| Malformed)?;
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }
}
