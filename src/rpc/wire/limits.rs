//! Bounds on what one submission may say.

/// Bytes of a URI.
pub const URI: usize = 4096;
/// Requirements of one model, its type included.
pub const REQUIREMENTS: usize = 64;
/// Bytes of a requirement, a reference, a topic or any other short text.
pub const TEXT: usize = 253;
/// Parameters of one model.
pub const PARAMETERS: usize = 256;
/// Bytes of all parameters of one model, names and values.
pub const PARAMETER_BYTES: usize = 256 * 1024;
/// Bytes of an inline rclone configuration.
pub const RCLONE_CONFIG: usize = 64 * 1024;
/// Copies of one model: as many replicas as one scheduler is built for.
pub const REPLICAS: u32 = 10_000;
/// Instance groups that a runtime may tell of.
pub const INSTANCE_GROUPS: usize = 64;
