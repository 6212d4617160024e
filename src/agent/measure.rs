//! After how long it makes sense to ask again for a copy that is being brought back.

use std::time::Duration;

/// Seconds after which another try makes sense: what is left of a load that should take `expected` and has
/// run for `elapsed`, rounded up; a load that is late is expected to take as long again.
pub(crate) fn retry_after(expected: Option<Duration>, elapsed: Duration) -> u64 {
    const LONGEST: u64 = 300;
    let expected = expected.unwrap_or(Duration::from_secs(1));
    let left = match expected.saturating_sub(elapsed) {
        Duration::ZERO => expected,
        left => left,
    };
    let whole = left.as_secs() + u64::from(left.subsec_nanos() > 0);
    whole.clamp(1, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiter_is_told_what_is_left() {
        let seconds = Duration::from_secs;
        assert_eq!(retry_after(None, Duration::ZERO), 1);
        assert_eq!(retry_after(Some(seconds(10)), seconds(4)), 6);
        assert_eq!(retry_after(Some(Duration::from_millis(2500)), Duration::ZERO), 3);
        assert_eq!(retry_after(Some(seconds(10)), seconds(30)), 10);
        assert_eq!(retry_after(Some(seconds(9000)), Duration::ZERO), 300);
    }
}
