//! What the core needs from the world, as traits; `store`, `agent`, `forward` and `app` implement them, and
//! tests put a simulated world in their place.

mod clock;
mod net;
mod store;

pub use clock::{Clock, SystemClock};
pub use net::{BoxIo, Io, Listen, Network};
pub use store::{CommitError, Identity, ModelRows, OpenError, Store};
