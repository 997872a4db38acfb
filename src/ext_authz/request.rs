//! Parses an `envoy.service.auth.v3.CheckRequest` into a [`View`], which borrows the fields that a decision needs.
//!
//! The parser accepts what a generated decoder accepts, and also header values that are not UTF-8, because Envoy
//! forwards the bytes of the client. A decoder that refuses such values fails the call with a gRPC error, and
//! `failure_mode_allow` then lets the request pass (GHSA-9g5w-hqr3-w2ph). Fields that no decision needs are skipped
//! without decoding their content. The parser is stricter than prost in one case: it refuses a map field whose tag does
//! not have the wire type of a message. prost does not check this wire type.
//!
//! The parser does not copy values. Each header or context extension beyond the view's inline capacity takes 32 bytes
//! of heap memory. Entries without a name, which no HTTP request has, are dropped.
//!
//! Field numbers: `envoy/service/auth/v3/attribute_context.proto`, `external_auth.proto`,
//! `config/core/v3/address.proto` and `base.proto`. Wire format: <https://protobuf.dev/programming-guides/encoding/>.

use smallvec::SmallVec;

/// The message is not a `CheckRequest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the message cannot be decoded")]
pub struct Undecodable;

/// One request header as Envoy sent it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header<'m> {
    /// The name, which is valid UTF-8. Envoy sends names in lower case, but other proxies may not, so comparisons
    /// ignore case.
    pub name: &'m [u8],
    /// The value: any bytes.
    pub value: &'m [u8],
}

/// The remote end of a client's connection to Envoy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer<'m> {
    /// An IP address, as text.
    Socket(&'m str),
    /// A Unix socket, which has no address.
    Pipe,
}

/// The parts of a `CheckRequest` that a decision needs. Strings that are missing from the message are empty.
#[derive(Debug, Default)]
pub struct View<'m> {
    /// True if the message has a `request.http`. A message about a TCP connection has none.
    pub is_http: bool,
    /// The method, as the client sent it.
    pub method: &'m str,
    /// Path and query, not decoded.
    pub path: &'m str,
    /// The host of the request, from `Host` or `:authority`.
    pub host: &'m str,
    /// The direct peer of Envoy.
    pub peer: Option<Peer<'m>>,
    /// The peer's identity from its certificate, if the connection uses mTLS.
    pub principal: &'m str,
    map: SmallVec<[Header<'m>; 32]>,
    raw: SmallVec<[Header<'m>; 32]>,
    extensions: SmallVec<[(&'m str, &'m str); 4]>,
}

impl<'m> View<'m> {
    /// Parses `message`.
    ///
    /// # Errors
    /// [`Undecodable`] if `message` is not an encoded `CheckRequest`.
    pub fn parse(message: &'m [u8]) -> Result<Self, Undecodable> {
        let mut view = Self::default();
        each(message, |number, field| match number {
            1 => view.attributes(field.bytes()?),
            _ => Ok(()),
        })?;
        Ok(view)
    }

    /// Returns the request headers: the raw list if Envoy sent one (`encode_raw_headers`), otherwise the map.
    /// The two are not combined: the raw list already contains each header as the client sent it.
    #[must_use]
    pub fn headers(&self) -> &[Header<'m>] {
        if self.raw.is_empty() { &self.map } else { &self.raw }
    }

    /// True if the headers are as the client sent them. Otherwise, Envoy has joined repeated headers with commas.
    #[must_use]
    pub fn has_raw_headers(&self) -> bool {
        !self.raw.is_empty()
    }

    /// Returns the values of all headers with the name `name`, compared case-insensitively.
    pub fn header<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'m [u8]> + 'a {
        self.headers()
            .iter()
            .filter(move |header| header.name.eq_ignore_ascii_case(name.as_bytes()))
            .map(|header| header.value)
    }

    /// Returns the route's context extensions, in the order in which the message contains them. If a key occurs twice,
    /// the last value counts.
    pub fn context_extensions(&self) -> impl Iterator<Item = (&'m str, &'m str)> + '_ {
        self.extensions.iter().copied()
    }

    fn attributes(&mut self, message: &'m [u8]) -> Result<(), Undecodable> {
        each(message, |number, field| match number {
            1 => self.source(field.bytes()?),
            4 => each(field.bytes()?, |number, field| match number {
                2 => self.http(field.bytes()?),
                _ => Ok(()),
            }),
            10 => {
                let (key, value) = entry(field.bytes()?)?;
                let (key, value) = (text(key)?, text(value)?);
                if !key.is_empty() {
                    self.extensions.push((key, value));
                }
                Ok(())
            }
            _ => Ok(()),
        })
    }

    /// Reads an `AttributeContext.Peer`.
    fn source(&mut self, message: &'m [u8]) -> Result<(), Undecodable> {
        each(message, |number, field| {
            match number {
                1 => self.address(field.bytes()?)?,
                4 => self.principal = text(field.bytes()?)?,
                _ => {}
            }
            Ok(())
        })
    }

    /// Reads a `core.Address`. Its fields form a oneof, so the last field wins.
    fn address(&mut self, message: &'m [u8]) -> Result<(), Undecodable> {
        each(message, |number, field| {
            match number {
                1 => {
                    let mut address = match self.peer {
                        Some(Peer::Socket(address)) => address, // protobuf merges a message field that occurs twice
                        _ => "",
                    };
                    each(field.bytes()?, |number, field| {
                        if number == 2 {
                            address = text(field.bytes()?)?;
                        }
                        Ok(())
                    })?;
                    self.peer = Some(Peer::Socket(address));
                }
                2 => {
                    field.bytes()?;
                    self.peer = Some(Peer::Pipe);
                }
                3 => {
                    field.bytes()?;
                    self.peer = None; // the address of an internal listener is not a network address
                }
                _ => {}
            }
            Ok(())
        })
    }

    /// Reads an `AttributeContext.HttpRequest`.
    fn http(&mut self, message: &'m [u8]) -> Result<(), Undecodable> {
        self.is_http = true;
        each(message, |number, field| {
            match number {
                2 => self.method = text(field.bytes()?)?,
                3 => {
                    let (name, value) = entry(field.bytes()?)?;
                    push_named(&mut self.map, Header { name: utf8(name)?, value });
                }
                4 => self.path = text(field.bytes()?)?,
                5 => self.host = text(field.bytes()?)?,
                13 => each(field.bytes()?, |number, field| {
                    if number == 1 {
                        push_named(&mut self.raw, header_value(field.bytes()?)?);
                    }
                    Ok(())
                })?,
                _ => {}
            }
            Ok(())
        })
    }
}

fn push_named<'m>(headers: &mut SmallVec<[Header<'m>; 32]>, header: Header<'m>) {
    if !header.name.is_empty() {
        headers.push(header);
    }
}

/// Reads a map entry: field 1 is the key, field 2 the value. A missing field is empty.
fn entry(message: &[u8]) -> Result<(&[u8], &[u8]), Undecodable> {
    let (mut key, mut value): (&[u8], &[u8]) = (&[], &[]);
    each(message, |number, field| {
        match number {
            1 => key = field.bytes()?,
            2 => value = field.bytes()?,
            _ => {}
        }
        Ok(())
    })?;
    Ok((key, value))
}

/// Reads a `core.HeaderValue` of the raw list, where Envoy sets `raw_value` and leaves `value` empty.
fn header_value(message: &[u8]) -> Result<Header<'_>, Undecodable> {
    let mut header = Header::default();
    let mut raw: &[u8] = &[];
    each(message, |number, field| {
        match number {
            1 => header.name = utf8(field.bytes()?)?,
            2 => header.value = field.bytes()?,
            3 => raw = field.bytes()?,
            _ => {}
        }
        Ok(())
    })?;
    if !raw.is_empty() {
        header.value = raw;
    }
    Ok(header)
}

fn text(bytes: &[u8]) -> Result<&str, Undecodable> {
    std::str::from_utf8(bytes).map_err(|_| Undecodable)
}

/// Checks that `bytes` are UTF-8 and returns them unchanged. Tests for ASCII first, because most names are ASCII and
/// that test is faster.
fn utf8(bytes: &[u8]) -> Result<&[u8], Undecodable> {
    if bytes.is_ascii() { Ok(bytes) } else { text(bytes).map(str::as_bytes) }
}

/// The content of a field, by its wire type.
#[derive(Clone, Copy)]
enum WireField<'m> {
    Bytes(&'m [u8]),
    Other,
}

impl<'m> WireField<'m> {
    /// Returns the bytes of a length-delimited field. A known field with another wire type makes the message
    /// undecodable.
    const fn bytes(self) -> Result<&'m [u8], Undecodable> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Other => Err(Undecodable),
        }
    }
}

/// Calls `take` with the number and the content of each field of `message`.
fn each<'m>(
    mut message: &'m [u8],
    mut take: impl FnMut(u64, WireField<'m>) -> Result<(), Undecodable>,
) -> Result<(), Undecodable> {
    while !message.is_empty() {
        let (number, kind) = key(&mut message)?;
        let field = match kind {
            2 => WireField::Bytes(length_delimited(&mut message)?),
            kind => {
                skip(&mut message, number, kind)?;
                WireField::Other
            }
        };
        take(number, field)?;
    }
    Ok(())
}

/// Reads the key of a field: the field number (at least 1) and the wire type.
fn key(message: &mut &[u8]) -> Result<(u64, u64), Undecodable> {
    let key = varint(message)?;
    let (number, kind) = (key >> 3, key & 7);
    if number == 0 || key > u64::from(u32::MAX) { Err(Undecodable) } else { Ok((number, kind)) }
}

/// Skips a field that is not length-delimited. Groups may be nested 100 deep, as in generated decoders.
fn skip(message: &mut &[u8], number: u64, kind: u64) -> Result<(), Undecodable> {
    let mut open: SmallVec<[u64; 8]> = SmallVec::new();
    let (mut number, mut kind) = (number, kind);
    loop {
        match kind {
            0 => drop(varint(message)?),
            1 => drop(take(message, 8)?),
            2 => drop(length_delimited(message)?),
            3 if open.len() < 100 => open.push(number),
            4 if open.pop() == Some(number) => {}
            5 => drop(take(message, 4)?),
            _ => return Err(Undecodable),
        }
        if open.is_empty() {
            return Ok(());
        }
        (number, kind) = key(message)?;
    }
}

fn length_delimited<'m>(message: &mut &'m [u8]) -> Result<&'m [u8], Undecodable> {
    let length = usize::try_from(varint(message)?).map_err(|_| Undecodable)?;
    take(message, length)
}

fn take<'m>(message: &mut &'m [u8], length: usize) -> Result<&'m [u8], Undecodable> {
    let (taken, rest) = message.split_at_checked(length).ok_or(Undecodable)?;
    *message = rest;
    Ok(taken)
}

/// Reads a varint of at most ten bytes and 64 bits.
#[inline]
fn varint(message: &mut &[u8]) -> Result<u64, Undecodable> {
    match *message {
        // Most varints have one byte: the keys of fields, and lengths below 128.
        [byte @ 0..0x80, rest @ ..] => {
            *message = rest;
            Ok(u64::from(*byte))
        }
        _ => long_varint(message),
    }
}

fn long_varint(message: &mut &[u8]) -> Result<u64, Undecodable> {
    let mut value = 0;
    for (at, byte) in message.iter().take(10).enumerate() {
        if at == 9 && *byte > 1 {
            return Err(Undecodable);
        }
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            *message = &message[at + 1..];
            return Ok(value);
        }
    }
    Err(Undecodable)
}

#[cfg(test)]
mod tests;
