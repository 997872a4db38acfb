//! Measures the memory that the server allocates for a check: at most a small multiple of the message size, and nothing
//! for a check that is answered from L1.
//!
//! This is a separate binary because its global allocator counts the allocations of each thread in the process.

#![allow(clippy::unwrap_used, unreachable_pub)]
#![expect(
    unsafe_code,
    reason = "`GlobalAlloc` is an unsafe trait; this allocator counts, and calls the system allocator"
)]

#[path = "support/mod.rs"]
mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    time::Duration,
};

use proptest::{collection::vec, prelude::*};
use trustgate::testing::{
    base::settings::{RawValue, Reader, Section as _},
    ext_authz::{
        check::Progress,
        credential::{CredentialSettings, extract::extract},
        decision::{Basis, Decision, DenyReason},
        request::View,
        response::{OnFault, Replies, Reply},
        route::Demands,
    },
    server::Delay,
};

use crate::support::{
    server::{TestConfig, metric},
    store_proxy::StoreProxy,
};

struct Counting;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: each method passes its arguments to `System` and returns the result. The counters are thread-local cells
// without a destructor, so counting allocates nothing and cannot fail.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.set(LIVE.get().wrapping_add(layout.size()));
        PEAK.set(PEAK.get().max(LIVE.get()));
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller upholds the contract of `GlobalAlloc::alloc`, and `System.alloc` has the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().wrapping_sub(layout.size()));
        // SAFETY: `memory` came from `System.alloc` above with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Returns the peak memory, in bytes, that this thread allocates during `work`.
fn peak_of(work: impl FnOnce()) -> usize {
    LIVE.set(0);
    PEAK.set(0);
    work();
    PEAK.get()
}

/// Returns the number of allocations that this thread makes during `work`.
fn allocations_of(work: impl FnOnce()) -> usize {
    COUNT.set(0);
    work();
    COUNT.get()
}

fn settings() -> CredentialSettings {
    let mut reader = Reader::default();
    let sources = "header:k,authorization:bearer,authorization:apikey,query:k,cookie:k";
    reader.put("credential", "sources", RawValue::One(sources.into()), String::new());
    CredentialSettings::read(&mut reader)
}

/// Does everything that a check does with a message, except looking up the key.
fn check(settings: &CredentialSettings, replies: &Replies, message: &[u8]) {
    let Ok(view) = View::parse(message) else { return drop(replies.denial(DenyReason::Undecodable)) };
    let extracted = extract(settings, &view);
    let demands = Demands::of(&view);
    drop(replies.decision(&Decision::Anonymous, &extracted.removals, Basis::Confirmed));
    drop((demands, extracted));
}

fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    let mut length = content.len();
    while length >= 0x80 {
        field.push((length & 0x7f | 0x80).to_le_bytes()[0]);
        length >>= 7;
    }
    field.push(length.to_le_bytes()[0]);
    field.extend_from_slice(content);
    field
}

/// Returns a message with this content in `attributes.request.http`.
fn http(content: &[u8]) -> Vec<u8> {
    field(1, &field(4, &field(2, content)))
}

fn raw_header(name: &[u8], value: &[u8]) -> Vec<u8> {
    field(1, &[field(1, name), field(3, value)].concat())
}

/// Returns a list of raw headers that contains one header. If a message contains several lists, the decoder merges
/// them.
fn raw_header_list(name: &[u8], value: &[u8]) -> Vec<u8> {
    field(13, &raw_header(name, value))
}

fn map_header(name: &[u8], value: &[u8]) -> Vec<u8> {
    field(3, &[field(1, name), field(2, value)].concat())
}

/// The maximum number of bytes allocated at one time for each byte of the message. While a list grows, its old buffer
/// and a new buffer of twice the size exist at the same time. The shortest header takes 5 bytes in the message and 32
/// bytes in such a list: a factor of 19. The shortest scope takes 2 and 16 bytes: a factor of 24. A generated decoder
/// would need more.
const MULTIPLE: usize = 32;
/// The maximum number of bytes allocated for the answer to a message of any size.
const FIXED: usize = 4 << 10;

fn assert_small(content: &str, settings: &CredentialSettings, replies: &Replies, message: &[u8]) {
    // The first check of a thread allocates the buffer for its answers, which later checks reuse.
    check(settings, replies, &[]);
    let peak = peak_of(|| check(settings, replies, message));
    assert!(peak <= FIXED + MULTIPLE * message.len(), "{content}: {peak} bytes for a message of {}", message.len());
}

#[test]
fn allocator_measures_the_size_of_an_allocation() {
    assert_eq!(peak_of(|| drop(std::hint::black_box(vec![0_u8; 12_345]))), 12_345);
}

/// Runs complete checks, from the bytes of the message to the bytes of the answer, including metrics and lease. The
/// messages contain keys with and without scopes, in both encodings of headers, in `authorization` and in the query.
/// Two of the checks are denied.
#[tokio::test]
async fn checks_answered_from_l1_allocate_nothing() {
    let test_config = TestConfig::new().with("credential.sources", "header:x-api-key,authorization:bearer,query:key");
    test_config.migrate().await;
    test_config.trust("acme").await;
    let plain = test_config.issue("acme", &[]).await;
    let scoped = test_config.issue("acme", &["--scope", "read", "--scope", "write"]).await;
    let revoked = test_config.issue("acme", &[]).await;
    test_config.revoke(&revoked).await;
    let (running, _proxy) = StoreProxy::start(&test_config, |_| ()).await;
    running.ready().await;
    let checker = running.checker();
    let head = [field(2, b"GET"), raw_header_list(b"user-agent", b"curl/8.5.0")].concat();
    let with = |name: &[u8], value: &str| http(&[head.clone(), raw_header_list(name, value.as_bytes())].concat());
    let messages = [
        ("key in a raw header", with(b"x-api-key", &plain.key)),
        ("key in a map header", http(&map_header(b"x-api-key", plain.key.as_bytes()))),
        ("key with scopes", with(b"x-api-key", &scoped.key)),
        ("key as a bearer token", with(b"authorization", &format!("Bearer {}", plain.key))),
        ("key in the query", http(&field(4, format!("/p?key={}&x=1", plain.key).as_bytes()))),
        ("revoked key", with(b"x-api-key", &revoked.key)),
        ("no key", http(&head)),
    ];
    for (content, message) in &messages {
        // The first check reads the key from the store. The next two checks allocate the buffers of this thread.
        for _ in 0..3 {
            assert!(matches!(checker.check(message).await, Reply::Message(_)), "{content}");
        }
        // Reading this metric makes the cache finish its pending work from the insertion, so that no hit does it.
        metric(running.admin_address(), "trustgate_cache_entries{kind=\"api_key\"}").await;
        let count = allocations_of(|| {
            for _ in 0..10_000 {
                assert!(matches!(checker.try_decide(message), Progress::Done(Reply::Message(_))), "{content}");
            }
        });
        assert_eq!(count, 0, "{content}");
    }
    running.stop(Delay::None).await.unwrap();
}

#[test]
fn worst_case_messages_allocate_a_small_multiple_of_their_size() {
    let (settings, replies) = checker_parts();
    // Use counts just above a power of two, where a list that doubles its capacity has the most unused capacity.
    for count in [1, 33, 1_025, 65_537] {
        let many = |content: &[u8]| content.repeat(count);
        let raw = |content: &[u8]| http(&field(13, &many(content)));
        let cookies = raw_header(b"cookie", b"k=");
        for (content, message) in [
            ("empty raw headers", raw(&[10, 0])),
            ("lists of one raw header", http(&many(&field(13, &raw_header(b"a", b""))))),
            ("empty map headers", http(&many(&[26, 0]))),
            ("short raw headers", raw(&raw_header(b"a", b""))),
            ("short map headers", http(&many(&map_header(b"a", b"")))),
            ("keys in raw headers", raw(&raw_header(b"k", b""))),
            ("short extensions", field(1, &many(&field(10, &field(1, b"a"))))),
            ("requests", field(1, &field(4, &many(&[18, 0])))),
            ("keys in the query", http(&field(4, &[b"?".as_slice(), &many(b"k&")].concat()))),
            ("an encoded key", http(&field(4, &[b"?k=".as_slice(), &many(b"%41")].concat()))),
            ("encoded keys", http(&field(4, &[b"?".as_slice(), &many(b"k=%41&")].concat()))),
            ("keys in cookies", http(&map_header(b"cookie", &many(b"k=;")))),
            ("cookies", http(&map_header(b"cookie", &[b"k=;".as_slice(), &many(b"a;")].concat()))),
            ("cookie headers", http(&field(13, &[cookies, many(&raw_header(b"cookie", b"a"))].concat()))),
            ("bearers", http(&many(&map_header(b"authorization", b"bearer")))),
            ("schemes", http(&map_header(b"authorization", &many(b"bearer,")))),
            ("groups", field(1, &many(&[0x0b, 0x0c]))),
            ("scopes", field(1, &field(10, &[field(1, b"trustgate.scopes"), field(2, &many(b"a "))].concat()))),
        ] {
            assert_small(&format!("{count} {content}"), &settings, &replies, &message);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn random_bytes_allocate_a_small_multiple_of_their_size(bytes in vec(any::<u8>(), 0..2_000)) {
        let (settings, replies) = checker_parts();
        assert_small("bytes", &settings, &replies, &bytes);
        assert_small("bytes as a request", &settings, &replies, &http(&bytes));
        assert_small("bytes as headers", &settings, &replies, &http(&field(13, &bytes)));
    }

    /// The requests contain valid fields in any number and order.
    #[test]
    fn random_requests_allocate_a_small_multiple_of_their_size(pieces in vec(piece(), 0..60)) {
        let (settings, replies) = checker_parts();
        assert_small("a request", &settings, &replies, &http(&pieces.concat()));
    }
}

fn checker_parts() -> (CredentialSettings, Replies) {
    (settings(), Replies::new(OnFault::Deny, Duration::from_secs(1)))
}

fn piece() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof!["", "k", "cookie", "authorization", "[a-z-]{1,9}"].prop_map(String::into_bytes);
    let value = prop_oneof![
        "(k=[a-z]{0,3}; ?|[a-z];){0,20}".prop_map(String::into_bytes),
        "(bearer |apikey |,){0,9}".prop_map(String::into_bytes),
        vec(any::<u8>(), 0..30),
    ];
    (name, value, 0..4).prop_map(|(name, value, kind)| match kind {
        0 => field(13, &raw_header(&name, &value)),
        1 => map_header(&name, &value),
        2 => field(4, &[b"/?k=%41&k&".as_slice(), &value].concat()),
        _ => field(2, &name),
    })
}
