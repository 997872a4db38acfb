//! The part of header compression (RFC 7541) that is needed to decode answers. Requests need no encoder, because their
//! headers are prepared bytes that Envoy wrote.
//!
//! The decoder accepts every encoding of a header, but returns only the headers that contain the status of a call.

use std::collections::VecDeque;

/// The initial size of the dynamic table, in bytes as defined in section 4.1.
const TABLE_BYTES: usize = 4_096;
/// The first index of the dynamic table, which follows the static table (appendix A).
const DYNAMIC: usize = 62;
/// The index of `:status: 200` in the static table.
const STATUS_200: usize = 8;

/// The statuses in a header block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Statuses {
    /// `:status`.
    pub(crate) status: Option<u16>,
    /// `grpc-status`.
    pub(crate) grpc_status: Option<u16>,
}

/// The decoder for the answers on a connection.
#[derive(Default)]
pub(crate) struct Decoder {
    /// The dynamic table, newest entry first.
    table: VecDeque<TableEntry>,
    bytes: usize,
    bytes_max: Option<usize>,
}

#[derive(Clone)]
struct TableEntry {
    name: Box<[u8]>,
    meaning: Meaning,
    bytes: usize,
}

#[derive(Clone, Copy)]
enum Meaning {
    Status(u16),
    GrpcStatus(u16),
    Other,
}

impl Decoder {
    /// Decodes one header block; `None` if it is invalid.
    pub(crate) fn read(&mut self, mut block: &[u8]) -> Option<Statuses> {
        let mut statuses = Statuses::default();
        while let Some(first) = block.first().copied() {
            let meaning = if first & 0x80 != 0 {
                self.at(number(&mut block, 7)?)?
            } else if first & 0xc0 == 0x40 {
                let (name, value) = self.literal(&mut block, 6)?;
                self.insert(name, &value)
            } else if first & 0xe0 == 0x20 {
                self.bytes_max = Some(number(&mut block, 5)?);
                self.evict();
                continue;
            } else {
                let (name, value) = self.literal(&mut block, 4)?;
                meaning(&name, &value)
            };
            match meaning {
                Meaning::Status(status) => statuses.status = Some(status),
                Meaning::GrpcStatus(status) => statuses.grpc_status = Some(status),
                Meaning::Other => {}
            }
        }
        Some(statuses)
    }

    fn at(&self, number: usize) -> Option<Meaning> {
        match number {
            0 => None,
            // The statuses 204, 206, 304, 400, 404 and 500. The caller only needs to know that the status is not 200.
            STATUS_200 => Some(Meaning::Status(200)),
            9..=14 => Some(Meaning::Status(0)),
            1..DYNAMIC => Some(Meaning::Other),
            _ => self.table.get(number - DYNAMIC).map(|entry| entry.meaning),
        }
    }

    fn literal(&self, block: &mut &[u8], bits: u32) -> Option<(Box<[u8]>, Vec<u8>)> {
        let name = match number(block, bits)? {
            0 => text(block)?.into(),
            STATUS_200..=14 => Box::from(&b":status"[..]),
            // The decoder does not use these headers. Only the length of the name matters, because it counts towards
            // the size of the table.
            number @ 1..DYNAMIC => vec![b'?'; static_name_bytes(number)].into(),
            number => self.table.get(number - DYNAMIC)?.name.clone(),
        };
        Some((name, text(block)?))
    }

    fn insert(&mut self, name: Box<[u8]>, value: &[u8]) -> Meaning {
        let (meaning, bytes) = (meaning(&name, value), name.len() + value.len() + 32);
        self.table.push_front(TableEntry { name, meaning, bytes });
        self.bytes += bytes;
        self.evict();
        meaning
    }

    fn evict(&mut self) {
        while self.bytes > self.bytes_max.unwrap_or(TABLE_BYTES) {
            let Some(oldest) = self.table.pop_back() else { return };
            self.bytes -= oldest.bytes;
        }
    }
}

fn meaning(name: &[u8], value: &[u8]) -> Meaning {
    let number = || std::str::from_utf8(value).ok().and_then(|value| value.parse().ok()).unwrap_or(u16::MAX);
    match name {
        b":status" => Meaning::Status(number()),
        b"grpc-status" => Meaning::GrpcStatus(number()),
        _ => Meaning::Other,
    }
}

/// Returns the length of a name in the static table (appendix A), whose first index is 1.
fn static_name_bytes(number: usize) -> usize {
    const LENGTHS: [u8; DYNAMIC - 1] = [
        10, 7, 7, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, 14, 15, 15, 13, 6, 27, 3, 5, 13, 13, 19, 16, 16, 14, 16, 13, 12, 6,
        4, 4, 6, 7, 4, 4, 8, 17, 13, 8, 19, 13, 4, 8, 12, 18, 19, 5, 7, 7, 11, 6, 10, 25, 17, 10, 4, 3, 16,
    ];
    usize::from(LENGTHS[number - 1])
}

/// Reads an integer that begins in the lowest `bits` bits of the first byte (section 5.1).
fn number(block: &mut &[u8], bits: u32) -> Option<usize> {
    let mask = (1_u8 << bits) - 1;
    let (first, rest) = block.split_first()?;
    *block = rest;
    let mut number = usize::from(first & mask);
    if number < usize::from(mask) {
        return Some(number);
    }
    for shift in (0..28).step_by(7) {
        let (byte, rest) = block.split_first()?;
        *block = rest;
        number += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Reads a string, plain or in the Huffman code of appendix B (section 5.2).
fn text(block: &mut &[u8]) -> Option<Vec<u8>> {
    let is_coded = block.first()? & 0x80 != 0;
    let length = number(block, 7)?;
    let (text, rest) = block.split_at_checked(length)?;
    *block = rest;
    if is_coded { decode(text) } else { Some(text.to_vec()) }
}

/// The length of the Huffman code of each character in appendix B, in bits. The code is canonical: codes of the same
/// length are consecutive numbers, so the lengths determine the codes. The last entry is the end-of-string symbol,
/// which no valid string contains.
#[rustfmt::skip]
const CODE_BITS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28,
    28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7,
    7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21,
    23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24,
    21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];

/// The characters whose codes have the same length.
#[derive(Clone, Copy)]
struct Level {
    /// The lowest code.
    first: u32,
    count: u32,
    /// The index in [`CHARACTERS`] of the first of these characters.
    start: u32,
}

/// The levels, indexed by the length of the codes in bits.
const LEVELS: [Level; 31] = levels();
/// All characters, ordered by the length of their codes and then by their numeric value.
const CHARACTERS: [u16; 257] = characters();

const fn levels() -> [Level; 31] {
    let mut levels = [Level { first: 0, count: 0, start: 0 }; 31];
    let mut character = 0;
    while character < CODE_BITS.len() {
        levels[CODE_BITS[character] as usize].count += 1;
        character += 1;
    }
    let mut bits = 1;
    while bits < levels.len() {
        let shorter = levels[bits - 1];
        levels[bits].first = (shorter.first + shorter.count) << 1;
        levels[bits].start = shorter.start + shorter.count;
        bits += 1;
    }
    levels
}

const fn characters() -> [u16; 257] {
    let mut characters = [0; 257];
    let (mut bits, mut found) = (0, 0);
    while bits < LEVELS.len() {
        let mut character = 0;
        while character < 257_u16 {
            if CODE_BITS[character as usize] as usize == bits {
                characters[found] = character;
                found += 1;
            }
            character += 1;
        }
        bits += 1;
    }
    characters
}

fn decode(coded: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::with_capacity(coded.len() * 2);
    let (mut code, mut bits) = (0_u32, 0);
    for byte in coded {
        for bit in (0..8).rev() {
            code = code << 1 | u32::from(byte >> bit & 1);
            bits += 1;
            let level = LEVELS.get(bits)?;
            if let Some(offset) = code.checked_sub(level.first).filter(|offset| *offset < level.count) {
                text.push(u8::try_from(CHARACTERS[(level.start + offset) as usize]).ok()?);
                (code, bits) = (0, 0);
            }
        }
    }
    // The remaining bits must be padding: fewer than 8 bits, all of them 1.
    (bits < 8 && code == (1 << bits) - 1).then_some(text)
}
