//! What a cached value is about. Caches and flights are generic over it; `api_key` is the first.

use std::{fmt::Debug, hash::Hash};

use async_trait::async_trait;

use crate::{base::fault::Fault, record::Versioned, store::Lookup};

/// One kind of cached value.
#[async_trait]
pub trait Cacheable: Send + Sync + 'static {
    /// Its name in metrics and Redis keys.
    const NAME: &'static str;
    /// What values are found by.
    type Key: Copy + Eq + Hash + Debug + AsRef<[u8]> + Send + Sync + 'static;
    /// What the store needs to find one.
    type Query: Clone + Send + Sync + 'static;
    /// The value.
    type Value: Clone + PartialEq + Send + Sync + 'static;

    /// The key that `query` is about.
    fn key(query: &Self::Query) -> Self::Key;
    /// Everything that `query` looks under: what a change must name for an absence to end.
    fn asked(query: &Self::Query) -> impl Iterator<Item = &[u8]>;
    /// A byte that differs between keys, to spread their deadlines.
    fn spread(key: &Self::Key) -> u8;
    /// Bytes that a value holds on the heap, about.
    fn heap_bytes(value: &Self::Value) -> usize;
    /// Writes a value for Redis.
    fn encode(value: &Self::Value, into: &mut Vec<u8>);
    /// Reads what [`Self::encode`] wrote; `None` for anything else.
    fn decode(bytes: &[u8]) -> Option<Self::Value>;
    /// The ids of the rows that a value was made of, at most four: what a change must name to concern it.
    fn objects(value: &Self::Value) -> impl Iterator<Item = uuid::Uuid>;

    /// Asks the store for the value.
    async fn load(store: &dyn Lookup, query: &Self::Query) -> Result<Versioned<Option<Self::Value>>, Fault>;
    /// Asks the store for the row that `entry` was read from.
    async fn load_again(store: &dyn Lookup, entry: &Self::Value) -> Result<Versioned<Option<Self::Value>>, Fault>;
    /// Whether `live` is still what somebody who found `entry` asked for; compares secrets in constant time.
    fn is_same(live: &Self::Value, entry: &Self::Value) -> bool;
}
