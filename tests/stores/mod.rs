//! Stores for tests: rclone's S3 server, and small ones of our own that speak as Google's, Azure's, a hub's and a
//! plain web server do; and a wire that breaks.

mod fake;
mod real;
mod wire;

pub use fake::{Fake, Speaks};
pub use real::{S3, rclone};
pub use wire::Wire;
