//! What the core needs from the world, as traits; `store`, `agent`, `forward` and `app` implement them, and
//! tests put a simulated world in their place.

mod artifacts;
mod clock;
mod net;
mod process;
mod store;

pub use artifacts::{ArtifactSource, FetchLimits, FetchRequest, Fetched, FetchedFile, ProgressSink};
pub use clock::{Clock, SystemClock};
pub use net::{BoxIo, Io, Listen, Network};
pub use process::{Footprint, ServerProcess};
pub use store::{CommitError, Identity, ModelRows, OpenError, Store};
