//! Which replica holds a copy: filters, then scores, both data, so that an explanation is a printout of the
//! decision.

pub mod report;
