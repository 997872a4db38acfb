//! Revoked keys end when they should.
