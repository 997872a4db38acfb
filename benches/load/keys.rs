//! Chooses the key of each check: from a file, in a selectable order, or a random key.
//!
//! The same seed gives the same keys in the same order.

use std::{fs, path::Path};

use crate::message::KEY_BYTES;

/// The order in which the keys of a file are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Order {
    /// Random, with a few frequent keys and many rare keys: the probability of the n-th key is proportional to 1/n.
    Zipf,
    /// Random, with the same probability for each key.
    Uniform,
    /// Each key once, in the order of the file. The run ends with the last key.
    Once,
}

/// With [`Order::Zipf`], the number of keys that are drawn before the run. After these keys, the same sequence begins
/// again.
const DRAWN: usize = 1 << 20;
/// The characters of random keys.
const CHARACTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// A source of keys.
pub(crate) struct Keys {
    all: Vec<Key>,
    order: Option<Order>,
    drawn: Vec<u32>,
    used: usize,
    random: Random,
}

struct Key {
    bytes: [u8; KEY_BYTES],
    trust: Option<Box<[u8]>>,
}

impl Keys {
    /// Reads the keys in `file`, one key per line. A space and the id of a trust may follow the key; grants must then
    /// be for this trust.
    ///
    /// # Errors
    /// If the file cannot be read, contains no key, or contains a key that does not have [`KEY_BYTES`] bytes.
    pub(crate) fn from_file(file: &Path, order: Order, seed: u64) -> Result<Self, String> {
        let text = fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let keys: Vec<_> =
            text.lines().enumerate().map(|(line, text)| key(line + 1, text)).collect::<Result<_, _>>()?;
        if keys.is_empty() {
            return Err(format!("{}: the file contains no key", file.display()));
        }
        let mut random = Random(seed);
        let drawn = if order == Order::Zipf { zipf(keys.len(), &mut random) } else { Vec::new() };
        Ok(Self { all: keys, order: Some(order), drawn, used: 0, random })
    }

    /// Generates a different random key, which the server does not know, for each check.
    pub(crate) const fn made_up(seed: u64) -> Self {
        Self { all: Vec::new(), order: None, drawn: Vec::new(), used: 0, random: Random(seed) }
    }

    /// Returns the index of the next key; `None` when all keys have been used.
    pub(crate) fn next(&mut self) -> Option<u32> {
        self.used += 1;
        match self.order {
            None => Some(0), // not used: `put` generates a random key
            Some(Order::Zipf) => Some(self.drawn[self.used % DRAWN]),
            Some(Order::Uniform) => Some(self.random.below(self.all.len())),
            Some(Order::Once) => u32::try_from(self.used - 1).ok().filter(|_| self.used <= self.all.len()),
        }
    }

    /// Writes the key with this index to `place`.
    pub(crate) fn put(&mut self, key: u32, place: &mut [u8]) {
        if let Some(key) = self.all.get(key as usize) {
            place.copy_from_slice(&key.bytes);
            return;
        }
        // The key does not have the form of a trustgate key, so the server cannot reject the key by its checksum.
        for ten in place.chunks_mut(10) {
            let mut bits = self.random.next();
            for character in ten {
                *character = CHARACTERS[usize::from(bits.to_le_bytes()[0] & 63)];
                bits >>= 6;
            }
        }
    }

    /// Returns the id of the trust of this key, if the file contains the id.
    pub(crate) fn trust(&self, key: u32) -> Option<&[u8]> {
        self.all.get(key as usize)?.trust.as_deref()
    }
}

fn key(line: usize, text: &str) -> Result<Key, String> {
    let (key, trust) = text.split_once(' ').map_or((text, None), |(key, trust)| (key, Some(trust)));
    let bytes = key.as_bytes().try_into();
    let bytes = bytes.map_err(|_| format!("line {line}: invalid key: it must have {KEY_BYTES} bytes"))?;
    Ok(Key { bytes, trust: trust.map(|trust| trust.as_bytes().into()) })
}

#[expect(clippy::cast_precision_loss, reason = "there are fewer than 2^52 keys")]
fn zipf(keys: usize, random: &mut Random) -> Vec<u32> {
    let mut sum = 0.0;
    let sums: Vec<f64> = (1..=keys)
        .map(|rank| {
            sum += 1.0 / rank as f64;
            sum
        })
        .collect();
    let draw = || {
        let wanted = random.share() * sum;
        let found = sums.partition_point(|sum| *sum < wanted).min(keys - 1);
        u32::try_from(found).unwrap_or(u32::MAX)
    };
    std::iter::repeat_with(draw).take(DRAWN).collect()
}

/// The generator `SplitMix64` (Steele, Lea, Flood 2014), which is good enough to choose keys.
struct Random(u64);

impl Random {
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Returns a random number below `end`, which must be at most 2^32.
    fn below(&mut self, end: usize) -> u32 {
        let (high, end) = (self.next() >> 32, end as u64);
        u32::try_from((high * end) >> 32).unwrap_or(u32::MAX)
    }

    /// Returns a random number from 0 (inclusive) to 1 (exclusive).
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}
