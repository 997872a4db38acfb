//! The trait for kinds of cached values. The tiers of the cache are generic over this trait; `api_key` implements it.

use std::{fmt::Debug, hash::Hash};

use async_trait::async_trait;

use crate::{base::fault::Fault, record::Versioned, store::Lookup};

/// One kind of cached value.
#[async_trait]
pub trait Cacheable: Send + Sync + 'static {
    /// The name of the kind in metrics and Redis keys.
    const NAME: &'static str;
    /// The key of a value in the cache.
    type Key: Copy + Eq + Hash + Debug + AsRef<[u8]> + Send + Sync + 'static;
    /// The input for a lookup in the store.
    type Query: Clone + Send + Sync + 'static;
    /// The value.
    type Value: Clone + PartialEq + Send + Sync + 'static;

    /// Returns the cache key for `query`.
    fn key(query: &Self::Query) -> Self::Key;
    /// Returns everything that `query` searches for, as bytes. A change that affects one of these items makes a
    /// negative entry for `query` out of date.
    fn asked(query: &Self::Query) -> impl Iterator<Item = &[u8]>;
    /// Returns a byte that is evenly distributed over the keys. This byte determines the jitter in the lifetime of an
    /// entry.
    fn spread(key: &Self::Key) -> u8;
    /// Returns the approximate number of heap bytes of a value.
    fn heap_bytes(value: &Self::Value) -> usize;
    /// Encodes a value for Redis and appends the bytes to `into`.
    fn encode(value: &Self::Value, into: &mut Vec<u8>);
    /// Decodes the output of [`Self::encode`]. Returns `None` for any other bytes.
    fn decode(bytes: &[u8]) -> Option<Self::Value>;
    /// Returns the ids of the rows from which a value was made, at most four. A change to one of these rows makes the
    /// value out of date.
    fn objects(value: &Self::Value) -> impl Iterator<Item = uuid::Uuid>;

    /// Reads the value for `query` from the store.
    async fn load(store: &dyn Lookup, query: &Self::Query) -> Result<Versioned<Option<Self::Value>>, Fault>;
    /// Reads the row of `entry` from the store again.
    async fn load_again(store: &dyn Lookup, entry: &Self::Value) -> Result<Versioned<Option<Self::Value>>, Fault>;
    /// Returns true if `live` still answers the query that found `entry`. Compares secrets in constant time.
    fn is_same(live: &Self::Value, entry: &Self::Value) -> bool;
}
