//! Saturating conversion of unsigned integers: a value that is too large for the target type becomes the largest value
//! of that type.

/// An unsigned integer that can be converted to a smaller type.
///
/// Use this conversion only if no real value exceeds the largest value (the length of a message in memory, as a `u32`),
/// or if the largest value has the same effect (a duration of 584 years, as nanoseconds in a `u64`). In all other
/// cases, use `TryFrom`, which reports the overflow as an error.
pub(crate) trait Saturate: Sized {
    /// Returns `self`, or the largest value of `T` if `self` is larger.
    #[must_use]
    fn saturate<T: Largest + TryFrom<Self>>(self) -> T {
        T::try_from(self).unwrap_or(T::LARGEST)
    }
}

// Signed integers do not implement this trait: a negative number must not become the largest value.
impl Saturate for u32 {}
impl Saturate for u64 {}
impl Saturate for u128 {}
impl Saturate for usize {}

/// An integer type that has a largest value.
pub(crate) trait Largest {
    /// The largest value.
    const LARGEST: Self;
}

impl Largest for u8 {
    const LARGEST: Self = Self::MAX;
}

impl Largest for u32 {
    const LARGEST: Self = Self::MAX;
}

impl Largest for u64 {
    const LARGEST: Self = Self::MAX;
}

impl Largest for usize {
    const LARGEST: Self = Self::MAX;
}

impl Largest for i64 {
    const LARGEST: Self = Self::MAX;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_fit_are_unchanged_and_larger_values_saturate() {
        assert_eq!([255_u64, 256, u64::MAX].map(Saturate::saturate::<u8>), [255, 255, 255]);
        assert_eq!([7_u64, u64::MAX].map(Saturate::saturate::<i64>), [7, i64::MAX]);
        assert_eq!([7_u128, u128::MAX].map(Saturate::saturate::<u64>), [7, u64::MAX]);
    }
}
